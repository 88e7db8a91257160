"""The bubble of pipelines whose actions nobody named, as far as their GPU work tells: between two bounds.

Megatron, and torch's 1F1B, run their actions without ranges that the profiler records. What it does record is when
a GPU computed, and when its kernels sent to or received from another rank: such a kernel runs from when its rank is
ready until the data has moved, so most of a long one is waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from counterflow.errors import TraceError
from counterflow.trace.alignment import Alignment
from counterflow.trace.columns import GpuWork, Ints
from counterflow.trace.cover import Cover
from counterflow.trace.messages import Message, between_ranks, messages
from counterflow.trace.read import Trace, launch_of
from counterflow.trace.rules import COMPUTE, Rules
from counterflow.trace.side_by_side import align_ranks, of_ranks, rank_of

ASSUMPTIONS = (
    "a step lasts from the first to the last compute kernel of whichever rank, so an optimiser that runs in it counts "
    "as computing",
    "the least bubble is the time in which a rank's GPU ran sends and receives and nothing else, in gaps in which one "
    "of them ended: in any other gap an action stood still while one was under way",
    "what a rank sends and receives behind its last action, as twins do that add up their gradients, is in the least "
    "as well, though no part of the bubble: nothing tells it from other messages",
    "the most is all the time in which it ran no compute kernel: gaps between an action's own kernels, and collectives "
    "that none of them hides, are in it",
)
"""What the bounds rest on."""


@dataclass(frozen=True)
class BubbleBounds:
    """The bubble of one rank in one step, in microseconds: from ``least_us`` to ``most_us``; see ``ASSUMPTIONS``.

    ``step`` is the profiler's name of it, "" where it names none and all is one step. ``num_messages`` counts sends and
    receives; ``moving_us`` is how much of the least may have been moving data, at most: as long as the shortest
    one of its size took, for each. The rest was waiting.
    """

    file: str
    rank: int
    step: str
    window_us: float
    compute_us: float
    least_us: float
    most_us: float
    num_messages: int
    moving_us: float

    @property
    def uncertainty_us(self) -> float:
        """How far the bounds are apart."""
        return self.most_us - self.least_us


def bubble_bounds(traces: Sequence[Trace], rules: Rules | None = None) -> tuple[list[BubbleBounds], Alignment]:
    """For each step and rank the bounds of its bubble, and how the ranks' clocks were put together.

    ``rules`` tell which kernels compute.

    Raises:
        TraceError: a trace has no compute kernels.

    Example:
        >>> import json, tempfile, pathlib
        >>> from counterflow import open_trace
        >>> events = [
        ...     {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": stream}
        ...     for name, ts, dur, stream in (
        ...         ("gemm", 0, 10, 7), ("ncclDevKernel_SendRecv(int)", 8, 22, 9), ("gemm", 31, 9, 7)
        ...     )
        ... ]
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> _ = path.write_text(json.dumps({"traceEvents": events}))
        >>> bounds, _ = bubble_bounds([open_trace(path)])
        >>> bounds[0].window_us, bounds[0].least_us, bounds[0].most_us
        (40.0, 20.0, 21.0)
    """
    said = [(place, trace, messages(trace)) for place, group in enumerate(of_ranks(traces)) for trace in group]
    aligned = align_ranks(said)
    names = [rank_of(trace, place) for place, trace, _ in said]
    gpus = [_Gpu.of(trace, some, int(aligned.offsets_ns[place]), rules or Rules()) for place, trace, some in said]
    found = []
    for step in dict.fromkeys(step for gpu in gpus for step in gpu.steps):
        there = [(gpu, name, gpu.steps[step]) for gpu, name in zip(gpus, names, strict=True) if step in gpu.steps]
        extents = [gpu.extent(rows) for gpu, _, rows in there]
        start, end = min(start for start, _ in extents), max(end for _, end in extents)
        found += [gpu.bounds(name, step, rows, start, end) for gpu, name, rows in there]
    return found, aligned


@dataclass(frozen=True, eq=False)
class _Gpu:
    """The work of a rank on the common clock, what of it computes, its messages, and the rows of each step."""

    file: str
    work: GpuWork
    computes: Ints
    between: list[Message]
    steps: dict[str, Ints]

    @classmethod
    def of(cls, trace: Trace, said: list[Message], offset_ns: int, rules: Rules) -> _Gpu:
        work = trace.work
        computes = np.asarray(rules.classify(work, trace.names, trace.sms) == COMPUTE)
        if not computes.any():
            raise TraceError(
                f"{trace.file} names no actions and has no compute kernels, so nothing tells when its rank computed; "
                "profile with ProfilerActivity.CUDA, or run the pipeline with counterflow's executor"
            )
        # A rank computes on one GPU; what its process left on others is no part of it.
        device = int(np.bincount(np.maximum(work.device[computes], 0)).argmax())
        steps = {name: rows[work.device[rows] == device] for name, rows in _rows_of_steps(trace)}
        steps = {name: rows for name, rows in steps.items() if computes[rows].any()}
        columns = vars(work) | {"start_ns": work.start_ns - offset_ns, "end_ns": work.end_ns - offset_ns}
        between = [
            one._replace(start_ns=one.start_ns - offset_ns, end_ns=one.end_ns - offset_ns)
            for one in said
            if not (one.on_host or one.is_collective)
        ]
        return cls(trace.file, GpuWork(**columns), computes, between, steps)

    def extent(self, rows: Ints) -> tuple[int, int]:
        """From the first to the last compute kernel."""
        own = rows[self.computes[rows]]
        return int(self.work.start_ns[own].min()), int(self.work.end_ns[own].max())

    def bounds(self, rank: int, step: str, rows: Ints, start: int, end: int) -> BubbleBounds:
        """Of one step, in the window that all ranks share."""
        window = Cover.of(np.array([start]), np.array([end]))
        here = [one for one in self.between if one.start_ns < end and one.end_ns > start]
        compute = self._cover(rows[self.computes[rows]]) & window
        rest = self._cover(rows[~between_ranks(self.work.rows(rows), here)])
        waits = _ended_by(window - compute, np.sort(_columns(here)[1]))
        alone = (Cover.of(*_columns(here)) - rest) & waits
        exposed = alone.within_ns(*_columns(here))
        moving = np.minimum(exposed, _shortest_ns(here))
        return BubbleBounds(
            file=self.file,
            rank=rank,
            step=step,
            window_us=(end - start) / 1000,
            compute_us=compute.total_ns / 1000,
            least_us=alone.total_ns / 1000,
            most_us=(end - start - compute.total_ns) / 1000,
            num_messages=len(here),
            moving_us=min(int(moving.sum()), alone.total_ns) / 1000,
        )

    def _cover(self, rows: Ints) -> Cover:
        return Cover.of(self.work.start_ns[rows], self.work.end_ns[rows])


def _rows_of_steps(trace: Trace) -> Iterator[tuple[str, Ints]]:
    """For each of the profiler's steps the work that was launched in it; all of it where there is none."""
    steps = [
        (start, end, trace.names[name])
        for start, end, name, _, on_gpu, *_ in trace.annotations.tuples()
        if not on_gpu and trace.names[name].startswith("ProfilerStep#")
    ]
    launch = launch_of(trace.work, trace.launches)
    if not steps or not (launch >= 0).any():
        yield "", np.arange(len(trace.work))
        return
    at = trace.launches.start_ns[launch]
    for start, end, name in steps:
        yield name, np.flatnonzero((launch >= 0) & (at >= start) & (at < end))


def _ended_by(pieces: Cover, times: Ints) -> Cover:
    """The pieces within which, or at whose end, one of ``times`` lies."""
    before, until = (np.searchsorted(times, ends, side="right") for ends in (pieces.start_ns, pieces.end_ns))
    kept = until > before
    return Cover(pieces.start_ns[kept], pieces.end_ns[kept])


def _columns(said: list[Message]) -> tuple[Ints, Ints]:
    start, end = ([one[part] for one in said] for part in (3, 4))
    return np.array(start, dtype=np.int64), np.array(end, dtype=np.int64)


def _shortest_ns(said: list[Message]) -> Ints:
    """For each message how long the shortest one of its size took, waiting included."""
    shortest: dict[int | None, int] = defaultdict(lambda: 2**62)
    for one in said:
        shortest[one.size_bytes] = min(shortest[one.size_bytes], one.end_ns - one.start_ns)
    return np.array([shortest[one.size_bytes] for one in said], dtype=np.int64)
