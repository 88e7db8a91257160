"""What did it look like? Schedules in simulated or measured time, as pictures and as plain text."""

from counterflow.report.curve import Memory
from counterflow.report.heatmap import load_heatmap
from counterflow.report.overlay import Deviation, deviations, overlay_svg
from counterflow.report.page import Page, trace_page
from counterflow.report.plot import line_plot
from counterflow.report.png import to_png
from counterflow.report.svg import schedule_svg
from counterflow.report.terminal import print_schedule
from counterflow.report.text import staircase
from counterflow.report.waits import Wait, waits

__all__ = [
    "Deviation",
    "Memory",
    "Page",
    "Wait",
    "deviations",
    "line_plot",
    "load_heatmap",
    "overlay_svg",
    "print_schedule",
    "schedule_svg",
    "staircase",
    "to_png",
    "trace_page",
    "waits",
]
