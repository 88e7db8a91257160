"""For whom did a rank wait? The idle stretches of a step, each laid to the rank that kept it waiting."""

from __future__ import annotations

from typing import NamedTuple

from counterflow.report.gaps import gaps
from counterflow.report.step import Step
from counterflow.schedule import Action, Schedule
from counterflow.timeline import Timeline


class Wait(NamedTuple):
    """``rank`` stood idle before ``action`` for what ``part`` made on rank ``peer``.

    ``waited_ns`` of that passed while the peer was not done with it. The other ``arriving_ns`` are the transfer, and
    what ranks do between actions.
    """

    rank: int
    action: Action
    peer: int
    part: Action
    start_ns: int
    waited_ns: int
    arriving_ns: int


def waits(schedule: Schedule, timeline: Timeline) -> list[Wait]:
    """The waits of all ranks for others, the longest first; an idle stretch that waits for no other rank is none.

    Of several things that an action needs the one made last counts.

    Raises:
        ReportError: the timeline does not hold exactly the actions of the schedule.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> schedule = one_f_one_b(2, 1)
        >>> for wait in waits(schedule, simulate(schedule, Costs(latency_us=0.5))):
        ...     print(wait.rank, wait.action, wait.peer, wait.part, wait.waited_ns, wait.arriving_ns)
        0 0B0 1 1B0 3500 500
        1 1F0 0 0F0 1000 500
    """
    found = []
    for gap in gaps(Step(schedule, timeline)):
        others = [one for one in gap.waits_for if one.rank != gap.rank]
        if gap.before is None or not others:
            continue
        last = others[0]
        waited_ns = max(0, min(last.end_ns, gap.end_ns) - gap.start_ns)
        arriving_ns = gap.end_ns - gap.start_ns - waited_ns
        found.append(Wait(gap.rank, gap.before, last.rank, last.part, gap.start_ns, waited_ns, arriving_ns))
    return sorted(found, key=lambda one: (-one.waited_ns - one.arriving_ns, one.rank, one.start_ns))
