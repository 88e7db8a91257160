"""What no order can beat: lower bounds on a step, for costs on so many ranks and for a schedule's own actions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from counterflow.errors import SimulatorError
from counterflow.schedule import Action, Kind, Schedule, Transfer
from counterflow.schedule.rows import B, F, I, Ints, W
from counterflow.schedule.schedule import Mode
from counterflow.simulator.costs import Costs
from counterflow.simulator.pricing import durations_ns


def least_step_ns(num_ranks: int, num_stages: int, num_microbatches: int, costs: Costs, mode: Mode = "train") -> int:
    """The least that a step takes for these costs, whoever holds which stage and whatever the order.

    Two bounds, and the larger of them. The chain: the first micro-batch goes down through all stages before any
    backward can start, and after the last forward one comes back up. The packing: the work of all stages and
    micro-batches, evenly over the ranks and with as many F&B as save time. Beneath the first forwards there is no
    backward yet to pair them with, and none of the forwards is left for the last backwards: ranks then run
    unpaired work or none. Transfers count nothing, for stages may share a rank.

    Raises:
        SimulatorError: the costs do not cover the stages.

    Example:
        >>> from counterflow import Costs
        >>> from counterflow.simulator import least_step_ns
        >>> least_step_ns(8, 8, 20, Costs(1, 2, None, 1, 2.4)), least_step_ns(8, 8, 1, Costs(1, 2, None, 1, 2.4))
        (52800, 16000)
    """
    stages = range(num_stages)
    forward = _column(costs.duration_ns(Action(Kind.F, stage, 0)) for stage in stages)
    if mode == "forward":
        return max(int(forward.sum()), -(-num_microbatches * int(forward.sum()) // num_ranks))
    backwards = [_backwards_ns(costs, stage) for stage in stages]
    fill, drain = int(forward.sum()), sum(min(way[0] for way in ways) for ways in backwards)
    least = _column(min(way[1] for way in ways) for ways in backwards)
    most = _column(max(way[1] for way in ways) for ways in backwards)
    paired = [(stage, us) for stage in stages if (us := costs.given(Kind.F_B, stage)) is not None]
    gains = _column(int(forward[stage]) - round(1000 * us) for stage, us in paired)
    cells = num_stages * num_microbatches
    # A pair is of two micro-batches. So many pairs, each number in turn, leave the others unpaired.
    pairs = np.arange(num_microbatches * len(gains) + 1 if num_microbatches > 1 else 1)
    forwards, gained, shortest, longest = (
        _largest_first(each, num_microbatches) for each in (forward, gains, least, most)
    )
    work = int(forwards[-1] + shortest[-1]) - gained[pairs] - shortest[pairs]
    if not costs.whole():
        work -= cells  # a pair that is not stated is rounded once where its parts are twice
    idle = np.maximum(num_ranks * fill - forwards[cells - pairs], 0)
    idle += np.maximum(num_ranks * drain - longest[cells - pairs], 0)
    return max(fill + drain, -(-int((work + idle).min()) // num_ranks))


def _backwards_ns(costs: Costs, stage: int) -> list[tuple[int, int]]:
    """The ways of a backward at ``stage``, B or I and W: until the gradient leaves, and in all."""
    ways = []
    for kinds in ((Kind.B,), (Kind.I, Kind.W)):
        try:
            ns = [costs.duration_ns(Action(kind, stage, 0)) for kind in kinds]
        except SimulatorError:  # one of the two may be left out, and a schedule that runs it is refused then
            continue
        ways.append((ns[0], sum(ns)))
    if not ways:
        costs.duration_ns(Action(Kind.B, stage, 0))  # says what is missing
    return ways


def _largest_first(each: Ints, times: int) -> Ints:
    """The sums of the 0, 1, 2 ... largest numbers, where each occurs so many times."""
    return np.concatenate(([0], np.cumsum(np.repeat(np.sort(each)[::-1], times))))


def _column(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def least_step_of_ns(schedule: Schedule, costs: Costs) -> int:
    """The least that a step of ``schedule`` takes, in whatever order its ranks run their own actions.

    An action has a head, before which it cannot start: what its micro-batch goes through to reach it, transfers
    between ranks included; and a tail, which has to follow it. A rank runs one action at a time. So for any of
    its actions the least head, all their durations and the least tail follow one another. Taken are all that
    start no earlier than a given one, and all that end no later.

    Raises:
        SimulatorError: the costs do not cover the schedule.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> from counterflow.simulator import least_step_of_ns
        >>> schedule = one_f_one_b(4, 8)
        >>> least_step_of_ns(schedule, Costs()), simulate(schedule, Costs()).makespan_ns
        (33000, 33000)

    Source: Carlier 1982, "The one-machine sequencing problem" (heads and tails).
    """
    flow = _Flow(schedule, costs)
    bounds = [0]
    for start, end in zip(schedule.rows.first, schedule.rows.first[1:], strict=False):
        if start < end:
            head, ns, tail = (column[start:end] for column in (flow.head, flow.ns, flow.tail))
            bounds += [_one_at_a_time(head, ns, tail), _one_at_a_time(tail, ns, head)]
    return max(bounds)


def _one_at_a_time(before: Ints, ns: Ints, after: Ints) -> int:
    """The largest of: least ``before`` of some actions, their work, their least ``after``."""
    order = np.lexsort((-after, -before))
    return int((before[order] + np.cumsum(ns[order]) + np.minimum.accumulate(after[order])).max())


class _Flow:
    """For each action of a schedule its duration, head and tail, shape [actions]."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        rows = schedule.rows
        self.rank = rows.rank
        self.ns = durations_ns(costs, rows)
        self.head, self.tail = np.zeros_like(self.ns), np.zeros_like(self.ns)
        shape = (schedule.num_stages, schedule.num_microbatches)
        self.forward, self.backward, self.weight = (np.full(shape, -1) for _ in range(3))
        for part in (0, 1):
            kind, stage, microbatch = (column[:, part] for column in rows.parts)
            for kinds, table in (((F,), self.forward), ((B, I), self.backward), ((W,), self.weight)):
                found = np.flatnonzero(np.isin(kind, kinds))
                table[stage[found], microbatch[found]] = found
        self._heads()
        self._tails()

    def _heads(self) -> None:
        """Down with the activations, back up with the gradients; W is last."""
        last = self.schedule.num_stages - 1
        for stage in range(last + 1):
            if stage:
                self._after(self.forward[stage], self.forward[stage - 1], stage - 1)
        if self.schedule.mode == "forward":
            return
        for stage in range(last, -1, -1):
            self._after(self.backward[stage], self.forward[stage])
            if stage < last:
                self._after(self.backward[stage], self.backward[stage + 1], stage)
        for stage in range(last + 1):
            self._after(self.weight[stage], self.backward[stage])

    def _tails(self) -> None:
        """The same the other way round."""
        last = self.schedule.num_stages - 1
        if self.schedule.mode == "train":
            for stage in range(last + 1):
                self._before(self.backward[stage], self.weight[stage])
                if stage:
                    self._before(self.backward[stage], self.backward[stage - 1], stage - 1)
            self._before(self.forward[last], self.backward[last])
        for stage in range(last - 1, -1, -1):
            self._before(self.forward[stage], self.forward[stage + 1], stage)

    def _after(self, actions: Ints, needed: Ints, boundary: int | None = None) -> None:
        actions, needed = _both(actions, needed)
        ready = self.head[needed] + self.ns[needed] + self._way(actions, needed, boundary)
        np.maximum.at(self.head, actions, ready)

    def _before(self, actions: Ints, next_ones: Ints, boundary: int | None = None) -> None:
        actions, next_ones = _both(actions, next_ones)
        rest = self.tail[next_ones] + self.ns[next_ones] + self._way(actions, next_ones, boundary)
        np.maximum.at(self.tail, actions, rest)

    def _way(self, some: Ints, others: Ints, boundary: int | None) -> Ints | int:
        """What a transfer over ``boundary``, the stage below it, takes where the two are on different ranks."""
        if boundary is None:
            return 0
        wire_ns = self.costs.wire_ns(Transfer("activation", boundary, 0, 0, 1))
        return np.where(self.rank[some] == self.rank[others], 0, wire_ns + self.costs.latency_ns)


def _both(some: Ints, others: Ints) -> tuple[Ints, Ints]:
    """Where both exist: no B has a W."""
    there = (some >= 0) & (others >= 0)
    return some[there], others[there]
