"""Train until something goes wrong: ``fail.py FOLDER HOW GENERATOR TIMEOUT_S [DEVICE]``.

In its second step the rank in the middle fails HOW: raise, kill, stop or sleep in the forward of its third
micro-batch; stay away or leave between steps; never arrive, or crash, before its pipeline is built. With
HOW "train" nothing happens, for ever. When it fails it leaves the file ``failed``.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from counterflow.runtime import Pipeline
from runtime.cases import ordinary_case
from runtime.processes import init_process_group

MICROBATCHES = {"1f1b": 6, "dualpipe": 8}


class Failing(nn.Module):
    def __init__(self, inner: nn.Module, at: int, fail: Callable[[], None]) -> None:
        super().__init__()
        self.inner, self.left, self.fail = inner, at, fail

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.fail()
        return self.inner(x)


def failure(folder: Path, how: str) -> None:
    (folder / "failed").touch()
    match how:
        case "raise" | "crash":
            raise ValueError("as asked")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep" | "stay away" | "never arrive":
            time.sleep(1000)
        case "leave":
            sys.exit(0)


def main(folder_name: str, how: str, generator: str, timeout_s: str, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    folder = Path(folder_name)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()), encoding="utf-8")
    the_one = rank == num_ranks // 2
    init_process_group(device)
    if the_one and how in ("crash", "never arrive"):
        failure(folder, how)
    case = ordinary_case(generator, num_ranks, MICROBATCHES[generator]).on(device)
    stages = case.stages_of(rank)
    if the_one and how in ("raise", "kill", "stop", "sleep"):
        at = sum(part.stage == 1 and part.kind == "F" for action in case.schedule.rows[rank] for part in action.parts)
        stages[1] = Failing(stages[1], at + 3, lambda: failure(folder, how))
    pipeline = Pipeline(case.schedule, stages, case.loss_fn, timeout_s=float(timeout_s))
    data = case.steps[0]
    pipeline.step(data.inputs, data.targets)
    (folder / f"trained-{rank}").touch()
    if the_one and how in ("stay away", "leave"):
        failure(folder, how)
    pipeline.step(data.inputs, data.targets)
    while how == "train":
        pipeline.step(data.inputs, data.targets)


if __name__ == "__main__":
    main(*sys.argv[1:])
