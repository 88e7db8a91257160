"""Which traces are of one rank, and one clock for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from counterflow.trace.alignment import Alignment, align
from counterflow.trace.messages import Message
from counterflow.trace.read import Trace


def of_ranks(traces: Sequence[Trace]) -> list[list[Trace]]:
    """The traces rank by rank, in the order in which ranks first occur; one that names no rank is alone.

    A profiler that records several cycles leaves several traces of a rank, all on one clock.
    """
    groups: dict[tuple[bool, int], list[Trace]] = {}
    for place, trace in enumerate(traces):
        key = (False, place) if trace.rank is None else (True, trace.rank)
        groups.setdefault(key, []).append(trace)
    return list(groups.values())


def rank_of(trace: Trace, place: int) -> int:
    """The rank that the trace names, else its place among the ranks."""
    return place if trace.rank is None else trace.rank


def align_ranks(said: Sequence[tuple[int, Trace, list[Message]]]) -> Alignment:
    """``align`` by ranks: of each trace the place of its rank, the trace, and its messages."""
    together: dict[int, list[Message]] = {}
    names = {place: rank_of(trace, place) for place, trace, _ in said}
    for place, _, messages in said:
        together.setdefault(place, []).extend(messages)
    ordered = [sorted(messages, key=lambda one: one.start_ns) for messages in together.values()]
    return align(ordered, [names[place] for place in together])
