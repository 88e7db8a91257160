"""Traces of the PyTorch profiler: read them, tell what a kernel is, and find the communication that was exposed."""

from counterflow.trace.columns import Annotations, GpuWork, Launches
from counterflow.trace.exposure import Exposure, Kernel, Phase, Piece, Stream, exposures
from counterflow.trace.read import Trace, open_trace, open_traces
from counterflow.trace.rules import CLASSES, COMMUNICATION, Rules, function_of

__all__ = [
    "CLASSES",
    "COMMUNICATION",
    "Annotations",
    "Exposure",
    "GpuWork",
    "Kernel",
    "Launches",
    "Phase",
    "Piece",
    "Rules",
    "Stream",
    "Trace",
    "exposures",
    "function_of",
    "open_trace",
    "open_traces",
]
