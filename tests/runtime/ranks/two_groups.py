"""Two pipelines of two ranks each, in groups of their own: ``two_groups.py FOLDER``; world rank 3 is killed."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from counterflow.runtime import Pipeline
from runtime.cases import block, ordinary_case
from runtime.ranks.fail import Failing, failure


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[world % 2]
    case = ordinary_case("1f1b", 2, 4)
    rank = dist.get_rank(group)
    stages = case.stages_of(rank)
    if world == 3:
        stages[1] = Failing(block(1), 4 + 3, lambda: failure(Path(folder), "kill"))
    pipeline = Pipeline(case.schedule, stages, case.loss_fn, group=group, timeout_s=5)
    losses = pipeline.step(case.steps[0].inputs, case.steps[0].targets).losses
    torch.save(losses, Path(folder) / f"rank-{world}.pt")
    for _ in range(3):
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)
        dist.barrier(group)


if __name__ == "__main__":
    main(*sys.argv[1:])
