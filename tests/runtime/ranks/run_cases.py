"""One rank of cases: ``run_cases.py FOLDER DEVICE CASE...``; what it found goes to ``rank-r.pt``.

Over gloo on the CPU; on "cuda" over NCCL, rank r on GPU r.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from counterflow.runtime import Pipeline
from runtime.cases import Case, gradients_of, named_case
from runtime.processes import init_process_group


def run(case: Case) -> dict[str, Any]:
    stages = case.stages_of(dist.get_rank())
    options = {"weight_split": case.weight_split, "bucket_bytes": case.bucket_bytes}
    pipeline = Pipeline(case.schedule, stages, case.loss_fn, timeout_s=60, **options)
    before = [pipeline.evaluate(data.inputs, data.targets).losses for data in case.steps]
    results = [pipeline.step(data.inputs, data.targets, outputs=True) for data in case.steps]
    after = [pipeline.evaluate(data.inputs, data.targets).losses for data in case.steps]
    timeline = pipeline.gather_timeline()
    pipeline.close()
    return {
        "gradients": {stage: gradients_of(module) for stage, module in stages.items()},
        "losses": [result.losses for result in results],
        "outputs": [result.outputs for result in results],
        "evaluated": [before, after],
        "timeline": [[span.rank, span.name, span.start_ns, span.end_ns] for span in timeline],
    }


def main(folder: str, device: str, *names: str) -> None:
    torch.set_num_threads(1)
    init_process_group(device)
    found = {name: run(named_case(name).on(device)) for name in names}
    torch.save(found, Path(folder) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
