"""What is drawn of a GPU: lanes of intervals that do not overlap, so that a page can find any of them by bisection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from counterflow.errors import ScheduleError
from counterflow.schedule import Action, Kind
from counterflow.trace import COMMUNICATION, Exposure, Rules, Trace
from counterflow.trace.columns import COMMUNICATION_SPAN, COMPUTE_SPAN, GpuWork, Ints
from counterflow.trace.cover import Cover
from counterflow.trace.phases import NONE, phases_of
from counterflow.trace.rules import COMPUTE

LaneKind = Literal["compute", "hidden", "exposed", "phase", "stream"]

MOST_ROWS = {"phase": 8, "stream": 64}
"""Work that overlaps on one stream, and phases that overlap, stand in so many rows below each other at most."""


@dataclass(frozen=True, eq=False)
class Lane:
    """Intervals in the order of time, none of which overlap; all columns int64 [intervals].

    The first three kinds are unions, of compute and of communication with and without compute under it. ``what`` is
    the row of the piece of work among all of the trace, or NONE, and ``phase`` an index into the phases. A lane is
    not whole when some of it was left out.
    """

    kind: LaneKind
    label: str
    start_ns: Ints
    end_ns: Ints
    what: Ints
    phase: Ints
    whole: bool = True

    def __len__(self) -> int:
        return len(self.start_ns)

    def rows(self, which: npt.NDArray[np.bool_]) -> Lane:
        """The chosen intervals."""
        columns = {name: getattr(self, name)[which] for name in ("start_ns", "end_ns", "what", "phase")}
        return replace(self, **columns, whole=self.whole and bool(which.all()))


class Drawn:
    """All that a trace gives to draw: the class of each piece of work, its phase, and the lanes of each GPU.

    ``phases`` are the names that phases index; the first is "", for none. ``crowded`` counts what found no row.
    """

    def __init__(self, trace: Trace, rules: Rules | None) -> None:
        self.trace, self.work = trace, trace.work
        self.classes = (rules or Rules()).classify(trace.work, trace.names, trace.sms)
        self.is_timeline = bool((trace.work.kind >= COMPUTE_SPAN).any())
        self._range = np.full(len(trace.work), NONE)
        if self.is_timeline:
            names = [_kind_of(name) for name in trace.names]
            of_row = trace.work.name
        else:
            phases = phases_of(trace, self.classes)
            names, of_row = list(phases.names), phases.rows
            self._range = of_row
        self.phases = tuple(dict.fromkeys(["", *names]))
        ids = {name: place for place, name in enumerate(self.phases)}
        table = np.array([*(ids[name] for name in names), 0], dtype=np.int64)
        self.phase = table[of_row]  # NONE takes the last, which is no phase
        self.crowded = 0

    def lanes(self, gpu: Exposure) -> Iterator[Lane]:
        """Those of one GPU, in its window: the unions, the phases, the streams."""
        start, end = gpu.start_ns, gpu.start_ns + round(gpu.window_us * 1000)
        work = self.work
        here = np.flatnonzero((work.device == gpu.device) & (work.start_ns <= end) & (work.end_ns >= start))
        starts, ends = work.start_ns[here].clip(start, end), work.end_ns[here].clip(start, end)
        yield from _unions(self.classes[here], starts, ends)
        yield from self._phase_lanes(here, starts, ends)
        for stream in np.unique(work.stream[here]).tolist():
            on = work.stream[here] == stream
            lane = Lane(
                "stream", self._stream(work, here[on], stream), starts[on], ends[on], here[on], self.phase[here[on]]
            )
            yield from self._in_rows(lane)

    def _phase_lanes(self, here: Ints, starts: Ints, ends: Ints) -> Iterator[Lane]:
        """Each range from the first to the last work launched in it."""
        annotated = self._range[here] != NONE
        ranges, place = np.unique(self._range[here][annotated], return_inverse=True)
        if not len(ranges):
            return
        begin, extent = np.full(len(ranges), np.iinfo(np.int64).max), np.zeros(len(ranges), dtype=np.int64)
        np.minimum.at(begin, place, starts[annotated])
        np.maximum.at(extent, place, ends[annotated])
        phase = np.zeros(len(ranges), dtype=np.int64)
        phase[place] = self.phase[here][annotated]
        order = np.lexsort((extent, begin))
        none = np.full(len(ranges), NONE)
        yield from self._in_rows(Lane("phase", "phases", begin[order], extent[order], none, phase[order]))

    def _in_rows(self, lane: Lane) -> Iterator[Lane]:
        place = rows_of(lane.start_ns, lane.end_ns, MOST_ROWS[lane.kind])
        self.crowded += int((place == NONE).sum())
        for row in range(int(place.max(initial=0)) + 1):
            yield replace(lane.rows(place == row), label="" if row else lane.label, whole=True)

    def _stream(self, work: GpuWork, rows: Ints, stream: int) -> str:
        if not self.is_timeline:
            return f"stream {stream}"
        return "communication" if (work.kind[rows] == COMMUNICATION_SPAN).any() else "compute"


def rows_of(start_ns: Ints, end_ns: Ints, most: int) -> Ints:
    """For intervals in the order of their starts the first row in which each is free of those before it.

    NONE where it would be a row beyond ``most``.

    Example:
        >>> import numpy as np
        >>> rows_of(np.array([0, 5, 6, 10]), np.array([10, 9, 8, 12]), most=2).tolist()
        [0, 1, -1, 0]
    """
    place = np.zeros(len(start_ns), dtype=np.int64)
    if len(start_ns) < 2 or (start_ns[1:] >= np.maximum.accumulate(end_ns)[:-1]).all():
        return place
    free: list[int] = []
    for index, (start, end) in enumerate(zip(start_ns.tolist(), end_ns.tolist(), strict=True)):
        row = next((row for row, until in enumerate(free) if until <= start), len(free))
        if row == len(free) and row < most:
            free.append(end)
        if row < most:
            free[row] = end
        place[index] = row if row < most else NONE
    return place


def _unions(classes: Ints, starts: Ints, ends: Ints) -> Iterator[Lane]:
    computes, talks = classes == COMPUTE, np.isin(classes, COMMUNICATION)
    compute, talk = Cover.of(starts[computes], ends[computes]), Cover.of(starts[talks], ends[talks])
    covers: tuple[tuple[LaneKind, Cover], ...] = (
        ("compute", compute),
        ("hidden", talk & compute),
        ("exposed", talk - compute),
    )
    for kind, cover in covers:
        none = np.full(len(cover), NONE)
        yield Lane(kind, kind, cover.start_ns, cover.end_ns, none, none + 1)


_KINDS = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward for input",
    Kind.W: "backward for weights",
    Kind.F_B: "forward & backward",
}


def _kind_of(name: str) -> str:
    """The phase of what stands on a timeline: the kind of its action."""
    try:
        return _KINDS[Action.parse(name).kind]
    except ScheduleError:
        return ""
