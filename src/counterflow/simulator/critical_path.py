"""What the length of a step hangs on: the slack of every action, and one chain of those that have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from counterflow.loops import run_loop
from counterflow.schedule import Schedule
from counterflow.schedule.rows import Ints
from counterflow.simulator.costs import Costs
from counterflow.simulator.engine import Step, play
from counterflow.timeline import Span


@dataclass(frozen=True)
class CriticalPath:
    """``slack_ns[rank][step]``: how much later that action could end, alone, without a longer step.

    ``spans`` is one chain of actions without slack, in time, from the step's start to its last action: the one before
    is what held each of them up, by what it made, by keeping their rank, or by posting a receive late.

    Slack counts the actions alone: with the twins' sums behind them the step ends later, and none of them gains by it.
    """

    slack_ns: list[list[int]]
    spans: list[Span]


def critical_path(schedule: Schedule, costs: Costs) -> CriticalPath:
    """Which actions of ``schedule`` set the length of its step, and how far the others are from it.

    Raises:
        ScheduleError: the schedule would not run.
        SimulatorError: the costs do not cover it.

    Example:
        >>> from counterflow import Costs, one_f_one_b
        >>> from counterflow.simulator import critical_path
        >>> path = critical_path(one_f_one_b(2, 2), Costs())
        >>> [span.name for span in path.spans], path.slack_ns[0]
        (['0F0', '1F0', '1B0', '1F1', '1B1', '0B1'], [0, 2000, 1000, 0])
    """
    step = play(schedule, costs)
    slack = _slack(step)
    first = schedule.rows.first.tolist()
    rows = [slack[one:end].tolist() for one, end in zip(first, first[1:], strict=False)]
    return CriticalPath(rows, _chain(step))


def _slack(step: Step) -> Ints:
    """Latest end less end, by walking the programs backwards; shape [actions]."""
    programs, num_ranks = step.programs, len(step.programs)
    end_ns = step.start_ns + step.duration_ns
    last = int(end_ns.max())
    latest_end = np.full(len(end_ns), last, dtype=np.int64)
    latest_left = np.full(programs.num_transfers, last, dtype=np.int64)
    run_loop(
        _walk_back,
        len(programs.ops),
        *(programs.first, programs.ops, programs.source, programs.target, programs.before, programs.after),
        *(step.duration_ns, step.wire_ns, step.costs.latency_ns),
        *(latest_end, latest_left, np.zeros(programs.num_transfers, dtype=np.int64)),
        *(np.full(num_ranks, last, dtype=np.int64), programs.first[1:] - 1),
        *(np.full(num_ranks, -1, dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)),
    )
    return latest_end - end_ns


def _walk_back(
    first: Any,
    ops: Any,
    source: Any,
    target: Any,
    before: Any,
    after: Any,
    duration: Any,
    wire: Any,
    latency: Any,
    latest_end: Any,
    latest_left: Any,
    known: Any,
    latest: Any,
    at: Any,
    stopped_at: Any,
    ready: Any,
) -> int:
    """A transfer's latest time is known once both its waits and the next on its channel have been passed."""
    num_ready = 0
    for rank in range(len(at)):
        ready[num_ready] = rank
        num_ready += 1
    while num_ready:
        num_ready -= 1
        rank = ready[num_ready]
        while at[rank] >= first[rank]:
            index, tag = ops[at[rank]] // 4, ops[at[rank]] % 4
            if tag == 0:
                latest_end[index] = latest[rank]
                latest[rank] -= duration[index]
            elif tag == 3:
                latest_left[index] = min(latest_left[index], latest[rank] - latency)
                known[index] += 1
                while index >= 0 and known[index] == 2 and (after[index] < 0 or known[after[index]] == 3):
                    if after[index] >= 0:
                        latest_left[index] = min(latest_left[index], latest_left[after[index]] - wire[after[index]])
                    known[index] = 3
                    if stopped_at[source[index]] == index:
                        stopped_at[source[index]] = -1
                        ready[num_ready] = source[index]
                        num_ready += 1
                    if stopped_at[target[index]] == index:
                        stopped_at[target[index]] = -1
                        ready[num_ready] = target[index]
                        num_ready += 1
                    index = before[index]
            else:
                if known[index] != 3:
                    stopped_at[rank] = index
                    break
                latest[rank] = min(latest[rank], latest_left[index] - wire[index])
            at[rank] -= 1
    return 0


def _chain(step: Step) -> list[Span]:
    """Back from the step's last action, each time to what held it up."""
    rows, used_by = step.schedule.rows, step.programs.used_by // 2
    end_ns = step.start_ns + step.duration_ns
    by_use = np.argsort(used_by, kind="stable")
    index: int | None = int(end_ns.argmax())
    chain = []
    while index is not None:
        rank, in_row = rows.place(index)
        start = int(step.start_ns[index])
        chain.append(Span(rank, str(rows.action(index)), start, int(end_ns[index])))
        if in_row and end_ns[index - 1] == start:
            index -= 1
        else:
            low, high = np.searchsorted(used_by[by_use], (index, index + 1))
            arrivals = [int(transfer) for transfer in by_use[low:high]]
            index = _sender(step, end_ns, max(arrivals, key=lambda transfer: step.left_ns[transfer])) if start else None
    return chain[::-1]


def _sender(step: Step, end_ns: Ints, transfer: int) -> int:
    """The action that ``transfer`` waited for: of its maker, of its receiver, or of those ahead on its channel."""
    programs = step.programs
    while True:
        left_at = int(step.left_ns[transfer] - step.wire_ns[transfer])
        maker, ahead = int(programs.made_by[transfer]) // 2, int(programs.before[transfer])
        if end_ns[maker] == left_at:
            return maker
        if ahead < 0 or step.left_ns[ahead] != left_at:
            break
        transfer = ahead
    # The receiver posts right behind an action, one ahead of where it needs the message.
    first = int(programs.rows.first[programs.target[transfer]])
    user = int(programs.used_by[transfer]) // 2
    return first + int(np.searchsorted(end_ns[first:user], left_at))
