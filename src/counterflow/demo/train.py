"""One process of the demo: a rank of the pipeline, or on a single GPU all of them.

Run by ``counterflow demo``; the first rank leaves its progress and its measurements as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.demo.model import DecoderStage, StandardLibrary, cross_entropy
from counterflow.files import write_text
from counterflow.runtime import Pipeline
from counterflow.schedule import Kind, Schedule, read_schedule
from counterflow.timeline import to_chrome

SIZE = 4
"""Sequences in a micro-batch."""
WARM_UP = 3
"""Steps that are not measured: allocators and caches fill."""
MEASURED = 20
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Settings:
    """What every process of the demo is told."""

    schedule: Schedule
    steps: int
    device: str
    out: Path


class Trainer:
    """A pipeline, its optimiser, and the text, on this process's share of the ranks."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        schedule = settings.schedule
        self._distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self._distributed else 0
        self.device = _device(settings.device, self.rank)
        self.text = StandardLibrary()
        if self._distributed:
            self.pipeline = Pipeline(schedule, self._stages(self.rank), self._loss, timeout_s=30.0)
        else:
            ranks = [self._stages(rank) for rank in range(schedule.num_ranks)]
            self.pipeline = Pipeline.in_process(schedule, ranks, self._loss)
        self.optimizer = torch.optim.AdamW(self.pipeline.parameters(), lr=LEARNING_RATE)

    def _stages(self, rank: int) -> dict[int, DecoderStage]:
        count = self.settings.schedule.num_stages
        return {stage: DecoderStage(stage, count).to(self.device) for stage in self.settings.schedule.stages_of(rank)}

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target) / self.settings.schedule.num_microbatches

    def batch(self, part: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """The micro-batches of one step."""
        inputs, targets = self.text.batch(part, seed, self.settings.schedule.num_microbatches, SIZE)
        return [x.to(self.device) for x in inputs], [y.to(self.device) for y in targets]

    def step(self, seed: int) -> float:
        """Train on one batch; its mean loss for each byte."""
        losses = self.pipeline.step(*self.batch("train", seed)).losses
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._total(losses)

    def held_out(self) -> float:
        """The mean loss on text that is never trained on."""
        return self._total(self.pipeline.evaluate(*self.batch("held out", seed=0)).losses)

    def _total(self, losses: dict[int, Tensor]) -> float:
        """The sum over the micro-batches, which end on different ranks."""
        total = torch.stack([torch.zeros((), device=self.device), *losses.values()]).sum()
        if self._distributed:
            dist.all_reduce(total)
        return float(total)

    def check_gradients(self) -> dict[str, Any]:
        """One step beside a single process that runs the whole model: the largest difference, and where it is zero."""
        inputs, targets = self.batch("train", seed=0)
        self.pipeline.step(inputs, targets)
        expected = self._single_process(inputs, targets)
        largest = torch.zeros((), device=self.device)
        for modules in self.pipeline.stages.values():
            for stage, module in modules.items():
                for parameter, gradient in zip(module.parameters(), expected[stage], strict=True):
                    assert parameter.grad is not None
                    largest = torch.maximum(largest, (parameter.grad - gradient).abs().max())
        if self._distributed:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self.optimizer.zero_grad()
        return {"largest_difference": float(largest), "bitwise_equal": float(largest) == 0.0}

    def _single_process(self, inputs: list[Tensor], targets: list[Tensor]) -> list[list[Tensor]]:
        """For each stage its gradients: the same micro-batches in order, each direction's summed apart, then added."""
        count = self.settings.schedule.num_stages
        parts = []
        for microbatches in directions(self.settings.schedule):
            stages = [DecoderStage(stage, count).to(self.device) for stage in range(count)]
            for m in microbatches:
                value = inputs[m]
                for stage in stages:
                    value = stage(value)
                torch.autograd.backward(self._loss(value, targets[m]))
            parts.append([[p.grad for p in stage.parameters() if p.grad is not None] for stage in stages])
        return [[sum(grads[1:], grads[0]) for grads in zip(*stage, strict=True)] for stage in zip(*parts, strict=True)]


def directions(schedule: Schedule) -> list[list[int]]:
    """The micro-batches by the rank at which they enter: two lists for DualPipe, one for the others."""
    return [
        [
            part.microbatch
            for action in schedule.rows[rank]
            for part in action.parts
            if part.kind is Kind.F and part.stage == 0
        ]
        for rank in schedule.ranks_of(0)
    ]


def _device(kind: str, rank: int) -> torch.device:
    if kind != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", rank if torch.cuda.device_count() > 1 else 0)
    torch.cuda.set_device(device)
    return device


def train(settings: Settings) -> None:
    """All of it; rank 0 writes ``progress.json`` at every step and ``measured.json`` at the end."""
    trainer = Trainer(settings)
    gradients = trainer.check_gradients()
    before = trainer.held_out()
    losses, timelines, started = [], [], time.monotonic()
    for step in range(settings.steps):
        losses.append(trainer.step(seed=step))
        if WARM_UP <= step < WARM_UP + MEASURED:
            timelines.append(trainer.pipeline.gather_timeline())
        if trainer.rank == 0:
            write_text(settings.out / "progress.json", json.dumps({"step": step + 1, "loss": losses[-1]}))
    seconds = time.monotonic() - started
    after = trainer.held_out()
    if trainer.rank == 0:
        measured = {
            "parameters": _num_parameters(settings.schedule),
            "text_bytes": trainer.text.num_bytes,
            "gradients": gradients,
            "losses": losses,
            "held_out": {"before": before, "after": after},
            "seconds": seconds,
            "deferred_weights": trainer.pipeline.deferred_weights(),
            "timelines": [to_chrome(timeline) for timeline in timelines],
        }
        write_text(settings.out / "measured.json", json.dumps(measured))
    trainer.pipeline.close()


def _num_parameters(schedule: Schedule) -> int:
    stages = [DecoderStage(stage, schedule.num_stages) for stage in range(schedule.num_stages)]
    return sum(parameter.numel() for stage in stages for parameter in stage.parameters())


def main() -> None:
    """The entry of a process that ``counterflow demo`` started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", choices=("gloo", "nccl", "none"), required=True)
    given = parser.parse_args()
    # One thread for each rank: the ranks share the cores already, and the order of every sum stays the same.
    torch.set_num_threads(1)
    if given.backend != "none":
        dist.init_process_group(given.backend)
    train(Settings(read_schedule(given.schedule), given.steps, given.device, given.out))
    if given.backend != "none":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
