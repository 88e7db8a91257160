"""How far the ranks come: programs walked until nothing moves, under each model of what a channel does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from counterflow.errors import ScheduleError
from counterflow.loops import run_loop
from counterflow.schedule.rows import Ints

Channels = Literal["rendezvous", "buffered", "nccl", "nccl-pair"]
"""What a channel does.

In all of them posts do not block, and messages of an ordered pair of ranks arrive in the order in which they are sent.

* ``rendezvous``: a wait ends when both sides have posted. So does gloo, and NCCL with a communicator for each ordered
  pair, which is how our runtime uses it.
* ``buffered``: a send needs nobody, a receive needs the send.
* ``nccl``: one communicator for all, as ``batch_isend_irecv`` uses it. A batch is one kernel; a rank's kernels run
  one after the other; a message moves while the kernels of both its ends run; a wait ends when its kernel has.
* ``nccl-pair``: the same with a communicator for each pair of ranks, as a single ``isend`` or ``irecv`` uses it.
"""

CHANNELS: tuple[Channels, ...] = get_args(Channels)
POSTED, MOVED = 1, 2
"""What has become of one side of a transfer."""


@dataclass(frozen=True)
class Progress:
    """Where every rank has stopped, and what of which queue had ended by then.

    ``at[rank]`` is the index in ``ops`` of the instruction that it waits in, or the end of its program. Side 2t is the
    sender's of transfer t, side 2t + 1 the receiver's; ``posted[side]`` is 0, POSTED or MOVED,
    ``kernel_of[side]`` in which kernel; ``previous[kernel]`` is the one ahead in its queue, ``open_[kernel]`` the
    number of its transfers that have not moved.
    """

    at: Ints
    posted: Ints
    kernel_of: Ints
    previous: Ints
    open_: Ints


def walk(first: Ints, ops: Ints, source: Ints, target: Ints, channels: Channels) -> Progress:
    """Let all ranks go as far as they come; see ``Programs`` for the columns.

    Raises:
        ScheduleError: no such model of channels.
    """
    if channels not in CHANNELS:
        raise ScheduleError(f"channels got {channels!r}; it is one of {', '.join(CHANNELS)}")
    num_ranks, sides = len(first) - 1, 2 * len(source)
    kernel_of, previous, following, members, next_member = (np.full(sides, -1, dtype=np.int64) for _ in range(5))
    open_, posted = np.zeros(sides, dtype=np.int64), np.zeros(sides, dtype=np.int64)
    last, batch_of_last, waits_in, ready = (np.full(num_ranks, -1, dtype=np.int64) for _ in range(4))
    grouping = {"rendezvous": 0, "buffered": 0, "nccl": 1, "nccl-pair": 2}[channels]
    run_loop(
        _group,
        len(ops) + num_ranks**2,  # for each rank it clears what it notes about all ranks
        *(first, ops, source, target, grouping, last, batch_of_last),
        *(kernel_of, previous, following, members, next_member, open_),
    )
    at = first[:-1].copy()
    run_loop(
        _advance,
        len(ops),
        *(first, ops, source, target, channels == "buffered"),
        *(kernel_of, previous, following, members, next_member, open_),
        *(posted, at, waits_in, ready, np.zeros(2 * sides + 1, dtype=np.int64)),
    )
    return Progress(at, posted, kernel_of, previous, open_)


def _group(
    first: Any,
    ops: Any,
    source: Any,
    target: Any,
    grouping: Any,
    last: Any,
    batch_of_last: Any,
    kernel_of: Any,
    previous: Any,
    following: Any,
    members: Any,
    next_member: Any,
    open_: Any,
) -> int:
    """Which kernel each side is in, and the queues of kernels: none (0), one for each rank (1) or pair of ranks (2)."""
    kernels = 0
    for rank in range(len(first) - 1):
        for peer in range(len(first) - 1):
            last[peer] = -1
        batch = -1
        for index in range(first[rank], first[rank + 1]):
            transfer, tag = ops[index] // 4, ops[index] % 4
            if tag == 0 or tag == 3:
                continue
            if tag == 1:
                batch = index
            side = 2 * transfer
            peer = target[transfer]
            if peer == rank:
                side += 1
                peer = source[transfer]
            queue = peer if grouping == 2 else rank
            kernel = last[queue]
            if grouping == 0 or kernel < 0 or batch_of_last[queue] != batch:
                if grouping != 0 and kernel >= 0:
                    previous[kernels] = kernel
                    following[kernel] = kernels
                kernel = kernels
                kernels += 1
                last[queue] = kernel
                batch_of_last[queue] = batch
            kernel_of[side] = kernel
            next_member[side] = members[kernel]
            members[kernel] = side
            open_[kernel] += 1
    return kernels


def _advance(
    first: Any,
    ops: Any,
    source: Any,
    target: Any,
    buffered: Any,
    kernel_of: Any,
    previous: Any,
    following: Any,
    members: Any,
    next_member: Any,
    open_: Any,
    posted: Any,
    at: Any,
    waits_in: Any,
    ready: Any,
    moving: Any,
) -> int:
    """Each rank runs until it has to wait; what then moves may let others go on."""
    num_ready = 0
    for rank in range(len(at) - 1, -1, -1):
        ready[num_ready] = rank
        num_ready += 1
    while num_ready:
        num_ready -= 1
        rank = ready[num_ready]
        while at[rank] < first[rank + 1]:
            transfer, tag = ops[at[rank]] // 4, ops[at[rank]] % 4
            side = 2 * transfer
            if tag != 0 and target[transfer] == rank:
                side += 1
            if tag == 3:
                ended = posted[2 * transfer] > 0 if buffered else open_[kernel_of[side]] == 0
                if not ended:
                    waits_in[rank] = side
                    break
            elif tag != 0:
                posted[side] = 1
                num_moving = 1
                moving[0] = transfer
                while num_moving:
                    num_moving -= 1
                    moved = moving[num_moving]
                    if posted[2 * moved] != 1 or posted[2 * moved + 1] != 1:
                        continue
                    sends, receives = kernel_of[2 * moved], kernel_of[2 * moved + 1]
                    if previous[sends] >= 0 and open_[previous[sends]] > 0:
                        continue
                    if previous[receives] >= 0 and open_[previous[receives]] > 0:
                        continue
                    posted[2 * moved] = posted[2 * moved + 1] = 2
                    for end in range(2 * moved, 2 * moved + 2):
                        kernel = kernel_of[end]
                        open_[kernel] -= 1
                        if open_[kernel] > 0:
                            continue
                        owner = source[moved] if end % 2 == 0 else target[moved]
                        if waits_in[owner] >= 0 and kernel_of[waits_in[owner]] == kernel:
                            waits_in[owner] = -1
                            ready[num_ready] = owner
                            num_ready += 1
                        if following[kernel] >= 0:
                            member = members[following[kernel]]
                            while member >= 0:
                                moving[num_moving] = member // 2
                                num_moving += 1
                                member = next_member[member]
                if buffered and side % 2 == 0:
                    owner = target[transfer]
                    if waits_in[owner] == side + 1:
                        waits_in[owner] = -1
                        ready[num_ready] = owner
                        num_ready += 1
            at[rank] += 1
    return 0
