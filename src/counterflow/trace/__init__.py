"""Traces of the PyTorch profiler: read them, tell what a kernel is, and find the communication that was exposed."""

from counterflow.trace.alignment import Alignment, Straggler, align
from counterflow.trace.columns import Annotations, GpuWork, Launches
from counterflow.trace.costs import TraceCosts, pipeline_costs, trace_costs
from counterflow.trace.diff import Difference, difference
from counterflow.trace.exposure import exposures
from counterflow.trace.figures import Exposure, Flight, Hiding, Kernel, Phase, Piece, Share, Stream
from counterflow.trace.foreign import ASSUMPTIONS, BubbleBounds, bubble_bounds
from counterflow.trace.messages import Message, messages
from counterflow.trace.pipelines import MeasuredPipeline, measured_pipeline
from counterflow.trace.read import Trace, open_trace, open_traces
from counterflow.trace.rules import CLASSES, COMMUNICATION, Rules, function_of

__all__ = [
    "ASSUMPTIONS",
    "CLASSES",
    "COMMUNICATION",
    "Alignment",
    "Annotations",
    "BubbleBounds",
    "Difference",
    "Exposure",
    "Flight",
    "GpuWork",
    "Hiding",
    "Kernel",
    "Launches",
    "MeasuredPipeline",
    "Message",
    "Phase",
    "Piece",
    "Rules",
    "Share",
    "Straggler",
    "Stream",
    "Trace",
    "TraceCosts",
    "align",
    "bubble_bounds",
    "difference",
    "exposures",
    "function_of",
    "measured_pipeline",
    "messages",
    "open_trace",
    "open_traces",
    "pipeline_costs",
    "trace_costs",
]
