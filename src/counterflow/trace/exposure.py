"""Communication time under which no compute kernel runs, exactly: to the nanosecond of the trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from counterflow.errors import TraceError
from counterflow.trace.columns import GpuWork, Ints
from counterflow.trace.cover import Cover
from counterflow.trace.phases import phase_rows
from counterflow.trace.read import Trace, launch_of
from counterflow.trace.rules import (
    CLASSES,
    COMMUNICATION,
    COMPUTE,
    TRANSFER,
    UNKNOWN_KERNEL,
    WAITING,
    Rules,
    function_of,
)

MOST_PIECES = 1_000
"""So many exposed pieces are told one by one, the longest; long traces have hundreds of thousands."""


@dataclass(frozen=True)
class Stream:
    """What ran on one stream, in microseconds of which each counts once."""

    stream: int
    count: int
    busy_us: float
    compute_us: float
    communication_us: float


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel: ``kind`` is one of ``CLASSES``; times are summed over its runs.

    ``blocks`` and ``threads`` are the largest grid and block it ran with, 0 where the trace tells none.
    """

    name: str
    kind: str
    count: int
    total_us: float
    exposed_us: float
    blocks: int
    threads: int


@dataclass(frozen=True)
class Piece:
    """One unbroken stretch of exposed communication, counted from the window's start.

    ``kernels`` are those that ran in it, ``phases`` what had launched them; ``then`` is the compute kernel that
    starts first at its end or after, ``then_phase`` its phase, both "" where there is none.
    """

    start_us: float
    length_us: float
    kernels: tuple[str, ...]
    phases: tuple[str, ...]
    then: str
    then_phase: str


@dataclass(frozen=True)
class Phase:
    """All annotated ranges of one name; times are those of the GPU work launched in them, summed over the ranges.

    Within a range each instant counts once for compute, once for communication and once for the rest (copies, fills
    and unknown kernels).
    """

    name: str
    count: int
    compute_us: float
    communication_us: float
    exposed_us: float
    other_us: float


@dataclass(frozen=True)
class Exposure:
    """Where the time of one GPU went, in microseconds.

    ``window_us`` = ``compute_us`` + ``exposed_us`` + ``other_us`` + ``idle_us``; ``communication_us`` =
    ``overlapped_us`` + ``exposed_us``. Other is what only copies, fills and unknown kernels cover. Transfers alone
    leave out waiting and preparing. ``pieces`` are the longest of ``num_pieces``. ``sms`` are the multiprocessors of
    the GPU and ``communication_sms`` the most that a communication kernel took, both 0 where not told.
    """

    file: str
    rank: int | None
    device: int
    start_ns: int
    window_us: float
    compute_us: float
    communication_us: float
    overlapped_us: float
    exposed_us: float
    transfers_us: float
    exposed_transfers_us: float
    waiting_us: float
    unknown_us: float
    other_us: float
    idle_us: float
    idle_gaps: int
    num_pieces: int
    sms: int
    communication_sms: int
    streams: tuple[Stream, ...]
    kernels: tuple[Kernel, ...]
    pieces: tuple[Piece, ...]
    phases: tuple[Phase, ...]
    warnings: tuple[str, ...]

    @property
    def exposed_share(self) -> float:
        """The exposed part of the window, from 0 to 1."""
        return self.exposed_us / self.window_us if self.window_us else 0.0


def exposures(trace: Trace, rules: Rules | None = None, within: str | None = None) -> list[Exposure]:
    """Where the time went, for each GPU of the trace.

    The window is the span of all GPU work or, with ``within``, of the work that was launched inside the annotations
    of that name: such work starts after the annotation opens, and ends long after it closes.

    Raises:
        TraceError: the trace has no such annotation, or nothing was launched inside it.

    Example:
        >>> import json, tempfile, pathlib
        >>> from counterflow.trace import exposures, open_trace
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> kernels = [("gemm", 7, 0, 10), ("ncclDevKernel_AllReduce", 20, 6, 8)]
        >>> events = [
        ...     {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": ts, "dur": dur}
        ...     for name, stream, ts, dur in kernels
        ... ]
        >>> _ = path.write_text(json.dumps({"traceEvents": events}))
        >>> [one] = exposures(open_trace(path))
        >>> one.window_us, one.compute_us, one.communication_us, one.exposed_us
        (14.0, 10.0, 8.0, 4.0)
    """
    work = trace.work
    classes = (rules or Rules()).classify(work, trace.names, trace.sms)
    leaves, rows = phase_rows(trace)
    inside = None if within is None else _launched_within(trace, within)
    found = []
    for device in np.unique(work.device if inside is None else work.device[inside]).tolist():
        on = work.device == device
        chosen = on if inside is None else on & inside
        start, end = int(work.start_ns[chosen].min()), int(work.end_ns[chosen].max())
        here = np.flatnonzero(on & (work.start_ns <= end) & (work.end_ns >= start))
        clipped = _clipped(work if len(here) == len(work) else work.rows(here), start, end)
        phases = [trace.names[name] for name in leaves.name.tolist()]
        found.append(_Gpu(trace, device, clipped, classes[here], rows[here], phases, start, end).exposure())
    return found


