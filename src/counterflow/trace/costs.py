"""What the simulator reads, out of traces: from a pipeline's actions, or from the phases of a chunk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from counterflow.errors import TraceError
from counterflow.schedule import Kind, Schedule
from counterflow.simulator import Costs
from counterflow.timeline import Timeline
from counterflow.trace.exposure import exposures
from counterflow.trace.figures import Phase
from counterflow.trace.pipelines import MeasuredPipeline, measured_pipeline
from counterflow.trace.read import Trace, counted, launch_of
from counterflow.trace.rules import Rules

_PHASE = re.compile(r".*\((F|B|I|W)\)", re.DOTALL)


@dataclass(frozen=True)
class TraceCosts:
    """Costs, where they are from, and in sentences what the traces do not tell."""

    costs: Costs
    source: str
    not_told: tuple[str, ...]


def trace_costs(traces: Sequence[Trace], schedule: Schedule | None = None, rules: Rules | None = None) -> TraceCosts:
    """Costs for the simulator, out of traces of a pipeline's ranks, or else of one chunk whose phases are named.

    With named actions (see ``measured_pipeline``) for each kind and stage the median over all steps and micro-batches,
    as latency the median time from the end of an action to the start of one on another rank that waited for it,
    and where sizes were recorded the bytes that cross each boundary. ``rules`` tell which kernels communicate.

    Phases are annotations such as ``attn(F)``, ``mlp(B)`` and ``mlp(W)``. F, I and W are the sums of theirs, computing
    and communicating after one another; where an annotation holds forward and backward phases, its GPU work's span is
    the F&B. With no phase of W, those of B are the full backward.

    Raises:
        TraceError: neither is in the traces.
    """
    pipeline = measured_pipeline(traces, schedule, rules)
    return _of_chunk(traces, rules) if pipeline is None else pipeline_costs(pipeline)


def pipeline_costs(pipeline: MeasuredPipeline) -> TraceCosts:
    """As ``trace_costs``, of a pipeline that has been rebuilt already.

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow import Costs, one_f_one_b, open_trace, simulate
        >>> from counterflow.timeline import write_chrome
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "step.json"
        >>> write_chrome(simulate(one_f_one_b(2, 4), Costs(3, 5, latency_us=0.5)), path)
        >>> found = pipeline_costs(measured_pipeline([open_trace(path)]))
        >>> found.costs.forward_us, found.costs.backward_us, found.costs.latency_us
        ((3.0, 3.0), (5.0, 5.0), 0.5)
    """
    sizes = pipeline.boundary_bytes
    timeline = Timeline.from_spans([*pipeline.every_step, *pipeline.sums])
    costs = Costs.from_timeline(timeline, **({"transfer_bytes": sizes} if sizes else {}))
    steps, ranks = counted(len(pipeline.steps), "step"), counted(pipeline.schedule.num_ranks, "rank")
    told = f"the ranges of {pipeline.named_by}: {steps} of {ranks}"
    missing = ["the bandwidth of the wire: what messages take is in the latency", "what a micro-batch stores, in bytes"]
    if not sizes:
        missing.append("the bytes of a message: record with record_shapes=True")
    if pipeline.schedule.twins and not pipeline.sums:
        missing.append("the sum of gradients over twins, which no range in a trace of one rank names")
    kinds = {action.kind for row in pipeline.schedule.rows for action in row}
    if Kind.F_B in kinds and Kind.F not in kinds:
        missing.append("F alone: every forward ran inside an F&B")
    return TraceCosts(costs, told, (*missing, *pipeline.warnings))


# --- from the phases of a chunk -------------------------------------------------------------------------------


def _of_chunk(traces: Sequence[Trace], rules: Rules | None) -> TraceCosts:
    trace = next((one for one in traces if any(_PHASE.fullmatch(name) for name in one.names)), None)
    gpus = exposures(trace, rules) if trace is not None else []
    if trace is None or not gpus:
        raise TraceError(
            f"{traces[0].file} names neither actions (such as 3F12) nor phases (such as attn(F)) of GPU work; run the "
            "pipeline with counterflow's executor, or annotate the phases of a chunk with record_function"
        )
    spans_ns = _chunk_spans_ns(trace)
    chunks = max(len(spans_ns), 1)
    phases = max((gpu.phases for gpu in gpus), key=len)
    sums = {kind: _alone_us(phases, kind) / chunks for kind in ("F", "B", "I", "W")}
    input_us = sums["I"] or (sums["B"] if sums["W"] else 0.0)
    fields: dict[str, Any] = {"forward_us": sums["F"], "input_us": input_us, "weight_us": sums["W"]}
    if not input_us:
        fields["backward_us"] = sums["B"]
    if spans_ns and sums["F"] and (sums["B"] or sums["I"]):
        fields["overlapped_us"] = float(median(spans_ns)) / 1000
    fields = {name: us for name, us in fields.items() if us}
    told = f"the phases of {counted(chunks, 'chunk')} in {trace.file}"
    missing = [
        "latency, and the bytes of a message: the phases of a chunk hold none of a pipeline's communication",
        "how stages differ: all take what this chunk took",
        "how long a phase takes alone: F, I and W are sums of phases that ran side by side and slowed each other down",
    ]
    if "overlapped_us" not in fields:
        missing.append("F&B: no annotation holds a forward and a backward")
    return TraceCosts(Costs(**fields), told, tuple(missing))


def _alone_us(phases: Sequence[Phase], kind: str) -> float:
    """What the phases of a kind take after one another."""
    own = [one for one in phases if (found := _PHASE.fullmatch(one.name)) and found[1] == kind]
    return sum(one.compute_us + one.communication_us + one.other_us for one in own)


def _chunk_spans_ns(trace: Trace) -> list[int]:
    """The spans of the GPU work that was launched inside each annotation which holds phases, the innermost ones."""
    ranges = trace.annotations.rows(np.flatnonzero(trace.annotations.on_gpu == 0)).tuples()
    phases = [one for one in ranges if _PHASE.fullmatch(trace.names[one[2]])]
    holders = [
        one
        for one in ranges
        if not _PHASE.fullmatch(trace.names[one[2]])
        and not trace.names[one[2]].startswith("ProfilerStep#")
        and any(one[3] == phase[3] and one[0] <= phase[0] and phase[1] <= one[1] for phase in phases)
    ]
    inner = [one for one in holders if not any(_holds(one, other) for other in holders)]
    launch = launch_of(trace.work, trace.launches)
    at = trace.launches.start_ns[launch]
    spans = []
    for start, end, *_ in inner:
        own = (launch >= 0) & (at >= start) & (at < end)
        if own.any():
            spans.append(int(trace.work.end_ns[own].max() - trace.work.start_ns[own].min()))
    return spans


def _holds(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and one[3] == other[3] and one[0] <= other[0] and other[1] <= one[1]
