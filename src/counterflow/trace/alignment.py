"""Ranks side by side: one clock for all traces, and who comes last to what they do together.

A collective ends on all its ranks at once, as nearly as anything does: data has to have come from everyone. So the
ends of the collectives that two traces share tell how far their clocks are apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import Ints
from counterflow.trace.messages import Message

MOST_SHIFT = 64
"""A profile may start or stop so many collectives of a kind before that of another rank."""
CONSISTENT = 0.5
"""A straggler comes last to more than this part of the collectives of a kind."""
ONE_WAY = 0.75
"""A clock is ahead if so large a part of the ends says so; else the ends just differ, and the clocks are one."""
LEAST = 3
"""Fewer collectives tell neither what is usual nor how exact it is."""


@dataclass(frozen=True)
class Straggler:
    """``rank`` came last to ``late`` of ``count`` collectives ``name`` of ``group``, later than clocks are apart.

    ``waited_us`` is how long the others waited for it, summed over them and over these collectives, and ``most_us`` the
    longest that one of them waited for it once.
    """

    rank: int
    name: str
    group: str
    late: int
    count: int
    waited_us: float
    most_us: float


@dataclass(frozen=True)
class Alignment:
    """How far the clocks of ranks are apart: subtract ``offsets_us[index]`` from the times of the ``index``-th.

    ``basis`` says where it comes from: "collectives", "actions" (see ``measured_pipeline``) or "none", where all
    clocks are taken as they are. ``shared`` counts the collectives that at least two ranks recorded. ``error_us`` is
    what remains: half of all shared collectives end within it, on clocks that are put right; None where nothing tells.
    ``apart`` names those (by index) that share none with the first; their clocks are taken as they are.
    """

    offsets_us: tuple[float, ...]
    error_us: float | None
    shared: int
    basis: str
    apart: tuple[int, ...] = ()
    stragglers: tuple[Straggler, ...] = ()

    @property
    def offsets_ns(self) -> Ints:
        """As ``offsets_us``, shape [traces]."""
        return np.array([round(us * 1000) for us in self.offsets_us], dtype=np.int64)

    @classmethod
    def none(cls, count: int) -> Alignment:
        """Clocks as they are."""
        return cls((0.0,) * count, None, 0, "none")


class _Kind(NamedTuple):
    """Collectives that belong together: one call, in one process group."""

    name: str
    group: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Shared:
    """The collectives of a kind that these traces share, one column for each: [traces, collectives] in nanoseconds."""

    kind: _Kind
    members: list[int]
    start_ns: Ints
    end_ns: Ints


def align(said: Sequence[Sequence[Message]], ranks: Sequence[int] | None = None) -> Alignment:
    """One clock for traces by what their ranks said, ``said[index]``; ``ranks`` name them to the user.

    Matching collectives are those of one process group and call, by the number that newer traces give them, else by
    their order; where one trace has more of them, the shift fits best under which their ends lie closest. Between
    two traces the offset is the median over all that they share, which a few late ends do not move; where ends
    differ now one way and now the other the clocks are taken as one.

    Example:
        >>> def ends(*times):
        ...     return [Message("all_reduce", "", (), time - 5, time, None, True) for time in times]
        >>> align([ends(10_000, 25_000, 31_000), ends(17_000, 32_000, 38_000)]).offsets_us
        (0.0, 7.0)
    """
    count = len(said)
    names = list(range(count)) if ranks is None else list(ranks)
    shared = list(_shared([[one for one in messages if one.is_collective] for messages in said]))
    if not shared:
        return Alignment.none(count)
    offsets, apart = _offsets(count, shared)
    spreads = np.concatenate([np.ptp(one.end_ns - offsets[one.members, None], axis=0) for one in shared])
    error_ns = float(np.median(spreads))
    return Alignment(
        tuple(float(ns) / 1000 for ns in offsets),
        error_ns / 1000 if len(spreads) >= LEAST else None,
        len(spreads),
        "collectives",
        apart,
        tuple(_stragglers(shared, offsets, error_ns, names)),
    )


def _shared(said: list[list[Message]]) -> Iterator[_Shared]:
    kinds: dict[_Kind, dict[int, list[Message]]] = defaultdict(dict)
    for index, messages in enumerate(said):
        for one in messages:
            kinds[_Kind(one.name, one.group, one.ranks)].setdefault(index, []).append(one)
    for kind, held in kinds.items():
        if len(held) < 2:
            continue
        columns = _numbered(held) if all(m.sequence >= 0 for some in held.values() for m in some) else _ordered(held)
        members = list(held)
        start, end = (np.array([[m[part] for m in columns[i]] for i in members], dtype=np.int64) for part in (3, 4))
        if end.shape[1]:
            yield _Shared(kind, members, start, end)


def _numbered(held: Mapping[int, list[Message]]) -> dict[int, list[Message]]:
    """The collectives whose numbers all members have."""
    known = {index: {one.sequence: one for one in some} for index, some in held.items()}
    common = sorted(set.intersection(*(set(some) for some in known.values())))
    return {index: [some[number] for number in common] for index, some in known.items()}


def _ordered(held: Mapping[int, list[Message]]) -> dict[int, list[Message]]:
    """One behind the other; a trace that has more is shifted against the shortest one."""
    least = min(held.values(), key=len)
    ends = np.array([one.end_ns for one in least], dtype=np.int64)
    found = {}
    for index, some in held.items():
        own = np.array([one.end_ns for one in some], dtype=np.int64)
        shifts = range(min(len(own) - len(ends), MOST_SHIFT) + 1)
        best = min(shifts, key=lambda shift: _spread(own[shift : shift + len(ends)] - ends))
        found[index] = some[best : best + len(ends)]
    return found


def _spread(differences: Ints) -> float:
    return float(np.median(np.abs(differences - np.median(differences))))


def _offsets(count: int, shared: list[_Shared]) -> tuple[Ints, tuple[int, ...]]:
    """Along a tree of the pairs whose ends differ most evenly."""
    pairs = defaultdict[tuple[int, int], list[Ints]](list)
    for one in shared:
        for (row, a), (other, b) in combinations(enumerate(one.members), 2):
            pairs[a, b].append(one.end_ns[other] - one.end_ns[row])
    edges = []
    for (a, b), parts in pairs.items():
        differences = np.concatenate(parts)
        offset = round(float(np.median(differences)))
        one_way = (np.sign(differences) == np.sign(offset)).mean() >= ONE_WAY
        edges.append((_spread(differences), -len(differences), a, b, offset if one_way else 0))
    group, offsets = np.arange(count), np.zeros(count, dtype=np.int64)
    for _, _, a, b, offset in sorted(edges):
        if group[a] != group[b]:
            moved = group == group[b]
            offsets[moved] += offsets[a] + offset - offsets[b]
            group[moved] = group[a]
    for one in np.unique(group).tolist():
        members = np.flatnonzero(group == one)
        offsets[members] -= offsets[members[0]]
    return offsets, tuple(np.flatnonzero(group != group[0]).tolist())


def _stragglers(shared: list[_Shared], offsets: Ints, error_ns: float, names: list[int]) -> Iterator[Straggler]:
    found = []
    for one in shared:
        starts = one.start_ns - offsets[one.members, None]
        last, final = starts.argmax(axis=0), starts.max(axis=0)
        second = np.partition(starts, -2, axis=0)[-2]
        late: npt.NDArray[np.bool_] = final - second > error_ns
        for row, index in enumerate(one.members):
            own = late & (last == row)
            if len(final) >= LEAST and own.sum() > CONSISTENT * len(final):
                waited = final[own] - starts[:, own]
                total, most = int(waited.sum()) / 1000, int(waited.max()) / 1000
                kind = one.kind
                found.append(Straggler(names[index], kind.name, kind.group, int(own.sum()), len(final), total, most))
    return iter(sorted(found, key=lambda one: (-one.waited_us, one.rank)))
