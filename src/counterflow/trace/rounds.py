"""Where a step begins and ends on a rank: its actions, recorded for several steps, cut into whole rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from counterflow.schedule import Action, Kind
from counterflow.trace.ranges import Ran

Stretch = tuple[int, int]
"""A step's actions: from the first up to, and without, the second index."""

_BEFORE = {Kind.F: None, Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I}
"""What a stage has to have done last for a micro-batch before each kind of action."""


class RankRow(NamedTuple):
    """What a rank did; ``place`` is that of its clock among the ranks, and ``file`` says where it stands."""

    place: int
    rank: int
    file: str
    ran: tuple[Ran, ...]

    def shifted(self, offset_ns: int) -> RankRow:
        """On a clock that is so much behind."""
        if not offset_ns:
            return self
        moved = (one._replace(start_ns=one.start_ns - offset_ns, end_ns=one.end_ns - offset_ns) for one in self.ran)
        return self._replace(ran=tuple(moved))


def actions_of(ran: Sequence[Ran]) -> tuple[Action, ...]:
    """The row that they are."""
    return tuple(one.action for one in ran)


def commonest(rows: Sequence[Sequence[Ran]]) -> tuple[Action, ...]:
    """The row that occurs most often among those that train, else among all."""
    counts = Counter(map(actions_of, rows))
    return max(counts.items(), key=lambda entry: (_trains(entry[0]), entry[1]))[0]


def whole_rows(ran: Sequence[Ran]) -> list[tuple[Ran, ...]]:
    """The steps of a rank that were recorded as a whole, all of the same row: the one that occurs most often.

    A step's actions come once each, every backward behind its own forward. The last rank's row may read the same from
    any of its micro-batches on; then a step begins at the lowest one of its stage, and where several do, where the rank
    idled longest before it. Steps of forwards alone (evaluation) count only where no other step is whole.

    Example:
        >>> texts = "1B2 1F0 1B0 1F1 1B1 1F2 1B2 1F0 1B0 1F1 1B1 1F2 1B2 1F0".split()
        >>> ran = [Ran(Action.parse(text), time, time + 1, time) for time, text in enumerate(texts)]
        >>> [(row[0].start_ns, len(row)) for row in whole_rows(ran)]
        [(1, 6), (7, 6)]
    """
    best: list[Stretch] = []
    score = (False, 0, 0)
    for first in _beginnings(ran):
        rows = list(_rows_from(ran, first))
        if not rows:
            continue
        usual = commonest([ran[begin:end] for begin, end in rows])
        chosen = [(begin, end) for begin, end in rows if actions_of(ran[begin:end]) == usual]
        gaps = sum(ran[begin].start_ns - ran[begin - 1].end_ns for begin, _ in chosen if begin)
        found = (_trains(usual), len(usual) * len(chosen), gaps)
        if found > score:
            best, score = chosen, found
    return [tuple(ran[begin:end]) for begin, end in best]


def _beginnings(ran: Sequence[Ran]) -> list[int]:
    """Where the first step may begin: at a forward, of the lowest micro-batch of its stage where there is one."""
    lowest: dict[int, int] = {}
    for one in ran:
        part = one.action.parts[0]
        if part.kind is Kind.F:
            lowest[part.stage] = min(lowest.get(part.stage, part.microbatch), part.microbatch)
    seen = set[Action]()
    forwards, low = [], []
    for index, one in enumerate(ran):
        if one.action in seen:
            break
        seen.add(one.action)
        part = one.action.parts[0]
        if part.kind is Kind.F:
            forwards.append(index)
            if part.microbatch == lowest[part.stage]:
                low.append(index)
    return low or forwards


def _rows_from(ran: Sequence[Ran], at: int) -> Iterator[Stretch]:
    while at < len(ran):
        end, following = _row_end(ran, at)
        if end > at:
            yield at, end
        at = following


def _row_end(ran: Sequence[Ran], begin: int) -> Stretch:
    """The end of the longest whole row that begins here, ``begin`` itself where there is none; and where to go on."""
    state: dict[tuple[int, int], Kind] = {}
    unfinished, whole = 0, begin
    trains = False
    for index in range(begin, len(ran)):
        for part in ran[index].action.parts:
            key = part.stage, part.microbatch
            before = state.get(key)
            if before is not _BEFORE[part.kind]:
                if part.kind is Kind.F and not trains:  # a forward again ends a step of forwards alone
                    return index, index
                # What a backward lacks from here on it lacks from any later action on.
                orphan = part.kind is not Kind.F
                return whole, max(whole, index + 1 if orphan and whole == begin else begin + 1)
            state[key] = part.kind
            unfinished += (part.kind is Kind.F) - (part.kind in (Kind.B, Kind.W))
            trains |= part.kind is not Kind.F
        if trains and not unfinished:
            whole = index + 1
    end = whole if trains else len(ran)
    return end, max(end, begin + 1)


def _trains(row: tuple[Action, ...]) -> bool:
    return any(part.kind is not Kind.F for action in row for part in action.parts)
