"""Figures of each phase: how long it computed and communicated, and what hid its communication."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from counterflow.trace.columns import Ints
from counterflow.trace.cover import BLOCK, Cover, blocks
from counterflow.trace.figures import Hiding, Phase, Share
from counterflow.trace.hiding import hidden_under, owned
from counterflow.trace.parts import part_of
from counterflow.trace.phases import NONE
from counterflow.trace.rules import function_of
from counterflow.trace.window import Bools, Window, sums, us


def phase_figures(window: Window) -> list[Phase]:
    """In the order in which they first appear."""
    told = np.flatnonzero((window.phase_rows >= 0) & window.lasts)
    if not len(told):
        return []
    told = told[np.argsort(window.phase_rows[told], kind="stable")]
    first = np.flatnonzero(np.diff(window.phase_rows[told], prepend=NONE))
    known: dict[str, list[int]] = {}
    for some in np.split(first, np.flatnonzero(np.diff(first // BLOCK)) + 1):  # a range's work is not parted
        past = np.searchsorted(first, some[-1], side="right")
        here = told[some[0] : first[past] if past < len(first) else len(told)]
        for row, *times in _range_figures(window, here):
            so_far = known.setdefault(window.phases.names[row], [0, 0, 0, 0, 0])
            so_far[:] = [a + b for a, b in zip(so_far, (1, *times), strict=True)]
    return [_phase(name, count, times) for name, (count, *times) in known.items()]


def _range_figures(window: Window, told: Ints) -> Iterator[tuple[int, ...]]:
    """For each range its row, compute, communication, exposed and other time; the work is sorted by range."""
    start, end = window.work.start_ns[told], window.work.end_ns[told]
    rows, first = np.unique(window.phase_rows[told], return_index=True)
    # The work of each range is moved to a time of its own, so that one union serves all ranges.
    begin, extent = np.minimum.reduceat(start, first), np.maximum.reduceat(end, first)
    extent -= begin
    own = np.cumsum(extent + 1) - extent - 1
    moved = np.repeat(own - begin, np.diff(first, append=len(told)))
    start += moved
    end += moved
    talks, computes = window.communicates[told], window.computes[told]
    compute, talk, rest = (Cover.of(start, end, which) for which in (computes, talks, ~computes & ~talks))
    totals = [cover.within_ns(own, own + extent) for cover in (compute, talk, rest)]
    home = np.searchsorted(own, talk.start_ns, side="right") - 1
    back = begin[home] - own[home]
    exposed = sums(home, window.exposed.within_ns(talk.start_ns + back, talk.end_ns + back), len(rows))
    yield from zip(*(column.tolist() for column in (rows, totals[0], totals[1], exposed, totals[2])), strict=True)


def _phase(name: str, count: int, times: list[int]) -> Phase:
    compute, talk, exposed, rest = map(us, times)
    part, direction = part_of(name) or ("", "")
    return Phase(name, count, compute, talk, exposed, rest, part, direction)


def hiding_figures(window: Window) -> Iterator[Hiding]:
    """Each kind of communication and the compute that hides it, in the order in which they first appear."""
    kinds = [(name, window.cover(talks), Counter[int]()) for name, talks in _communication(window)]
    columns = _Names(window)
    until = window.start
    for some in blocks(len(window.work)):
        rows = some.start + np.flatnonzero((window.computes & window.lasts)[some])
        which, start, end = owned(window.work.start_ns[rows], window.work.end_ns[rows], until)
        used, place = np.unique(columns.of(rows)[which], return_inverse=True)
        until = int(end[-1]) if len(end) else until
        for _, talk, hidden in kinds:
            under = hidden_under(talk, place, start, end, len(used))
            hidden.update(dict(zip(used.tolist(), under.tolist(), strict=True)))
    names = columns.known
    for name, talk, hidden in kinds:
        shares = tuple(Share(names[place], us(ns)) for place, ns in sorted(hidden.items()) if ns)
        yield Hiding(name, us(talk.total_ns), us(talk.total_ns - hidden.total()), shares)


class _Names:
    """The names of phases, ``known`` in the order in which they first appear; "" is that of work without one."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._places: dict[str, int] = {}

    @property
    def known(self) -> list[str]:
        return list(self._places)

    def of(self, which: Ints) -> Ints:
        """For each of these pieces the place of its phase's name among those known."""
        rows, first, place = np.unique(self._window.phase_rows[which], return_index=True, return_inverse=True)
        of_row = np.zeros(len(rows), dtype=np.int64)
        for row in np.argsort(first).tolist():
            name = self._window.phases.names[rows[row]] if rows[row] != NONE else ""
            of_row[row] = self._places.setdefault(name, len(self._places))
        return of_row[place]


def _communication(window: Window) -> Iterator[tuple[str, Bools]]:
    """What communicates, by its phase, or by its kernel's function where it has none."""
    talks = np.flatnonzero(window.communicates & window.lasts)
    names = _Names(window)
    place = names.of(talks)
    functions = {name: function_of(window.trace.names[name]) for name in np.unique(window.work.name[talks]).tolist()}
    for number, phase in enumerate(names.known):
        rows = talks[place == number]
        if phase:
            yield phase, _only(window, rows)
            continue
        of = [functions[name] for name in window.work.name[rows].tolist()]
        for function in dict.fromkeys(of):
            yield function, _only(window, rows[[one == function for one in of]])


def _only(window: Window, rows: Ints) -> Bools:
    which = np.zeros(len(window.work), dtype=bool)
    which[rows] = True
    return which
