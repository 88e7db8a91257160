"""What changed between two runs: their times side by side, by phase, class, kernel and stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from counterflow.errors import TraceError
from counterflow.trace.columns import Ints
from counterflow.trace.exposure import exposures
from counterflow.trace.figures import Exposure
from counterflow.trace.phases import NONE, phases_of
from counterflow.trace.read import Trace
from counterflow.trace.rules import CLASSES, Rules, function_of

TOTALS = (
    *("window_us", "compute_us", "communication_us", "overlapped_us", "exposed_us"),
    *("transfers_us", "waiting_us", "other_us", "idle_us"),
)
"""The figures of an ``Exposure`` that are set side by side."""


class Pair(NamedTuple):
    """One figure of both runs."""

    a: float
    b: float

    @property
    def difference(self) -> float:
        """How much more it is in the second run."""
        return self.b - self.a

    @property
    def ratio(self) -> float | None:
        """The second run's over the first one's, None where the first has none."""
        return self.b / self.a if self.a else None


@dataclass(frozen=True)
class Change:
    """The GPU work of one phase, class, kernel and stream in both runs; None where a row is of all of them.

    ``phase`` is "" for what no phase holds. ``count`` and ``total_us`` (times summed over the calls) are means over
    the GPUs, and over the steps where the runs have different numbers of them.
    """

    phase: str | None
    kind: str | None
    kernel: str | None
    stream: int | None
    count: Pair
    total_us: Pair

    @property
    def mean_us(self) -> Pair:
        """What one call takes; 0 where there is none."""
        return Pair(*(total / count if count else 0.0 for total, count in zip(self.total_us, self.count, strict=True)))

    @property
    def only_in(self) -> str:
        """ "a" or "b" where only one run has it, else ""."""
        return "" if all(self.count) else "a" if self.count.a else "b"


@dataclass(frozen=True)
class Run:
    """One side of the comparison: ``steps`` is None where its traces tell no steps, or not the same number."""

    files: tuple[str, ...]
    gpus: int
    steps: int | None


@dataclass(frozen=True)
class Difference:
    """Two runs side by side; figures are means over the GPUs of each, and over its steps if ``per_step``.

    ``totals`` has a pair for each of ``TOTALS``; ``changes`` are by phase, class, kernel and stream at once.
    """

    a: Run
    b: Run
    per_step: bool
    totals: dict[str, Pair]
    changes: tuple[Change, ...]

    def by(self, *columns: str) -> list[Change]:
        """The changes summed over all but these columns, the largest first, whichever way it goes.

        Example:
            >>> from counterflow.trace.diff import Change, Difference, Pair, Run
            >>> run = Run(("trace.json",), 1, None)
            >>> rows = (
            ...     Change("attn(F)", "compute", "gemm", 7, Pair(1, 1), Pair(10, 9)),
            ...     Change("mlp(F)", "compute", "gemm", 7, Pair(1, 2), Pair(10, 25)),
            ... )
            >>> [row] = Difference(run, run, False, {}, rows).by("kernel")
            >>> row.kernel, row.phase, row.count, row.total_us.difference
            ('gemm', None, Pair(a=2, b=3), 14)
        """
        sums: dict[tuple[object, ...], Change] = {}
        nothing = {name: None for name in ("phase", "kind", "kernel", "stream") if name not in columns}
        for change in self.changes:
            key = tuple(getattr(change, name) for name in columns)
            known = sums.get(key)
            sums[key] = (
                replace(change, **nothing)  # type: ignore[arg-type]
                if known is None
                else replace(
                    known, count=_plus(known.count, change.count), total_us=_plus(known.total_us, change.total_us)
                )
            )
        return sorted(sums.values(), key=_largest_first)


def difference(a: Sequence[Trace], b: Sequence[Trace], rules: Rules | None = None) -> Difference:
    """What changed from the traces of one run to those of another one.

    Raises:
        TraceError: one of the runs has no GPU work.

    Example:
        >>> import json, tempfile, pathlib
        >>> from counterflow.trace import difference, open_trace
        >>> folder, traces = pathlib.Path(tempfile.mkdtemp()), []
        >>> for us in (10, 12):
        ...     event = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 0, "dur": us}
        ...     _ = (folder / f"{us}.json").write_text(json.dumps({"traceEvents": [event]}))
        ...     traces.append(open_trace(folder / f"{us}.json"))
        >>> found = difference(traces[:1], traces[1:])
        >>> found.totals["compute_us"].difference, found.by("kernel")[0].total_us.ratio
        (2.0, 1.2)
    """
    rules = rules or Rules()
    sides = [[gpu for trace in traces for gpu in exposures(trace, rules)] for traces in (a, b)]
    runs = [_run(traces, gpus) for traces, gpus in zip((a, b), sides, strict=True)]
    per_step = None not in (runs[0].steps, runs[1].steps) and runs[0].steps != runs[1].steps
    shares = [run.gpus * (run.steps or 1) if per_step else run.gpus for run in runs]
    rows = [_rows(traces, rules) for traces in (a, b)]
    changes = []
    for key in dict.fromkeys([*rows[0], *rows[1]]):
        sums = [side.get(key, (0, 0)) for side in rows]
        counts, times = zip(*sums, strict=True)
        changes.append(Change(*key, _mean(counts, shares), _mean([ns / 1000 for ns in times], shares)))
    totals = {name: _mean([sum(getattr(gpu, name) for gpu in gpus) for gpus in sides], shares) for name in TOTALS}
    return Difference(runs[0], runs[1], per_step, totals, tuple(sorted(changes, key=_largest_first)))


_Key = tuple[str, str, str, int]


def _rows(traces: Sequence[Trace], rules: Rules) -> dict[_Key, tuple[int, int]]:
    """By phase, class, kernel and stream the calls and their nanoseconds, of all traces."""
    sums: dict[_Key, tuple[int, int]] = {}
    for trace in traces:
        for key, count, ns in _rows_of(trace, rules):
            known = sums.get(key, (0, 0))
            sums[key] = (known[0] + count, known[1] + ns)
    return sums


def _rows_of(trace: Trace, rules: Rules) -> Iterator[tuple[_Key, int, int]]:
    work = trace.work
    classes = rules.classify(work, trace.names, trace.sms)
    phases = phases_of(trace, classes)
    # Many ranges have one name, and many kernels one function.
    phase_ids, phase_names = _numbered([*phases.names, ""])
    used = np.unique(work.name).tolist()
    function_ids, functions = _numbered([function_of(trace.names[name]) for name in used])
    phase = phase_ids[np.where(phases.rows == NONE, len(phases.names), phases.rows)]
    function = function_ids[np.searchsorted(used, work.name)]
    streams, stream = np.unique(work.stream, return_inverse=True)
    shape = (len(phase_names), len(CLASSES), len(functions), len(streams))
    keys, place = np.unique(np.ravel_multi_index((phase, classes, function, stream), shape), return_inverse=True)
    counts, times = np.bincount(place, minlength=len(keys)), np.zeros(len(keys), dtype=np.int64)
    np.add.at(times, place, work.end_ns - work.start_ns)
    columns = [index.tolist() for index in np.unravel_index(keys, shape)]
    for one, kind, kernel, on, count, ns in zip(*columns, counts.tolist(), times.tolist(), strict=True):
        yield (phase_names[one], CLASSES[kind], functions[kernel], int(streams[on])), count, ns


def _numbered(texts: list[str]) -> tuple[Ints, list[str]]:
    """For each text the number of the first like it, and the texts by their numbers."""
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(text, len(ids)) for text in texts], dtype=np.int64), list(ids)


def _run(traces: Sequence[Trace], gpus: list[Exposure]) -> Run:
    files = tuple(trace.file for trace in traces)
    if not gpus:
        raise TraceError(f"{', '.join(files)}: there is no GPU work to compare; give traces that have some")
    steps = {_steps(trace) for trace in traces}
    return Run(files, len(gpus), steps.pop() or None if len(steps) == 1 else None)


def _steps(trace: Trace) -> int:
    """So many steps the profiler marked; the last mark is empty where a run ends with its step."""
    marks = {name for name, text in enumerate(trace.names) if text.startswith("ProfilerStep#")}
    ranges = trace.annotations.rows((trace.annotations.on_gpu == 0) & np.isin(trace.annotations.name, list(marks)))
    if len(trace.launches):
        launched = trace.launches.start_ns
        filled = np.searchsorted(launched, ranges.end_ns) > np.searchsorted(launched, ranges.start_ns)
        ranges = ranges.rows(filled)
    return len(np.unique(ranges.name))


def _mean(sums: Sequence[float], shares: Sequence[int]) -> Pair:
    return Pair(*(total / share for total, share in zip(sums, shares, strict=True)))


def _plus(one: Pair, other: Pair) -> Pair:
    return Pair(one.a + other.a, one.b + other.b)


def _largest_first(change: Change) -> tuple[object, ...]:
    names = (change.phase or "", change.kind or "", change.kernel or "", change.stream or 0)
    return (-abs(change.total_us.difference), -max(change.total_us), *names)
