"""Sets of time: disjoint half-open intervals in order, in columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import Ints

Bools = npt.NDArray[np.bool_]

BLOCK = 1 << 15
"""So many rows are worked on at once: what is needed beside long columns stays small."""


def blocks(rows: int) -> Iterator[slice]:
    """The rows, a block after another."""
    return (slice(at, at + BLOCK) for at in range(0, rows, BLOCK))


@dataclass(frozen=True, eq=False)
class Cover:
    """The instants covered by at least one of some intervals; ``start_ns`` and ``end_ns`` are int64 [pieces].

    Example:
        >>> import numpy as np
        >>> a = Cover.of(np.array([0, 5, 20]), np.array([10, 12, 20]))
        >>> a.start_ns.tolist(), a.end_ns.tolist(), a.total_ns
        ([0], [12], 12)
        >>> b = Cover.of(np.array([3]), np.array([4]))
        >>> (a - b).start_ns.tolist(), (a & b).total_ns, (a | b).total_ns
        ([0, 4], 1, 12)
    """

    start_ns: Ints
    end_ns: Ints

    @classmethod
    def of(cls, start_ns: Ints, end_ns: Ints, which: Bools | None = None) -> Cover:
        """The union, of those that ``which`` chooses; intervals without length cover nothing, touching ones are one."""
        if (start_ns[1:] < start_ns[:-1]).any():
            order = np.argsort(start_ns, kind="stable")
            start_ns, end_ns, which = start_ns[order], end_ns[order], None if which is None else which[order]
        parts = []
        last = np.zeros((2, 0), dtype=np.int64)  # the piece that what comes next may touch
        for some in blocks(len(start_ns)):
            real = end_ns[some] > start_ns[some]
            real = real if which is None else real & which[some]
            start, end = np.append(last[0], start_ns[some][real]), np.append(last[1], end_ns[some][real])
            if len(start):
                reach = np.maximum.accumulate(end)
                new = np.flatnonzero(start[1:] > reach[:-1]) + 1
                pieces = np.stack([start[np.append(0, new)], reach[np.append(new - 1, len(reach) - 1)]])
                parts.append(pieces[:, :-1])
                last = pieces[:, -1:]
        return cls(*np.concatenate([*parts, last], axis=1))

    @property
    def total_ns(self) -> int:
        """How long it is."""
        return int((self.end_ns - self.start_ns).sum())

    def __len__(self) -> int:
        return len(self.start_ns)

    def __or__(self, other: Cover) -> Cover:
        return Cover.of(np.concatenate([self.start_ns, other.start_ns]), np.concatenate([self.end_ns, other.end_ns]))

    def __and__(self, other: Cover) -> Cover:
        return self._where(other, within=True)

    def __sub__(self, other: Cover) -> Cover:
        return self._where(other, within=False)

    def within_ns(self, start_ns: Ints, end_ns: Ints) -> Ints:
        """How much of it lies in each of these intervals, shape [intervals]."""
        done = np.concatenate([[0], np.cumsum(self.end_ns - self.start_ns)])
        within = np.zeros(len(start_ns), dtype=np.int64)
        for some in blocks(len(within) if len(self) else 0):
            within[some] = self._before(end_ns[some], done) - self._before(start_ns[some], done)
        return within

    def holds(self, times: Ints) -> Bools:
        """Whether it covers each of these instants."""
        begun = np.searchsorted(self.start_ns, times, side="right")
        ended = np.searchsorted(self.end_ns, times, side="right")
        return np.asarray(begun > ended)

    def _before(self, times: Ints, done: Ints) -> Ints:
        """How much of it lies before each of these instants; ``done`` is what lies before each piece."""
        piece = np.searchsorted(self.start_ns, times, side="right") - 1
        last = np.maximum(piece, 0)
        partly = np.clip(times - self.start_ns[last], 0, self.end_ns[last] - self.start_ns[last])
        return np.where(piece < 0, 0, done[last] + partly)

    def _where(self, other: Cover, within: bool) -> Cover:
        size = max(1, BLOCK * len(self) // (len(self) + len(other) or 1))
        parts = [self._part(at, size)._cut(other, within) for at in range(0, len(self), size)]
        starts, ends = ([getattr(part, name) for part in parts] or [self.start_ns] for name in ("start_ns", "end_ns"))
        return Cover(np.concatenate(starts), np.concatenate(ends))

    def _part(self, at: int, size: int) -> Cover:
        return Cover(self.start_ns[at : at + size], self.end_ns[at : at + size])

    def _cut(self, other: Cover, within: bool) -> Cover:
        """As ``_where``, of a few pieces: only those of the other that they may meet are looked at."""
        first = int(np.searchsorted(other.end_ns, self.start_ns[0], side="right"))
        other = other._part(first, int(np.searchsorted(other.start_ns, self.end_ns[-1])) - first)
        times = np.sort(np.concatenate([self.start_ns, self.end_ns, other.start_ns, other.end_ns]))
        left = times[:-1]
        kept = self.holds(left) & (other.holds(left) == within)
        return Cover.of(left[kept], times[1:][kept])
