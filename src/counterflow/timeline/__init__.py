"""Time in columns: spans of ranks, simulated or measured, and their Chrome traces."""

from counterflow.timeline.chrome import LANE, from_chrome, read_chrome, to_chrome, write_chrome
from counterflow.timeline.timeline import COMPUTE, TWINS, TWINS_OF, Span, Timeline

__all__ = [
    "COMPUTE",
    "LANE",
    "TWINS",
    "TWINS_OF",
    "Span",
    "Timeline",
    "from_chrome",
    "read_chrome",
    "to_chrome",
    "write_chrome",
]
