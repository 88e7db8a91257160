"""A stage that is made of blocks: its actions are programs of the chunk engine."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.runtime.backward_program import BackwardProgram
from counterflow.runtime.chunk import run
from counterflow.runtime.forward_program import ForwardProgram
from counterflow.runtime.sequence import Chunk
from counterflow.runtime.stage import Stage, gradients
from counterflow.runtime.weights import Split
from counterflow.runtime.wire import tensors_of
from counterflow.schedule.chunk_plans import TRAINING, ChunkPlan, Steps, lay_out, one_after_the_other


class BlockStage(Stage):
    """As ``Stage``, for an ``nn.Sequential`` with ``OverlapBlock`` in it; an F&B of two such hides their transfers."""

    def __init__(self, index: int, module: nn.Module, chunk: Chunk, split: type[Split]) -> None:
        super().__init__(index, module, split)
        self._chunk = chunk
        self._forwards: dict[int, ForwardProgram] = {}
        self._inputs: dict[int, list[Tensor]] = {}
        self._losses: dict[int, Tensor] = {}
        self._open: dict[int, BackwardProgram] = {}

    def forward(self, microbatch: int, value: Any, *, halved: bool) -> Any:
        """F."""
        program = self.start_forward(microbatch, value)
        run(_alone(program.steps), program)
        return program.take_output()

    def backward(self, microbatch: int, grads: list[Tensor] | None) -> list[Tensor]:
        """B."""
        program = self.start_backward(microbatch, grads, weights=True)
        run(_alone(program.steps), program)
        return self.end_backward(microbatch)

    def backward_input(self, microbatch: int, grads: list[Tensor] | None) -> list[Tensor]:
        """I."""
        program = self.start_backward(microbatch, grads, weights=False)
        run(_alone(program.steps), program)
        return self.end_backward(microbatch)

    def backward_weight(self, microbatch: int) -> None:
        """W."""
        program = self._open.pop(microbatch)
        program.backward_weight()
        self._remember(program.deferred)

    def start_forward(self, microbatch: int, value: Any) -> ForwardProgram:
        """F as a program, to be run by the caller."""
        program = ForwardProgram(self._chunk, value, lambda: self._split(self.module))
        if torch.is_grad_enabled():
            self._forwards[microbatch] = program
            self._inputs[microbatch] = [t for t in tensors_of(value) if t.requires_grad] if self.index > 0 else []
        return program

    def start_backward(self, microbatch: int, grads: list[Tensor] | None, *, weights: bool) -> BackwardProgram:
        """B, or I without ``weights``, as a program, to be run by the caller; ``end_backward`` follows it."""
        forward, loss = self._forwards.pop(microbatch), self._losses.pop(microbatch, None)
        program = BackwardProgram(forward, grads, loss, weights=weights)
        if not weights:
            self._open[microbatch] = program
        return program

    def end_backward(self, microbatch: int) -> list[Tensor]:
        """The gradients of the inputs."""
        return gradients(self._inputs.pop(microbatch))

    def forget(self) -> None:
        """Drop what a broken step left."""
        for kept in (self._forwards, self._inputs, self._losses, self._open):
            kept.clear()

    def _start_from(self, microbatch: int, loss: Tensor) -> None:
        self._losses[microbatch] = loss


def overlapped(forward: ForwardProgram, backward: BackwardProgram) -> None:
    """Run both so that each hides the other's transfers, in the published order."""
    run(_training(forward.steps, backward.steps), forward, backward)


@cache
def _alone(steps: Steps) -> ChunkPlan:
    return one_after_the_other(steps)


@cache
def _training(forward: Steps, backward: Steps) -> ChunkPlan:
    return lay_out(TRAINING, forward, backward)
