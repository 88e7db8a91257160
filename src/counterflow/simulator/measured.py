"""What a timeline says about costs: how long its actions took, its twins' sums, and the way between two ranks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from counterflow.errors import ScheduleError, SimulatorError
from counterflow.schedule import Action, Kind
from counterflow.schedule.transfers import needs, produces
from counterflow.timeline import COMPUTE, TWINS, TWINS_OF, Span, Timeline

DURATIONS = {
    Kind.F: "forward_us",
    Kind.B: "backward_us",
    Kind.I: "input_us",
    Kind.W: "weight_us",
    Kind.F_B: "overlapped_us",
}
"""The field of ``Costs`` for each kind of action."""
_TWINS_OF = re.compile(TWINS_OF.format("([0-9]{1,6})"))


@dataclass(frozen=True)
class _Ran:
    """An action with its span; ``turn`` counts the actions of this name on its rank, for a timeline may have several
    steps, and ``after_ns`` is the end of the action ahead of it."""

    action: Action
    span: Span
    turn: int
    after_ns: int


def measured_costs(timeline: Timeline) -> dict[str, Any]:
    """The fields of ``Costs`` that can be read off ``timeline``, of one or several steps.

    For each kind and stage the median duration. For the sum over twins that of the rank that came to it last, for it
    did not wait. As latency the median time from the end of an action to the start of one that waited for
    what it made, on another rank; where messages take time on the wire, that is in it.

    Raises:
        SimulatorError: no span on the compute lane is named as an action.
    """
    ran = list(_actions(timeline))
    if not ran:
        raise SimulatorError(
            "the timeline has no span named as an action (such as 3F12), so no costs can be read from it; "
            "take one that counterflow simulated or its executor measured"
        )
    durations = defaultdict[tuple[Kind, int], list[int]](list)
    for one in ran:
        durations[one.action.kind, one.action.stage].append(one.span.duration_ns)
    num_stages = 1 + max(part.stage for one in ran for part in one.action.parts)
    found: dict[str, Any] = {}
    for kind, name in DURATIONS.items():
        column = tuple(_median_us(durations.get((kind, stage))) for stage in range(num_stages))
        if any(value is not None for value in column):
            found[name] = column
    if sums := _sums_of_twins(timeline):
        found["twins_us"] = tuple(sums.get(stage, 0.0) for stage in range(num_stages))
    found["latency_us"] = _median_us(_latencies(ran, num_stages)) or 0.0
    return found


def _actions(timeline: Timeline) -> Iterator[_Ran]:
    turns = Counter[tuple[int, str]]()
    rank, after_ns = -1, 0
    for span in timeline:
        if span.lane != COMPUTE:
            continue
        if span.rank != rank:
            rank, after_ns = span.rank, span.start_ns
        try:
            action = Action.parse(span.name)
        except ScheduleError:
            continue
        yield _Ran(action, span, turns[rank, span.name], after_ns)
        turns[rank, span.name] += 1
        after_ns = max(after_ns, span.end_ns)


def _latencies(ran: list[_Ran], num_stages: int) -> list[int]:
    """From the last end of what an action waited for to its start, wherever its rank had nothing else to do."""
    made = {
        (produces(part), part.stage, part.microbatch, one.turn): one.span for one in ran for part in one.action.parts
    }
    found = []
    for one in ran:
        needed = [(need, part.microbatch) for part in one.action.parts if (need := needs(part, num_stages))]
        makers = [made.get((*need, microbatch, one.turn)) for need, microbatch in needed]
        ends = [maker.end_ns for maker in makers if maker is not None and maker.rank != one.span.rank]
        if ends and one.after_ns <= max(ends) <= one.span.start_ns:
            found.append(one.span.start_ns - max(ends))
    return found


def _sums_of_twins(timeline: Timeline) -> dict[int, float]:
    """For each stage the median over the steps of its shortest sum, in microseconds."""
    sums = defaultdict[int, dict[int, list[int]]](lambda: defaultdict(list))
    for span in timeline:
        if span.lane == TWINS and (match := _TWINS_OF.fullmatch(span.name)):
            sums[int(match[1])][span.rank].append(span.duration_ns)
    shortest = {stage: list(map(min, zip(*holders.values(), strict=False))) for stage, holders in sums.items()}
    return {stage: median(durations) / 1000 for stage, durations in shortest.items()}


def _median_us(durations_ns: list[int] | None) -> float | None:
    return median(durations_ns) / 1000 if durations_ns else None