def _launched_within(trace: Trace, name: str) -> Ints:
    ranges = trace.annotations.rows(np.array([trace.names[n] == name for n in trace.annotations.name], dtype=bool))
    ranges = ranges.rows(ranges.on_gpu == 0)
    if not len(ranges):
        known = sorted({trace.names[n] for n in trace.annotations.name.tolist()})
        some = ", ".join(map(repr, known[:10])) + (", …" if len(known) > 10 else "")
        raise TraceError(
            f"{trace.file}: there is no annotation {name!r}; give one of {some or 'a trace that has some'}"
        )
    launch = launch_of(trace.work, trace.launches)
    times = trace.launches.start_ns[launch] if len(trace.launches) else launch
    inside = (launch >= 0) & Cover.of(ranges.start_ns, ranges.end_ns).holds(times)
    if not inside.any():
        raise TraceError(f"{trace.file}: no GPU work was launched inside {name!r}; give another annotation")
    return np.asarray(inside)


def _clipped(work: GpuWork, start: int, end: int) -> GpuWork:
    columns = vars(work) | {"start_ns": work.start_ns.clip(start, end), "end_ns": work.end_ns.clip(start, end)}
    return GpuWork(**columns)


def _us(ns: int) -> float:
    return ns / 1000


class _Gpu:
    """The work of one GPU in one window, and what follows from it."""

    def __init__(
        self,
        trace: Trace,
        device: int,
        work: GpuWork,
        classes: Ints,
        phase_rows: Ints,
        phases: list[str],
        start: int,
        end: int,
    ) -> None:
        self.trace, self.device, self.start, self.end = trace, device, start, end
        self.work, self.classes = work, classes
        self.phase_rows, self.phases = phase_rows, phases
        self.communicates = np.isin(classes, COMMUNICATION)
        self.compute = self.cover(classes == COMPUTE)
        self.communication = self.cover(self.communicates)
        self.exposed = self.communication - self.compute

    def cover(self, which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Cover:
        return Cover.of(self.work.start_ns[which], self.work.end_ns[which])

    def exposure(self) -> Exposure:
        busy = Cover.of(self.work.start_ns, self.work.end_ns)
        window = self.end - self.start
        idle = Cover.of(np.array([self.start]), np.array([self.end])) - busy
        transfers, waiting = self.cover(self.classes == TRANSFER), self.cover(self.classes == WAITING)
        exposed = self.exposed.total_ns
        kernels = tuple(self.kernels())
        sms = self.trace.sms.get(self.device, 0)
        blocks = int(self.work.blocks[self.communicates].max(initial=0))
        return Exposure(
            file=self.trace.file,
            rank=self.trace.rank,
            device=self.device,
            start_ns=self.start,
            window_us=_us(window),
            compute_us=_us(self.compute.total_ns),
            communication_us=_us(self.communication.total_ns),
            overlapped_us=_us(self.communication.total_ns - exposed),
            exposed_us=_us(exposed),
            transfers_us=_us(transfers.total_ns),
            exposed_transfers_us=_us((transfers - self.compute).total_ns),
            waiting_us=_us(waiting.total_ns),
            unknown_us=_us(self.cover(self.classes == UNKNOWN_KERNEL).total_ns),
            other_us=_us(busy.total_ns - self.compute.total_ns - exposed),
            idle_us=_us(idle.total_ns),
            idle_gaps=len(idle),
            num_pieces=len(self.exposed),
            sms=sms,
            communication_sms=min(blocks, sms) if sms else 0,
            streams=tuple(self.streams()),
            kernels=kernels,
            pieces=tuple(self.pieces()),
            phases=tuple(self.phase_figures()),
            warnings=tuple(self.warnings(kernels)),
        )

    def streams(self) -> Iterator[Stream]:
        for stream in np.unique(self.work.stream).tolist():
            on = self.work.stream == stream
            yield Stream(
                stream,
                int(on.sum()),
                *(_us(self.cover(on & which).total_ns) for which in (on, self.classes == COMPUTE, self.communicates)),
            )

    def kernels(self) -> list[Kernel]:
        """The longest first."""
        length = self.work.end_ns - self.work.start_ns
        exposed = np.where(self.communicates, length - self.compute.within_ns(self.work.start_ns, self.work.end_ns), 0)
        names, place = np.unique(self.work.name * len(CLASSES) + self.classes, return_inverse=True)
        counts, total, shown = (
            np.bincount(place, minlength=len(names)),
            _sums(place, length, len(names)),
            _sums(place, exposed, len(names)),
        )
        blocks, threads = np.zeros((2, len(names)), dtype=np.int64)
        np.maximum.at(blocks, place, self.work.blocks)
        np.maximum.at(threads, place, self.work.threads)
        kernels = [
            Kernel(
                self.trace.names[key // len(CLASSES)],
                CLASSES[key % len(CLASSES)],
                int(counts[i]),
                _us(int(total[i])),
                _us(int(shown[i])),
                int(blocks[i]),
                int(threads[i]),
            )
            for i, key in enumerate(names.tolist())
        ]
        return sorted(kernels, key=lambda kernel: (-kernel.total_us, kernel.name))

    def pieces(self) -> list[Piece]:
        """The longest first."""
        talk = np.flatnonzero(self.communicates & (self.work.end_ns > self.work.start_ns))
        compute = np.flatnonzero((self.classes == COMPUTE) & (self.work.end_ns > self.work.start_ns))
        lengths = self.exposed.end_ns - self.exposed.start_ns
        longest = np.lexsort((self.exposed.start_ns, -lengths))[:MOST_PIECES]
        starts, ends = self.exposed.start_ns[longest], self.exposed.end_ns[longest]
        first = np.searchsorted(np.maximum.accumulate(self.work.end_ns[talk]), starts, side="right")
        past = np.searchsorted(self.work.start_ns[talk], ends, side="left")
        following = np.searchsorted(self.work.start_ns[compute], ends, side="left")
        pieces = []
        for start, end, one, stop, then in zip(
            *(c.tolist() for c in (starts, ends, first, past, following)), strict=True
        ):
            rows = [row for row in talk[one:stop].tolist() if self.work.end_ns[row] > start]
            last = int(compute[then]) if then < len(compute) else None
            pieces.append(
                Piece(
                    _us(start - self.start),
                    _us(end - start),
                    tuple(dict.fromkeys(self.name(row) for row in rows)),
                    tuple(dict.fromkeys(filter(None, map(self.phase, rows)))),
                    "" if last is None else self.name(last),
                    "" if last is None else self.phase(last),
                )
            )
        return pieces

    def name(self, row: int) -> str:
        return self.trace.names[int(self.work.name[row])]

    def phase(self, row: int) -> str:
        place = int(self.phase_rows[row])
        return self.phases[place] if place >= 0 else ""

    def phase_figures(self) -> list[Phase]:
        """In the order in which they first appear."""
        annotated = np.flatnonzero((self.phase_rows >= 0) & (self.work.end_ns > self.work.start_ns))
        if not len(annotated):
            return []
        annotated = annotated[np.argsort(self.phase_rows[annotated], kind="stable")]
        start, end = self.work.start_ns[annotated], self.work.end_ns[annotated]
        rows, first = np.unique(self.phase_rows[annotated], return_index=True)
        # The work of each range is moved to a time of its own, so that one union serves all ranges.
        begin, extent = np.minimum.reduceat(start, first), np.maximum.reduceat(end, first)
        extent -= begin
        own = np.cumsum(extent + 1) - extent - 1
        moved = np.repeat(own - begin, np.diff(first, append=len(annotated)))
        talks, computes = self.communicates[annotated], self.classes[annotated] == COMPUTE
        compute, talk, rest = (
            Cover.of((start + moved)[which], (end + moved)[which]) for which in (computes, talks, ~computes & ~talks)
        )
        totals = [cover.within_ns(own, own + extent) for cover in (compute, talk, rest)]
        home = np.searchsorted(own, talk.start_ns, side="right") - 1
        back = begin[home] - own[home]
        exposed = _sums(home, self.exposed.within_ns(talk.start_ns + back, talk.end_ns + back), len(rows))
        sums: dict[str, list[int]] = {}
        figures = (column.tolist() for column in (totals[0], totals[1], exposed, totals[2]))
        for row, *times in zip(rows.tolist(), *figures, strict=True):
            known = sums.setdefault(self.phases[row], [0, 0, 0, 0, 0])
            known[:] = [a + b for a, b in zip(known, (1, *times), strict=True)]
        return [Phase(name, count, *map(_us, times)) for name, (count, *times) in sums.items()]

    def warnings(self, kernels: tuple[Kernel, ...]) -> Iterator[str]:
        yield from self.trace.warnings
        unknown = [kernel for kernel in kernels if kernel.kind == CLASSES[UNKNOWN_KERNEL]]
        if unknown:
            yield (
                f"{len(unknown)} long kernels with few blocks on a stream of their own are of unknown purpose and "
                f"counted as other, the longest {function_of(unknown[0].name)!r}: tell their class in a rules file"
            )


def _sums(place: Ints, values: Ints, size: int) -> Ints:
    total = np.zeros(size, dtype=np.int64)
    np.add.at(total, place, values)
    return total
