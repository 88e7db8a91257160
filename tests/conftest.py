"""One Hypothesis profile for all tests: the same examples on every run, and no clock that a busy machine trips."""

from hypothesis import HealthCheck, settings

settings.register_profile("counterflow", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("counterflow")
