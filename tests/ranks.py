"""Traces of a pipeline's ranks as the profiler would write them, made from simulated timelines."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from counterflow import Timeline
from counterflow.timeline import COMPUTE, Span
from counterflow.trace import Trace, open_traces
from traces import Data, annotation, kernel, launch

EPOCH_NS = 1_767_189_312_000_000_000
START_NS = 50_000_000


def us(ns: int) -> Decimal:
    return Decimal(ns) / 1000


def shifted(timeline: Timeline, ns: int) -> Timeline:
    return Timeline.from_spans(span._replace(start_ns=span.start_ns + ns, end_ns=span.end_ns + ns) for span in timeline)


def behind_one_another(step: Timeline, count: int, pause_ns: int = 5_000_000) -> list[Timeline]:
    """The same step several times."""
    return [shifted(step, number * (step.makespan_ns + pause_ns)) for number in range(count)]


def spans_of(rank: int, steps: list[Timeline]) -> list[Span]:
    return sorted((s for step in steps for s in step if s.rank == rank and s.lane == COMPUTE), key=lambda s: s.start_ns)


def named_ranges(spans: list[Span], prefix: str = "") -> list[Data]:
    """As the executor names them on the CPU, and nothing else."""
    return [annotation(prefix + s.name, us(START_NS + s.start_ns), us(s.duration_ns)) for s in spans]


def gpu_events(spans: list[Span], named: bool = True, gap_ns: int = 100) -> list[Data]:
    """Ranges that launch ahead of the GPU, two kernels for each with a gap between, and receives that fill the waits.

    The CPU is through with everything before the GPU starts.
    """
    events, number = [], 0
    before_ns = spans[0].start_ns
    for s in spans:
        number += 3
        opened = Decimal(number * 3)
        start, end = START_NS + s.start_ns, START_NS + s.end_ns
        middle = (start + end) // 2
        events += [
            launch(opened - 2, number),
            kernel("ncclDevKernel_SendRecv(int)", 20, us(START_NS + before_ns), us(s.start_ns - before_ns), number),
            *([annotation(s.name, opened, 3)] if named else []),
            launch(opened + 1, number + 1),
            launch(opened + 2, number + 2, thread=10),
            kernel("gemm", 7, us(start), us(middle - start), number + 1),
            kernel("gemm", 7, us(min(middle + gap_ns, end)), us(end - min(middle + gap_ns, end)), number + 2),
        ]
        before_ns = s.end_ns
    return events


def all_reduce(ts_ns: int, end_ns: int, name: str = "gloo:all_reduce") -> Data:
    arguments = {"Input Dims": [[4, 8]], "Input type": ["float"]}
    return annotation(name, us(START_NS + ts_ns), us(end_ns - ts_ns), thread=12) | {"args": arguments}


def write(folder: Path, events_of_ranks: list[list[Data]], **beside: Any) -> list[Trace]:
    """One file for each rank, read again."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, events in enumerate(events_of_ranks):
        data = {"distributedInfo": {"rank": rank}, "baseTimeNanoseconds": EPOCH_NS, **beside, "traceEvents": events}
        (folder / f"rank{rank:03}.json").write_text(json.dumps(data, default=float))
    return open_traces(folder)


def from_start(timeline: Timeline) -> list[Span]:
    """Its spans, counted from its first action."""
    return sorted(shifted(timeline, -int(timeline.start_ns.min()))) if len(timeline) else []
