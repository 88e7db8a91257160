"""One Hypothesis profile for all tests, and the command line as a function.

The profile gives the same examples on every run, and knows no clock that a busy machine trips.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from counterflow.cli import main

settings.register_profile("counterflow", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("counterflow")

Run = Callable[..., str]


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb that has to succeed, and returns what it printed."""

    def run(*arguments: str | Path) -> str:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, "")
        return printed.out

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb that has to refuse its input in one line, and returns the sentence."""

    def run(*arguments: str | Path) -> str:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, "")
        assert printed.err.startswith("counterflow: ")
        assert printed.err.count("\n") == 1
        return printed.err.removeprefix("counterflow: ").rstrip("\n")

    return run
