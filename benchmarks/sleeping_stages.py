"""Does a step take as long as it was predicted to?

Four processes run every schedule over gloo. Their stages sleep, for at least 80 ms and each for another time: in the
forward, in the backward for the input, and in a hook of their only weight, which is the backward for the weights.
A transport arrives late by 16 ms, counted as the simulator does from when both sides have posted. Sleeping processes
need no core of their own, so that this measures the executor and not the machine; what a busy machine adds to each
waking up is small beside sleeps this long:

    python benchmarks/sleeping_stages.py

Prints for each schedule the predicted and the measured time (the median of 5 steps, from the first action's start to
the last one's end); exits with 1 if any is off by more than 5 %. Needs torch, no GPU, two minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow import Costs, Schedule, simulate
from counterflow.runtime import Pipeline, launch
from counterflow.runtime.transport import Handle, Lane, Message, ProcessGroupTransport
from counterflow.schedule import GENERATORS, generate

NUM_RANKS, NUM_MICROBATCHES = 4, 8
STEPS = 5
LATENCY_US = 16_000
WORST_ERROR = 0.05


def costs_of(schedule: Schedule) -> Costs:
    """What each stage sleeps; B follows as I + W, and F&B as F + B."""
    stages = range(schedule.num_stages)
    return Costs(
        forward_us=tuple(80_000 + 14_000 * (stage % 4) for stage in stages),
        input_us=tuple(84_000 + 10_000 * (3 * stage % 4) for stage in stages),
        weight_us=tuple(80_000 + 6_000 * ((2 * stage + 1) % 5) for stage in stages),
        latency_us=LATENCY_US,
    )


# --- what a rank runs ---------------------------------------------------------------------------------------


class SleepInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0], None


class SleepingStage(nn.Module):
    def __init__(self, forward_s: float, input_s: float, weight_s: float) -> None:
        super().__init__()
        self.forward_s, self.input_s = forward_s, input_s
        self.weight = nn.Parameter(torch.eye(2))
        self.weight.register_post_accumulate_grad_hook(lambda _: time.sleep(weight_s))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.forward_s)
        return SleepInBackward.apply(nn.functional.linear(x, self.weight), self.input_s)


class LateTransport(ProcessGroupTransport):
    """Each message carries the time at which it was sent, and is let in when its latency is over."""

    def send(self, message: Message, tensors: list[Tensor]) -> Handle:
        stamp = [torch.tensor([time.perf_counter_ns()])] if message.lane is Lane.PIPELINE else []
        return super().send(message, [*tensors, *stamp])

    def receive(self, message: Message, tensors: list[Tensor]) -> Handle:
        if message.lane is not Lane.PIPELINE:
            return super().receive(message, tensors)
        stamp = torch.zeros(1, dtype=torch.int64)
        return LateHandle(super().receive(message, [*tensors, stamp]), stamp)


class LateHandle:
    def __init__(self, inner: Handle, sent_ns: Tensor) -> None:
        self.message = inner.message
        self._inner, self._sent_ns, self._posted_ns = inner, sent_ns, time.perf_counter_ns()

    def ready(self) -> bool:
        return False  # a process that is one rank does not ask

    def wait(self) -> None:
        self._inner.wait()
        arrival_ns = max(int(self._sent_ns), self._posted_ns) + LATENCY_US * 1000
        time.sleep(max(arrival_ns - time.perf_counter_ns(), 0) / 1e9)


def run_rank(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured_ns = {name: steps_ns(generate(name, NUM_RANKS, NUM_MICROBATCHES)) for name in names}
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(measured_ns), encoding="utf-8")
    dist.destroy_process_group()


def steps_ns(schedule: Schedule) -> list[int]:
    """The makespan of each step; the first one, in which shapes are learned, does not count."""
    costs = costs_of(schedule)
    seconds = zip(*(column for column in (costs.forward_us, costs.input_us, costs.weight_us)), strict=True)
    stages = dict(enumerate(SleepingStage(*(us / 1e6 for us in stage)) for stage in seconds))
    own = {stage: stages[stage] for stage in schedule.stages_of(dist.get_rank())}
    pipeline = Pipeline(schedule, own, lambda output, _: output.sum(), timeout_s=30, transport=LateTransport)
    inputs = [torch.ones(1, 2)] * schedule.num_microbatches
    found = []
    for _ in range(1 + STEPS):
        pipeline.step(inputs, inputs)
        timeline = pipeline.gather_timeline()
        # From the first action to the last: these stages' twins have next to nothing to sum.
        found.append(int(timeline.busy_ns()[0] + timeline.bubble_ns()[0]))
    pipeline.close()
    return found[1:]


# --- the comparison -----------------------------------------------------------------------------------------


def main(names: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        launch([sys.executable, __file__, "--rank", folder, *names], NUM_RANKS)
        measured_ns = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
    print(f"{NUM_RANKS} ranks, {NUM_MICROBATCHES} micro-batches, latency {LATENCY_US / 1000:g} ms, median of {STEPS}")
    print(f"{'schedule':24} {'predicted ms':>12} {'measured ms':>12} {'ratio':>7} {'error %':>8}")
    worst = 0.0
    for name in names:
        schedule = generate(name, NUM_RANKS, NUM_MICROBATCHES)
        predicted, measured = simulate(schedule, costs_of(schedule)).makespan_ns, median(measured_ns[name])
        error = measured / predicted - 1
        worst = max(worst, abs(error))
        figures = f"{predicted / 1e6:12.1f} {measured / 1e6:12.1f} {measured / predicted:7.4f} {100 * error:8.2f}"
        print(f"{name:24} {figures}")
    return int(worst > WORST_ERROR)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1:] or list(GENERATORS)))
