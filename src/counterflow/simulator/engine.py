"""Transfers and costs become a Timeline: what a step would take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from counterflow.errors import SimulatorError
from counterflow.loops import run_loop
from counterflow.schedule import ActionNames, Programs, Schedule, check, lower
from counterflow.schedule.rows import Ints
from counterflow.simulator.costs import Costs
from counterflow.simulator.pricing import durations_ns, wires_ns
from counterflow.timeline import COMPUTE, TWINS, TWINS_OF, Timeline

_FURTHEST_NS = 2**62  # int64 holds the difference of any two such times


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The step of ``schedule`` in simulated time.

    Every rank follows its program (``counterflow.schedule.lower``). Posts take no time. A transfer starts when
    both sides have posted it and the one before it on the same channel has left the wire. Behind the last
    action of both, twins sum the gradients of their stages, one stage after the other.

    Raises:
        ScheduleError: the schedule would not run.
        SimulatorError: the costs do not cover it.

    Example:
        >>> from counterflow import Costs, dualpipe, simulate
        >>> timeline = simulate(dualpipe(8, 20), Costs(forward_us=1, backward_us=2, weight_us=1, overlapped_us=3))
        >>> timeline.bubble_ns().tolist()
        [6000, 6000, 6000, 6000, 6000, 6000, 6000, 6000]
    """
    return play(schedule, costs).timeline


@dataclass(frozen=True)
class Step:
    """A simulated step with all that its timeline does not show; see ``Programs`` for the columns.

    ``start_ns`` and ``duration_ns`` have shape [actions]; ``left_ns``, when its channel is free again, and
    ``wire_ns`` have shape [transfers]; ``end_ns`` has shape [ranks].
    """

    schedule: Schedule
    costs: Costs
    programs: Programs
    start_ns: Ints
    duration_ns: Ints
    left_ns: Ints
    wire_ns: Ints
    end_ns: Ints

    @cached_property
    def timeline(self) -> Timeline:
        """The actions of every rank, and the sums of its twins."""
        rows = self.schedule.rows
        rank, start_ns, end_ns = rows.rank, self.start_ns, self.start_ns + self.duration_ns
        sums = self._twins()
        if not sums:
            zeros = np.zeros(rows.num_actions, dtype=np.int64)
            return Timeline(rank, start_ns, end_ns, zeros, np.arange(len(rank)), (COMPUTE,), ActionNames(rows))
        added = np.array([(rank, start, end) for rank, start, end, _ in sums], dtype=np.int64).T
        rank, start_ns, end_ns = (
            np.concatenate([column, more]) for column, more in zip((rank, start_ns, end_ns), added, strict=True)
        )
        lane = (np.arange(len(rank)) >= rows.num_actions).astype(np.int64)
        order = np.lexsort((np.arange(len(rank)), lane, rank))
        names = ActionNames(rows, tuple(name for *_, name in sums))
        return Timeline(rank[order], start_ns[order], end_ns[order], lane[order], order, (COMPUTE, TWINS), names)

    def _twins(self) -> list[tuple[int, int, int, str]]:
        """Rank, start, end and name of each sum: it starts when the last twin has come."""
        now = self.end_ns.tolist()
        sums = []
        for stage, holders in self.schedule.twins.items():
            twins_ns = self.costs.twins_ns(stage)
            if not twins_ns or self.schedule.mode == "forward":
                continue
            start = max(now[rank] for rank in holders)
            for rank in holders:
                sums.append((rank, start, start + twins_ns, TWINS_OF.format(stage)))
                now[rank] = start + twins_ns
        return sums


def play(schedule: Schedule, costs: Costs) -> Step:
    """``simulate``, with when everything left and arrived.

    Raises:
        ScheduleError: the schedule would not run.
        SimulatorError: the costs do not cover it.
    """
    programs = lower(schedule).columns
    duration_ns, wire_ns = durations_ns(costs, schedule.rows), wires_ns(costs, programs)
    longest = duration_ns.sum(dtype=float) + wire_ns.sum(dtype=float) + costs.latency_ns * float(len(wire_ns))
    longest += sum(costs.twins_ns(stage) for stage in schedule.twins)
    if longest >= _FURTHEST_NS:
        raise SimulatorError(f"the step may take {longest:g} ns, more than 146 years; lower the costs")
    sent, received, left = (np.full(programs.num_transfers, -1, dtype=np.int64) for _ in range(3))
    start, end = (np.zeros(length, dtype=np.int64) for length in (schedule.rows.num_actions, len(programs)))
    waits_for, ready = (np.full(len(programs), -1, dtype=np.int64) for _ in range(2))
    at = programs.first[:-1].copy()
    run_loop(
        _run,
        len(programs.ops),
        *(programs.first, programs.ops, programs.source, programs.target, programs.before, programs.after),
        *(duration_ns, wire_ns, costs.latency_ns),
        *(sent, received, left, start, end, at, waits_for, ready),
    )
    if (at < programs.first[1:]).any():
        check(schedule)  # names the circle
    return Step(schedule, costs, programs, start, duration_ns, left, wire_ns, end)


def _run(
    first: Any,
    ops: Any,
    source: Any,
    target: Any,
    before: Any,
    after: Any,
    duration: Any,
    wire: Any,
    latency: Any,
    sent: Any,
    received: Any,
    left: Any,
    start: Any,
    now: Any,
    at: Any,
    waits_for: Any,
    ready: Any,
) -> int:
    """Each rank runs until it waits for what has no time yet; what is posted then gives times to others."""
    num_ready = 0
    for rank in range(len(at) - 1, -1, -1):
        ready[num_ready] = rank
        num_ready += 1
    while num_ready:
        num_ready -= 1
        rank = ready[num_ready]
        while at[rank] < first[rank + 1]:
            index, tag = ops[at[rank]] // 4, ops[at[rank]] % 4
            if tag == 0:
                start[index] = now[rank]
                now[rank] += duration[index]
            elif tag == 3:
                if left[index] < 0:
                    waits_for[rank] = index
                    break
                now[rank] = max(now[rank], left[index] + latency)
            else:
                if target[index] == rank:
                    received[index] = now[rank]
                else:
                    sent[index] = now[rank]
                while index >= 0 and sent[index] >= 0 and received[index] >= 0:
                    free = 0
                    if before[index] >= 0:
                        free = left[before[index]]
                        if free < 0:
                            break
                    left[index] = max(sent[index], received[index], free) + wire[index]
                    if waits_for[source[index]] == index:
                        waits_for[source[index]] = -1
                        ready[num_ready] = source[index]
                        num_ready += 1
                    if waits_for[target[index]] == index:
                        waits_for[target[index]] = -1
                        ready[num_ready] = target[index]
                        num_ready += 1
                    index = after[index]
            at[rank] += 1
    return 0
