"""One rank of DualPipe with experts spread: ``pipelined.py FOLDER PIPELINE_RANKS EXPERT_RANKS MICROBATCHES``.

Process p is rank p // EXPERT_RANKS of its pipeline, and rank p % EXPERT_RANKS of those that share the experts of its
stages. What it found goes to ``rank-p.pt``.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow import dualpipe
from counterflow.moe import stage
from counterflow.runtime import Pipeline, ProcessGroupExchange
from moe.models import TINY, tokens
from moe.spreading import gradients, next_token_loss


def data(pipeline: int, microbatches: int) -> list[Tensor]:
    """The micro-batches of one pipeline; each is its own target."""
    return [tokens(1, 5 + m % 3, seed=100 * pipeline + m) for m in range(microbatches)]


def main(folder: str, *sizes: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pipeline_ranks, expert_ranks, microbatches = map(int, sizes)
    process = dist.get_rank()
    rank, number = divmod(process, expert_ranks)
    pipelines = [dist.new_group(list(range(e, dist.get_world_size(), expert_ranks))) for e in range(expert_ranks)]
    sharing = [dist.new_group(list(range(r * expert_ranks, (r + 1) * expert_ranks))) for r in range(pipeline_ranks)]
    schedule = dualpipe(pipeline_ranks, microbatches)
    exchange = ProcessGroupExchange(sharing[rank])
    stages = {
        index: stage(TINY, index, pipeline_ranks, exchange=exchange, dtype=torch.float64)
        for index in schedule.stages_of(rank)
    }
    pipeline = Pipeline(schedule, stages, next_token_loss, group=pipelines[number], timeout_s=60)
    own = data(number, microbatches)
    result = pipeline.step(own, own)
    found = {index: gradients([module]) for index, module in stages.items()}
    torch.save({"losses": result.losses, "gradients": found}, Path(folder) / f"rank-{process}.pt")
    pipeline.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
