"""Answer requests while experts move: ``migrate.py FOLDER EXTRA_BYTES SIGNAL AT TIMEOUT_S``.

Rank 2 sends itself SIGNAL before its AT-th message, an expert or a vote; with 0 it never does. Then the others go on by
what the failed migration holds, in a group of their own, and move to a placement for the three of them. Every rank
leaves in ``rank-r.json`` what it saw.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow import Placement, plan_migration
from counterflow.errors import PeerError
from counterflow.runtime import Migration
from counterflow.runtime.transport import Handle, Lane, Message, ProcessGroupTransport
from runtime.experts import (
    EXPERTS,
    LAYERS,
    ROOM,
    changes,
    holds_what_it_says,
    placed,
    placements,
    requests,
    slots_of,
    unplaced,
)


class Counting(ProcessGroupTransport):
    """Ends or stops this process before a message is sent, and counts what experts take on their way in."""

    left, signal = 0, signal.SIGKILL
    received_bytes = 0

    def send(self, message: Message, tensors: list[Tensor]) -> Handle:
        Counting.left -= 1
        if Counting.left == 0:
            os.kill(os.getpid(), Counting.signal)
        return super().send(message, tensors)

    def receive(self, message: Message, tensors: list[Tensor]) -> Handle:
        if message.lane is Lane.EXPERTS:
            Counting.received_bytes += sum(tensor.nbytes for tensor in tensors)
        return super().receive(message, tensors)


def answers(
    migration: Migration, slots: dict[int, list[list[Tensor]]], group: dist.ProcessGroup | None, n: int
) -> bool:
    """Whether the model as it is now answers as the unplaced one does, bit for bit."""
    tokens = requests(dist.get_rank(), n)
    held = [migration.held(layer) for layer in range(LAYERS)]
    return torch.equal(placed(tokens, held, slots, group), unplaced(tokens))


def carry_out(migration: Migration, slots: dict[int, list[list[Tensor]]], group: dist.ProcessGroup | None) -> dict:
    """Answer, advance, answer, until it is done or fails."""
    right, states, most, swapped, error = [], [], 0, [], None
    while True:
        states.append([migration.held(layer) for layer in range(LAYERS)])
        right.append(answers(migration, slots, group, len(right)))
        if migration.done:
            break
        Counting.received_bytes = 0
        try:
            swapped += migration.advance()
        except PeerError as problem:
            error = str(problem)
            break
        most = max(most, Counting.received_bytes)
    states.append([migration.held(layer) for layer in range(LAYERS)])
    rank = dist.get_rank(group)
    return {
        "right": right,
        "changes": changes(states),
        "most_received": most,
        "swapped": swapped,
        "error": error,
        "held": states[-1],
        "truthful": holds_what_it_says(slots, states[-1], rank),
    }


def main(folder: str, extra_bytes: str, how: str, at: str, timeout_s: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    old, new = placements()
    plan = plan_migration(old, new)
    slots = slots_of([plan.held(layer) for layer in range(LAYERS)], rank, ROOM)
    pointers = [t.data_ptr() for layer in slots.values() for slot in layer for t in slot]
    migration = Migration(plan, slots, extra_bytes=int(extra_bytes), timeout_s=float(timeout_s), transport=Counting)
    if rank == 2:
        Counting.left, Counting.signal = int(at), signal.Signals[how]
    found = carry_out(migration, slots, None)
    found["pointers_kept"] = pointers == [t.data_ptr() for layer in slots.values() for slot in layer for t in slot]
    if found["error"]:
        group = dist.new_group([0, 1, 3], use_local_synchronization=True)
        wide = Placement([[slot % EXPERTS for slot in range(18)]] * LAYERS, EXPERTS, 3)
        onward = plan_migration(migration.placement, wide, lost_gpus=[2])
        room = [[torch.zeros_like(t) for t in slots[0][0]] for _ in range(LAYERS * (6 - ROOM))]
        for layer in slots.values():
            layer.extend(room.pop() for _ in range(6 - ROOM))
        second = Migration(onward, slots, extra_bytes=1 << 20, group=group)
        found["second"] = carry_out(second, slots, group)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if not found["error"]:
        dist.destroy_process_group()
    # The world of the killed one is no more: there is nothing to take down in good order.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
