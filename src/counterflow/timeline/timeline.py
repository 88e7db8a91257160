"""Who did what from when to when: one type for simulated and for measured time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from counterflow.errors import TimelineError
from counterflow.timeline.intervals import Ns, covered_ns

COMPUTE = "compute"
"""The lane on which a rank's actions stand."""
TWINS = "twins"
"""The lane on which a rank sums its gradients with those of its twins."""
TWINS_OF = "twins of stage {}"
"""How such a sum is named."""

_MOST_RANKS = 2**16
_FURTHEST_NS = 2**62  # int64 holds the difference of any two such times


class Span(NamedTuple):
    """One thing that a rank did: the view of one row of a Timeline."""

    rank: int
    name: str
    start_ns: int
    end_ns: int
    lane: str = COMPUTE

    @property
    def duration_ns(self) -> int:
        """How long it took."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True, eq=False)
class Timeline:
    """Spans in columns, sorted by rank, lane and time.

    Build one with ``from_spans``. ``rank``, ``start_ns`` and ``end_ns`` are int64 arrays of shape [spans];
    ``lane`` and ``name`` are int64 indices into the tables of text ``lanes`` and ``names``. Times are
    nanoseconds from any origin that all ranks share. Two timelines are equal when their spans are.

    Example:
        >>> from counterflow import Timeline
        >>> from counterflow.timeline import Span
        >>> timeline = Timeline.from_spans([Span(0, "0F0", 0, 5), Span(1, "1F0", 5, 9)])
        >>> timeline.makespan_ns, timeline.bubble_ns().tolist()
        (9, [4, 5])
    """

    rank: Ns
    start_ns: Ns
    end_ns: Ns
    lane: Ns
    name: Ns
    lanes: tuple[str, ...]
    names: Sequence[str]

    @classmethod
    def from_spans(cls, spans: Iterable[Span]) -> Timeline:
        """The timeline of these spans, in any order.

        Raises:
            TimelineError: a span that ends before it starts, a negative rank, or numbers that no pipeline has.
        """
        rows = sorted(spans, key=lambda span: (span.rank, span.lane, span.start_ns, span.end_ns, span.name))
        for span in rows:
            if span.rank >= _MOST_RANKS or max(abs(span.start_ns), abs(span.end_ns)) >= _FURTHEST_NS:
                raise TimelineError(
                    f"span {span.name!r} lies beyond rank {_MOST_RANKS - 1} or more than 146 years from its origin; "
                    "correct its rank and times (nanoseconds)"
                )
            if span.end_ns < span.start_ns or span.rank < 0:
                raise TimelineError(
                    f"span {span.name!r} of rank {span.rank} runs from {span.start_ns} to {span.end_ns} ns; "
                    "a span needs a rank from 0 and an end that is not before its start"
                )
        lanes = sorted({span.lane for span in rows})
        names = sorted({span.name for span in rows})
        lane_ids, name_ids = ({text: i for i, text in enumerate(table)} for table in (lanes, names))
        return cls(
            rank=_column(span.rank for span in rows),
            start_ns=_column(span.start_ns for span in rows),
            end_ns=_column(span.end_ns for span in rows),
            lane=_column(lane_ids[span.lane] for span in rows),
            name=_column(name_ids[span.name] for span in rows),
            lanes=tuple(lanes),
            names=tuple(names),
        )

    def __len__(self) -> int:
        return len(self.rank)

    def __iter__(self) -> Iterator[Span]:
        columns = zip(
            self.rank.tolist(),
            self.name.tolist(),
            self.start_ns.tolist(),
            self.end_ns.tolist(),
            self.lane.tolist(),
            strict=True,
        )
        for rank, name, start, end, lane in columns:
            yield Span(rank, self.names[name], start, end, self.lanes[lane])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Timeline):
            return NotImplemented
        return sorted(self) == sorted(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_ranks(self) -> int:
        """One more than the highest rank; a rank without spans counts."""
        return int(self.rank.max()) + 1 if len(self) else 0

    @property
    def makespan_ns(self) -> int:
        """From the first start to the last end."""
        return int(self.end_ns.max() - self.start_ns.min()) if len(self) else 0

    def busy_ns(self, lane: str = COMPUTE) -> Ns:
        """For each rank the time in which something ran on ``lane``, shape [ranks]."""
        on_lane = self._on(lane)
        rank, start_ns, end_ns = self.rank[on_lane], self.start_ns[on_lane], self.end_ns[on_lane]
        first = np.searchsorted(rank, np.arange(self.num_ranks + 1))
        spans = zip(first, first[1:], strict=False)
        return np.array([covered_ns(start_ns[one:end], end_ns[one:end]) for one, end in spans], dtype=np.int64)

    def bubble_ns(self) -> Ns:
        """For each rank the time in which it computed nothing, shape [ranks].

        Counted from the first action of the step to the last, of whichever rank.
        """
        actions = self._on(COMPUTE)
        step_ns = self.end_ns[actions].max() - self.start_ns[actions].min() if actions.any() else 0
        return step_ns - self.busy_ns()

    def _on(self, lane: str) -> npt.NDArray[np.bool_]:
        on_lane: npt.NDArray[np.bool_] = self.lane == (self.lanes.index(lane) if lane in self.lanes else -1)
        return on_lane


def _column(values: Iterable[int]) -> Ns:
    return np.fromiter(values, dtype=np.int64)
