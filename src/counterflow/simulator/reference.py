"""Slow and obvious: a step in simulated time, one instruction after the other.

``engine.py`` does the same in loops over integers; tests hold the two equal.
"""

from __future__ import annotations

from collections import defaultdict

from counterflow.schedule import Post, Run, Schedule, Transfer, Wait, reference
from counterflow.simulator.costs import Costs
from counterflow.timeline import TWINS, TWINS_OF, Span, Timeline


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """What ``counterflow.simulate`` does, for a schedule that runs.

    Raises:
        ScheduleError: the schedule is not whole.
        SimulatorError: the costs do not cover it.
    """
    programs = reference.lower(schedule).programs
    channels: dict[tuple[int, int], _Channel] = defaultdict(lambda: _Channel(costs))
    now, at = [0] * len(programs), [0] * len(programs)
    waiting: dict[Transfer, list[int]] = defaultdict(list)
    spans = []
    ready = list(range(len(programs)))
    while ready:
        rank = ready.pop()
        program = programs[rank]
        while at[rank] < len(program):
            match program[at[rank]]:
                case Post(transfers):
                    for transfer in transfers:
                        for arrived in channels[transfer.source, transfer.target].post(transfer, now[rank]):
                            ready += waiting.pop(arrived, ())
                case Wait(transfer):
                    arrival = channels[transfer.source, transfer.target].arrival_ns.get(transfer)
                    if arrival is None:
                        waiting[transfer].append(rank)
                        break
                    now[rank] = max(now[rank], arrival)
                case Run(action):
                    start = now[rank]
                    now[rank] += costs.duration_ns(action)
                    spans.append(Span(rank, str(action), start, now[rank]))
            at[rank] += 1
    assert at == [len(program) for program in programs], "the schedule has a deadlock; check tells it"
    for stage, holders in schedule.twins.items():
        twins_ns = costs.twins_ns(stage)
        start = max(now[rank] for rank in holders)
        for rank in holders if twins_ns and schedule.mode == "train" else ():
            spans.append(Span(rank, TWINS_OF.format(stage), start, start + twins_ns, TWINS))
            now[rank] = start + twins_ns
    return Timeline.from_spans(spans)


class _Channel:
    """One ordered pair of ranks: messages leave in the order in which they are sent."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.arrival_ns: dict[Transfer, int] = {}
        self._posted_ns: dict[Transfer, list[int]] = {}
        self._free_ns = 0

    def post(self, transfer: Transfer, now_ns: int) -> list[Transfer]:
        """One side has posted ``transfer``; the transfers whose arrival is now known."""
        self._posted_ns.setdefault(transfer, []).append(now_ns)
        arrived = []
        # Both sides post in the same order, so the oldest one open is always the next to leave.
        while self._posted_ns and len(self._posted_ns[oldest := next(iter(self._posted_ns))]) == 2:
            left = max(*self._posted_ns.pop(oldest), self._free_ns)
            self._free_ns = left + self.costs.wire_ns(oldest)
            self.arrival_ns[oldest] = self._free_ns + self.costs.latency_ns
            arrived.append(oldest)
        return arrived
