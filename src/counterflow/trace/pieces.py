"""Each exposed piece of communication: what ran in it, what came next, and whether that had waited."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from counterflow.trace.blocking import BLOCKING, UNCLEAR, WAITED, waited_for
from counterflow.trace.columns import Ints
from counterflow.trace.figures import Piece
from counterflow.trace.rules import TRANSFER
from counterflow.trace.window import Window, us

MOST_PIECES = 1_000
"""So many exposed pieces are told one by one, the longest; long traces have hundreds of thousands."""


class Pieces:
    """The exposed pieces of one window."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.start, self.end = window.exposed.start_ns, window.exposed.end_ns
        self.compute = np.flatnonzero(window.computes & window.lasts).astype(np.int32)
        self.waited = self._waited()

    def lasting_ns(self, *kinds: int) -> int:
        """How long the pieces are that these came of, which index ``WAITED``."""
        return int((self.end - self.start)[np.isin(self.waited, kinds)].sum())

    @property
    def blocking_ns(self) -> int:
        """How long compute waited."""
        return self.lasting_ns(BLOCKING)

    @property
    def not_blocking_ns(self) -> int:
        """How long it surely did not."""
        return self.lasting_ns(*(kind for kind in range(len(WAITED)) if kind not in (BLOCKING, UNCLEAR)))

    def longest(self) -> Iterator[Piece]:
        """The longest first."""
        work = self.window.work
        talk = np.flatnonzero(self.window.communicates & self.window.lasts)
        chosen = np.lexsort((self.start, self.start - self.end))[:MOST_PIECES]
        starts, ends = self.start[chosen], self.end[chosen]
        first = np.searchsorted(np.maximum.accumulate(work.end_ns[talk]), starts, side="right")
        past = np.searchsorted(work.start_ns[talk], ends, side="left")
        following = self._following(ends)
        columns = (c.tolist() for c in (starts, ends, first, past, following, self.waited[chosen]))
        for start, end, one, stop, then, waited in zip(*columns, strict=True):
            rows = [row for row in talk[one:stop].tolist() if work.end_ns[row] > start]
            next_row = int(self.compute[then]) if then < len(self.compute) else None
            yield Piece(
                us(start - self.window.start),
                us(end - start),
                tuple(dict.fromkeys(self.window.name(row) for row in rows)),
                tuple(dict.fromkeys(filter(None, map(self.window.phase, rows)))),
                "" if next_row is None else self.window.name(next_row),
                "" if next_row is None else self.window.phase(next_row),
                WAITED[waited],
            )

    def _following(self, times: Ints) -> Ints:
        """For each time the place, among all compute, of what starts first from then on; behind the last if none."""
        return np.searchsorted(self.compute, np.searchsorted(self.window.work.start_ns, times).astype(np.int32))

    def _waited(self) -> Ints:
        window = self.window
        launches = window.trace.launches
        following = np.unique(self._following(self.end))
        compute = self.compute[following[following < len(self.compute)]]  # all other compute matters nothing
        launch = window.launch[compute]
        called = np.where(launch >= 0, launches.end_ns[launch], -1) if len(launches) else launch
        return waited_for(
            window.exposed,
            window.communication,
            np.sort(window.work.end_ns[(window.classes == TRANSFER) & window.lasts]),
            window.work.start_ns[compute],
            called,
        )
