"""What did it look like? Schedules in simulated or measured time, as pictures and as plain text."""

from counterflow.report.curve import Memory
from counterflow.report.heatmap import load_heatmap
from counterflow.report.plot import line_plot
from counterflow.report.png import to_png
from counterflow.report.svg import schedule_svg
from counterflow.report.terminal import print_schedule
from counterflow.report.text import staircase

__all__ = ["Memory", "line_plot", "load_heatmap", "print_schedule", "schedule_svg", "staircase", "to_png"]
