"""Two ranks that do not do the same: ``disagree.py FOLDER``; the sentences they get go to ``rank-r.json``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from counterflow.errors import PipelineError
from counterflow.runtime import Pipeline
from counterflow.schedule import generate
from runtime.cases import ordinary_case


def sentence(call: Callable[[], object]) -> str:
    try:
        call()
    except PipelineError as error:
        return str(error)
    return "nothing was wrong"


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    case = ordinary_case("1f1b", 2, 3)
    data = case.steps[0]

    def pipeline(generator: str = "1f1b") -> Pipeline:
        schedule = generate(generator, 2, 4 if generator == "dualpipe" else 3)
        return Pipeline(schedule, {s: case.make(s) for s in schedule.stages_of(rank)}, case.loss_fn, timeout_s=30)

    def step(one: Pipeline) -> object:
        return one.step(data.inputs, data.targets)

    said = {}
    said["schedules"] = sentence(lambda: pipeline("gpipe" if rank else "1f1b"))
    one = pipeline()
    said["calls"] = sentence(lambda: one.evaluate(data.inputs, data.targets) if rank else step(one))
    said["the next call"] = sentence(lambda: step(one))
    other = pipeline()
    step(other)
    said["gathering"] = sentence(lambda: step(other) if rank else other.gather_timeline())
    copies = {0: nn.Linear(8, 8 + rank), 1: nn.Linear(8, 8)}
    said["twins"] = sentence(lambda: Pipeline(generate("dualpipe", 2, 4), copies, case.loss_fn))
    said["ranks"] = sentence(lambda: Pipeline(generate("1f1b", 3, 3), {rank: case.make(rank)}, case.loss_fn))
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
