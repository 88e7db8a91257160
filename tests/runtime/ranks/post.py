"""One rank follows programs over one NCCL communicator: ``post.py FOLDER BYTES CASE...``.

A case is a name of ``runtime.posting``. Each is given ``PATIENCE_S``; whether it came to its end is appended to
``rank-r.txt``. After one that hangs the communicator is stuck, and the process ends.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from counterflow.schedule import Post, Wait
from counterflow.schedule.transfers import Program
from runtime.posting import PATIENCE_S, postings
from runtime.processes import init_process_group


def follow(program: Program, sent: torch.Tensor, received: torch.Tensor) -> bool:
    """Posts are batches and waits are the stream's, as in a pipeline; actions compute nothing."""
    rank, peer = dist.get_rank(), 1 - dist.get_rank()
    works = {}
    for instruction in program:
        if isinstance(instruction, Post):
            batch = [
                dist.P2POp(dist.isend, sent, peer) if t.source == rank else dist.P2POp(dist.irecv, received, peer)
                for t in instruction.transfers
            ]
            works |= dict.fromkeys(instruction.transfers, dist.batch_isend_irecv(batch))
        elif isinstance(instruction, Wait):
            for work in works[instruction.transfer]:
                work.wait()
    for batch in works.values():
        for work in batch:
            work.wait()
    end = torch.cuda.Event()
    end.record()
    deadline = time.monotonic() + PATIENCE_S
    while not end.query() and time.monotonic() < deadline:
        time.sleep(0.01)
    return end.query()


def main(folder: str, message_bytes: str, *names: str) -> None:
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # the first to leave must not take the other along
    programs = {name: posting.programs for name, posting in postings().items()}  # before anyone waits for anyone
    init_process_group("cuda")
    sent, received = (torch.zeros(int(message_bytes), dtype=torch.uint8, device="cuda") for _ in range(2))
    rank, peer = dist.get_rank(), 1 - dist.get_rank()
    # Connections are made by the first messages, and where those cross NCCL may fail instead of hanging.
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
        work.wait()
    with Path(folder, f"rank-{rank}.txt").open("w", encoding="utf-8") as told:
        for name in names:
            ended = follow(programs[name][rank], sent, received)
            print(name, "ran" if ended else "hung", file=told, flush=True)
            if not ended:
                time.sleep(PATIENCE_S)  # the other one has to see for itself
                os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
