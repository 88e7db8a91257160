"""What did it look like? Schedules in simulated or measured time, as pictures and as plain text."""

from counterflow.report.svg import schedule_svg
from counterflow.report.text import staircase

__all__ = ["schedule_svg", "staircase"]
