"""What the executor itself costs: DualPipeV on one rank with stages that compute next to nothing.

    python benchmarks/executor_overhead.py

The peer is torch's own ScheduleDualPipeV, in the same run and in turns; both run the same 2 stages and 64
micro-batches in one process, so that only the book-keeping differs. Prints microseconds for each stage and
micro-batch, and the ratio.
"""

import os
import socket
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

from counterflow import dualpipev
from counterflow.runtime import Pipeline

MICROBATCHES = 64
ROUNDS = 15


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).sum()


def ours(batch: Tensor) -> Callable[[], object]:
    schedule = dualpipev(1, MICROBATCHES)
    # The graph's walk is torch's way to cut I from W, and the one that fits a stage without F.linear.
    pipeline = Pipeline.in_process(schedule, [{0: Scale(), 1: Scale()}], loss, weight_split="graph")
    return lambda: pipeline.step(batch.chunk(MICROBATCHES), batch.chunk(MICROBATCHES))


def torch_pipelining(batch: Tensor) -> Callable[[], object]:
    cpu = torch.device("cpu")
    stages = [PipelineStage(Scale(), index, 2, cpu) for index in range(2)]
    schedule = ScheduleDualPipeV(stages, MICROBATCHES, loss_fn=loss, scale_grads=False)
    return lambda: schedule.step(batch, target=batch)


def microseconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e6 / (2 * MICROBATCHES)


def main() -> None:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=0, world_size=1)
    batch = torch.randn(MICROBATCHES, 2)
    sides = {"counterflow": ours(batch), "torch pipelining": torch_pipelining(batch)}
    for step in sides.values():
        step()
    rounds = [{name: microseconds(step) for name, step in sides.items()} for _ in range(ROUNDS)]
    for name in sides:
        print(f"{name:18} {median(row[name] for row in rounds):7.0f} µs for each stage and micro-batch")
    ratio = median(row["torch pipelining"] / row["counterflow"] for row in rounds)
    print(f"torch pipelining / counterflow: {ratio:.2f}, median of {ROUNDS} rounds in turns")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
