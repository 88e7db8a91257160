"""Figures of each phase: how long it computed and communicated, and what hid its communication."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from counterflow.trace.columns import Ints
from counterflow.trace.cover import Cover
from counterflow.trace.figures import Hiding, Phase, Share
from counterflow.trace.hiding import hidden_under, owned
from counterflow.trace.parts import part_of
from counterflow.trace.rules import function_of
from counterflow.trace.window import Bools, Window, sums, us


def phase_figures(window: Window) -> list[Phase]:
    """In the order in which they first appear."""
    told = np.flatnonzero((window.phase_rows >= 0) & window.lasts)
    if not len(told):
        return []
    told = told[np.argsort(window.phase_rows[told], kind="stable")]
    start, end = window.work.start_ns[told], window.work.end_ns[told]
    rows, first = np.unique(window.phase_rows[told], return_index=True)
    # The work of each range is moved to a time of its own, so that one union serves all ranges.
    begin, extent = np.minimum.reduceat(start, first), np.maximum.reduceat(end, first)
    extent -= begin
    own = np.cumsum(extent + 1) - extent - 1
    moved = np.repeat(own - begin, np.diff(first, append=len(told)))
    talks, computes = window.communicates[told], window.computes[told]
    compute, talk, rest = (
        Cover.of((start + moved)[which], (end + moved)[which]) for which in (computes, talks, ~computes & ~talks)
    )
    totals = [cover.within_ns(own, own + extent) for cover in (compute, talk, rest)]
    home = np.searchsorted(own, talk.start_ns, side="right") - 1
    back = begin[home] - own[home]
    exposed = sums(home, window.exposed.within_ns(talk.start_ns + back, talk.end_ns + back), len(rows))
    known: dict[str, list[int]] = {}
    figures = (column.tolist() for column in (totals[0], totals[1], exposed, totals[2]))
    for row, *times in zip(rows.tolist(), *figures, strict=True):
        so_far = known.setdefault(window.phases.names[row], [0, 0, 0, 0, 0])
        so_far[:] = [a + b for a, b in zip(so_far, (1, *times), strict=True)]
    return [_phase(name, count, times) for name, (count, *times) in known.items()]


def _phase(name: str, count: int, times: list[int]) -> Phase:
    compute, talk, exposed, rest = map(us, times)
    part, direction = part_of(name) or ("", "")
    return Phase(name, count, compute, talk, exposed, rest, part, direction)


def hiding_figures(window: Window) -> Iterator[Hiding]:
    """Each kind of communication and the compute that hides it, in the order in which they first appear."""
    compute = np.flatnonzero(window.computes & window.lasts)
    columns, column = _phases_of(window, compute)
    which, start, end = owned(window.work.start_ns[compute], window.work.end_ns[compute])
    for name, talks in _communication(window):
        talk = window.cover(talks)
        hidden = hidden_under(talk, column[which], start, end, len(columns)).tolist()
        under = tuple(Share(phase, us(ns)) for phase, ns in zip(columns, hidden, strict=True) if ns)
        yield Hiding(name, us(talk.total_ns), us(talk.total_ns - sum(hidden)), under)


def _phases_of(window: Window, which: Ints) -> tuple[list[str], Ints]:
    """The names of the phases of these pieces, as they first appear, and for each piece the place of its own."""
    places: dict[str, int] = {}
    names = ["", *window.phases.names]
    rows, place = np.unique(window.phase_rows[which], return_inverse=True)
    first = np.full(len(rows), len(which), dtype=np.int64)
    np.minimum.at(first, place, np.arange(len(which)))
    of_row = np.zeros(len(rows), dtype=np.int64)
    for row in np.argsort(first, kind="stable").tolist():
        of_row[row] = places.setdefault(names[int(rows[row]) + 1], len(places))
    return list(places), of_row[place] if len(rows) else place.astype(np.int64)


def _communication(window: Window) -> Iterator[tuple[str, Bools]]:
    """What communicates, by its phase, or by its kernel's function where it has none."""
    talks = np.flatnonzero(window.communicates & window.lasts)
    phases, place = _phases_of(window, talks)
    functions = {name: function_of(window.trace.names[name]) for name in np.unique(window.work.name[talks]).tolist()}
    for number, phase in enumerate(phases):
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
