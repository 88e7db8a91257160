"""One rank of a pipeline: its stages, an executor for each mode over them, and the twins it shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from counterflow.errors import PipelineError
from counterflow.runtime.batch import Batch
from counterflow.runtime.block_stage import BlockStage
from counterflow.runtime.clock import Clock
from counterflow.runtime.executor import Executor
from counterflow.runtime.heartbeat import Watch
from counterflow.runtime.sequence import Chunk
from counterflow.runtime.stage import LossFn, Stage
from counterflow.runtime.transport import Handle, Transport
from counterflow.runtime.twins import Twins
from counterflow.runtime.weights import Split
from counterflow.schedule import Schedule, Transfers
from counterflow.timeline import Span


@dataclass(frozen=True)
class Equipment:
    """What all ranks of a process have alike; ``transfers`` are those of each mode."""

    transfers: Mapping[str, Transfers]
    loss_fn: LossFn | None
    transport: Transport
    clock: Clock
    split: type[Split]
    bucket_bytes: int


@dataclass
class Rank:
    """Takes part in steps; a generator of what it waits for, as the executor is."""

    index: int
    modules: Mapping[int, nn.Module]
    equipment: Equipment
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        have = self.equipment
        schedule = have.transfers["train"].schedule
        self.stages = {stage: _stage(stage, module, have.split) for stage, module in self.modules.items()}
        device = device_of(self.modules)
        self.executors = {
            mode: Executor(
                self.index, transfers, self.stages, have.loss_fn, have.transport, have.clock, device, self.watch
            )
            for mode, transfers in have.transfers.items()
        }
        self.twins = Twins(self.index, self.modules, schedule.twins, have.transport, have.clock, have.bucket_bytes)

    def step(self, mode: str, batch: Batch, learn_shapes: bool) -> Iterator[Handle]:
        """The program, and in training the twins' gradients behind it."""
        if mode == "train":
            self.twins.set_aside()
        yield from self.executors[mode].run(batch, learn_shapes)
        if mode == "train":
            self.watch.waiting("the gradients of twins")
            yield from self.twins.reduce()
        self.watch.between_steps()

    def spans(self, mode: str) -> list[Span]:
        """What this rank did in its last step, of that mode."""
        return self.executors[mode].spans() + (self.twins.spans() if mode == "train" else [])

    def forget(self) -> None:
        """Drop what a broken step left; gradients of twins are again those of before it."""
        for executor in self.executors.values():
            executor.forget()
        self.twins.restore()
        self.watch.between_steps()


def _stage(index: int, module: nn.Module, split: type[Split]) -> Stage:
    chunk = Chunk.of(module)
    return Stage(index, module, split) if chunk is None else BlockStage(index, module, chunk, split)


def refuse_stages(schedule: Schedule, index: int, modules: Mapping[int, nn.Module]) -> None:
    """Raise PipelineError where they are not those that rank ``index`` holds under ``schedule``."""
    is_mapping = isinstance(modules, Mapping)
    if not is_mapping or set(modules) != set(schedule.stages_of(index)):
        got = f"stages {list(modules)}" if is_mapping else f"a {type(modules).__name__}"
        raise PipelineError(
            f"rank {index} got {got} and holds {list(schedule.stages_of(index))} under {schedule.name}; "
            "build {stage: module for stage in schedule.stages_of(rank)}"
        )
    for stage, module in modules.items():
        if not isinstance(module, nn.Module):
            raise PipelineError(f"stage {stage} of rank {index} is a {type(module).__name__}; give an nn.Module")


def device_of(modules: Mapping[int, nn.Module]) -> torch.device:
    """Where the stages live; activations arrive there."""
    for module in modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")
