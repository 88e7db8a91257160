"""Sets of time: disjoint half-open intervals in order, in columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from counterflow.trace.columns import Ints


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
    def of(cls, start_ns: Ints, end_ns: Ints) -> Cover:
        """The union; intervals without length cover nothing, and touching ones are one piece."""
        real = end_ns > start_ns
        start, end = start_ns[real], end_ns[real]
        if not len(start):
            return cls(start, end)
        order = np.argsort(start, kind="stable")
        start, reach = start[order], np.maximum.accumulate(end[order])
        new = np.flatnonzero(start[1:] > reach[:-1]) + 1
        return cls(start[np.concatenate([[0], new])], reach[np.concatenate([new - 1, [len(reach) - 1]])])

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
        return np.asarray(self._before(end_ns) - self._before(start_ns))

    def holds(self, times: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether it covers each of these instants."""
        begun = np.searchsorted(self.start_ns, times, side="right")
        ended = np.searchsorted(self.end_ns, times, side="right")
        return np.asarray(begun > ended)

    def _before(self, times: Ints) -> Ints:
        """How much of it lies before each of these instants."""
        if not len(self):
            return np.zeros(len(times), dtype=np.int64)
        done = np.concatenate([[0], np.cumsum(self.end_ns - self.start_ns)])
        piece = np.searchsorted(self.start_ns, times, side="right") - 1
        last = np.maximum(piece, 0)
        partly = np.clip(times - self.start_ns[last], 0, self.end_ns[last] - self.start_ns[last])
        return np.where(piece < 0, 0, done[last] + partly)

    def _where(self, other: Cover, within: bool) -> Cover:
        times = np.sort(np.concatenate([self.start_ns, self.end_ns, other.start_ns, other.end_ns]))
        left = times[:-1]
        kept = self.holds(left) & (other.holds(left) == within)
        return Cover.of(left[kept], times[1:][kept])
