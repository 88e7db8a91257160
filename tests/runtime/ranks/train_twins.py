"""One rank of DualPipe over gloo under AdamW: ``train_twins.py FOLDER STEPS``; its stages go to ``rank-r.pt``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from counterflow.runtime import Pipeline
from runtime.cases import ordinary_case


def main(folder: str, num_steps: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    case = ordinary_case("dualpipe", dist.get_world_size(), 2 * dist.get_world_size())
    stages = case.stages_of(dist.get_rank())
    pipeline = Pipeline(case.schedule, stages, case.loss_fn, bucket_bytes=1000)
    optimiser = torch.optim.AdamW(pipeline.parameters(), lr=1e-2)
    for _ in range(int(num_steps)):
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)
        optimiser.step()
        optimiser.zero_grad()
    pipeline.close()
    states = {stage: module.state_dict() for stage, module in stages.items()}
    torch.save(states, Path(folder) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
