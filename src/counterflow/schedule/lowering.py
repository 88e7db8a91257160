"""The one lowering: a schedule's rows become the programs that check, simulator and executor share.

The rules stand in ``transfers.py``, the same in slow and obvious words in ``reference.py``; here they are loops over
integers, which take a million actions in a fraction of a second. A property test holds the two equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from counterflow.loops import run_loop
from counterflow.schedule import reference
from counterflow.schedule.rows import Ints
from counterflow.schedule.schedule import Schedule
from counterflow.schedule.transfers import Programs, Transfers


def lower(schedule: Schedule) -> Transfers:
    """The programs of all ranks.

    Raises:
        ScheduleError: the schedule is not whole: an action is missing, stands twice, on the wrong rank or too early.

    Example:
        >>> from counterflow import one_f_one_b
        >>> from counterflow.schedule import lower
        >>> for instruction in lower(one_f_one_b(2, 1)).programs[1]:
        ...     print(instruction)
        post the activation of 0F0 from rank 0 to 1
        wait for the activation of 0F0 from rank 0 to 1
        run 1F0
        run 1B0
        post the gradient of 1B0 from rank 1 to 0
        wait for the gradient of 1B0 from rank 1 to 0
    """
    rows = schedule.rows
    cells = schedule.num_stages * schedule.num_microbatches
    train = schedule.mode == "train"
    # A whole schedule has a forward for each cell, so a table of cells is never longer than its rows.
    if cells > rows.num_actions:
        reference.require_whole(schedule)
    rank = rows.rank
    made, weights = _blank(2 * cells), _blank(cells)
    outgoing, incoming = _blank(2 * rows.num_actions), _blank(2 * rows.num_actions)
    kind, stage, microbatch = (column.reshape(-1) for column in rows.parts)
    num_transfers = run_loop(
        _connect,
        len(kind),
        *(kind, stage, microbatch, rank, schedule.num_stages, schedule.num_microbatches, train),
        *(made, weights, outgoing, incoming),
    )
    if num_transfers < 0:
        reference.require_whole(schedule)
    made_by, used_by, before, after, receive_slot, release_slot, next_receive, next_release = (
        _blank(num_transfers) for _ in range(8)
    )
    slots = rows.num_actions + len(rows)
    first_receive, first_release = _blank(slots), _blank(slots)
    ops, op_first = _blank(rows.num_actions + 4 * num_transfers), _blank(len(rows) + 1)
    run_loop(
        _place,
        len(kind) + len(rows) ** 2,  # for each rank it clears what it notes about all ranks
        *(rows.first, rank, outgoing, incoming),
        *(made_by, used_by, before, after, receive_slot, release_slot),
        *(_blank(len(rows)), _blank(len(rows))),
    )
    run_loop(
        _write,
        len(kind),
        *(rows.first, rank, outgoing, incoming, used_by, made_by, receive_slot, release_slot),
        *(next_receive, next_release, first_receive, first_release, ops, op_first),
    )
    return Transfers(schedule, Programs(rows, op_first, ops, made_by, used_by, before, after))


def _blank(length: int) -> Ints:
    return np.full(length, -1, dtype=np.int64)


# The parts of action a are 2a and 2a + 1. A transfer is known by the part that makes it and the action that uses it.


def _connect(
    kind: Any,
    stage: Any,
    microbatch: Any,
    rank: Any,
    num_stages: Any,
    num_microbatches: Any,
    train: Any,
    made: Any,
    weights: Any,
    outgoing: Any,
    incoming: Any,
) -> int:
    """Number the transfers in the order of their makers; their count, or -1 where the schedule is not whole.

    ``made[cell]`` becomes the part that makes the activation of stage and micro-batch, ``made[cells + cell]`` the one
    that makes the gradient, ``weights[cell]`` the W.
    """
    cells = num_stages * num_microbatches
    for part in range(len(kind)):
        if kind[part] < 0:
            continue
        cell = stage[part] * num_microbatches + microbatch[part]
        if kind[part] == 3:
            if weights[cell] >= 0:
                return -1
            weights[cell] = part
            continue
        if kind[part] != 0:
            cell += cells
        if made[cell] >= 0:
            return -1
        made[cell] = part
    for cell in range(cells):
        forward, backward, weight = made[cell], made[cells + cell], weights[cell]
        if forward < 0 or (backward >= 0) != train:
            return -1
        if not train:
            if weight >= 0:
                return -1
            continue
        if rank[backward // 2] != rank[forward // 2] or backward // 2 <= forward // 2:
            return -1
        if (weight >= 0) != (kind[backward] == 2):
            return -1
        if weight >= 0 and (rank[weight // 2] != rank[backward // 2] or weight // 2 <= backward // 2):
            return -1
    transfers = 0
    for part in range(len(kind)):
        if kind[part] < 0 or kind[part] == 3:
            continue
        cell = stage[part] * num_microbatches + microbatch[part]
        if kind[part] == 0 and stage[part] + 1 < num_stages:
            user = made[cell + num_microbatches]
        elif kind[part] != 0 and stage[part] > 0:
            user = made[cells + cell - num_microbatches]
        else:
            continue
        if rank[user // 2] != rank[part // 2]:
            outgoing[part] = incoming[user] = transfers
            transfers += 1
        elif user // 2 <= part // 2:
            return -1
    return transfers


def _place(
    first: Any,
    rank: Any,
    outgoing: Any,
    incoming: Any,
    made_by: Any,
    used_by: Any,
    before: Any,
    after: Any,
    receive_slot: Any,
    release_slot: Any,
    last: Any,
    least: Any,
) -> int:
    """The slots of rules 2 to 4: slot k of a rank stands before its action k, the last one after all of them."""
    for part in range(len(outgoing)):
        if outgoing[part] >= 0:
            made_by[outgoing[part]] = part
        if incoming[part] >= 0:
            used_by[incoming[part]] = part
    num_ranks = len(first) - 1
    for source in range(num_ranks):
        for target in range(num_ranks):
            last[target] = -1
        for part in range(2 * first[source], 2 * first[source + 1]):
            transfer = outgoing[part]
            if transfer >= 0:
                target = rank[used_by[transfer] // 2]
                before[transfer] = last[target]
                if last[target] >= 0:
                    after[last[target]] = transfer
                last[target] = transfer
    for source in range(num_ranks):
        # Rules 2 and 3: one action ahead of its use, and of the use of all that is sent after it.
        for target in range(num_ranks):
            least[target] = first[target + 1] - first[target]
        for part in range(2 * first[source + 1] - 1, 2 * first[source] - 1, -1):
            transfer = outgoing[part]
            if transfer >= 0:
                target = rank[used_by[transfer] // 2]
                least[target] = min(least[target], used_by[transfer] // 2 - first[target])
                receive_slot[transfer] = max(least[target] - 1, 0)
    for target in range(num_ranks):
        # Rule 4: the first slot of the sender in which an answer, sent after the use, is waited for.
        for source in range(num_ranks):
            least[source] = first[source + 1] - first[source]
        for action in range(first[target + 1] - 1, first[target] - 1, -1):
            for part in range(2 * action, 2 * action + 2):
                answer = outgoing[part]
                if answer >= 0:
                    source = rank[used_by[answer] // 2]
                    least[source] = min(least[source], used_by[answer] // 2 - first[source])
            for part in range(2 * action, 2 * action + 2):
                transfer = incoming[part]
                if transfer >= 0:
                    source = rank[made_by[transfer] // 2]
                    release_slot[transfer] = max(least[source], made_by[transfer] // 2 - first[source] + 1)
    return 0


def _write(
    first: Any,
    rank: Any,
    outgoing: Any,
    incoming: Any,
    used_by: Any,
    made_by: Any,
    receive_slot: Any,
    release_slot: Any,
    next_receive: Any,
    next_release: Any,
    first_receive: Any,
    first_release: Any,
    ops: Any,
    op_first: Any,
) -> int:
    """The programs, slot by slot: posts (sends, then receives), waits (arrivals, then releases), and the action."""
    for transfer in range(len(made_by) - 1, -1, -1):
        # Each slot has a list of the receives posted in it, and one of the sends released, in the transfers' order.
        target = rank[used_by[transfer] // 2]
        slot = first[target] + target + receive_slot[transfer]
        next_receive[transfer] = first_receive[slot]
        first_receive[slot] = transfer
        source = rank[made_by[transfer] // 2]
        slot = first[source] + source + release_slot[transfer]
        next_release[transfer] = first_release[slot]
        first_release[slot] = transfer
    at = 0
    for one in range(len(first) - 1):
        op_first[one] = at
        for action in range(first[one], first[one + 1] + 1):
            tag = 1
            if action > first[one]:
                for part in range(2 * action - 2, 2 * action):
                    if outgoing[part] >= 0:
                        ops[at] = 4 * outgoing[part] + tag
                        at += 1
                        tag = 2
            transfer = first_receive[action + one]
            while transfer >= 0:
                ops[at] = 4 * transfer + tag
                at += 1
                tag = 2
                transfer = next_receive[transfer]
            if action < first[one + 1]:
                for part in range(2 * action, 2 * action + 2):
                    if incoming[part] >= 0:
                        ops[at] = 4 * incoming[part] + 3
                        at += 1
            transfer = first_release[action + one]
            while transfer >= 0:
                ops[at] = 4 * transfer + 3
                at += 1
                transfer = next_release[transfer]
            if action < first[one + 1]:
                ops[at] = 4 * action
                at += 1
    op_first[len(first) - 1] = at
    return at
