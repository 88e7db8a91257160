"""One stage on one rank: its module, and what its micro-batches in flight have stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from counterflow.errors import PipelineError
from counterflow.runtime.weights import Roots, Split, edges
from counterflow.runtime.wire import tensors_of

LossFn = Callable[[Any, Any], Tensor]


@dataclass
class _Stored:
    """What a forward leaves for its backward."""

    inputs: list[Tensor]
    roots: Roots
    split: Split | None


class Stage:
    """Computes one stage's actions, micro-batch by micro-batch.

    A value that flows is passed on as the next stage's argument, a tuple as its arguments.
    """

    def __init__(self, index: int, module: nn.Module, split: type[Split]) -> None:
        self.index = index
        self.module = module
        self._split = split
        self._stored: dict[int, _Stored] = {}
        self._halved: dict[int, Split] = {}
        self.deferred: set[int] | None = None

    def forward(self, microbatch: int, value: Any, *, halved: bool) -> Any:
        """F: the module's output. ``halved`` says that I and W will follow rather than B."""
        split = self._split(self.module) if halved else None
        with split.recording() if split else nullcontext():
            output = self.module(*value) if type(value) is tuple else self.module(value)
        if torch.is_grad_enabled():
            self._store(microbatch, value, output, split)
        return output

    def loss(self, microbatch: int, loss: object) -> None:
        """Let the backward of ``microbatch`` start from its loss in the place of the stage's output.

        Raises:
            PipelineError: the loss is not a scalar tensor that depends on a parameter.
        """
        if not is_scalar(loss) or not loss.requires_grad:
            raise PipelineError(
                f"the loss of micro-batch {microbatch} is {describe(loss)}; training needs a scalar tensor that "
                "depends on the parameters: return one from loss_fn, or from the last stage if there is no loss_fn"
            )
        self._start_from(microbatch, loss)

    def backward(self, microbatch: int, grads: list[Tensor] | None) -> list[Tensor]:
        """B: the gradient of each input that asked for one, zeros where the stage did not use it.

        ``grads`` are those of the outputs that require one; None on the stage that has the loss.
        """
        stored = self._stored.pop(microbatch)
        if stored.roots:
            torch.autograd.backward(stored.roots, grads)
        return gradients(stored.inputs)

    def backward_input(self, microbatch: int, grads: list[Tensor] | None) -> list[Tensor]:
        """I: as ``backward``, but what only the weights need is left for ``backward_weight``."""
        stored = self._stored.pop(microbatch)
        split = stored.split
        assert split is not None, f"{self.index}I{microbatch}: its forward was not told that it will be halved"
        if grads is None:
            grads = [torch.ones_like(root) for root in stored.roots if isinstance(root, Tensor)]
        split.backward_input(stored.roots, grads, stored.inputs)
        self._halved[microbatch] = split
        return gradients(stored.inputs)

    def backward_weight(self, microbatch: int) -> None:
        """W."""
        split = self._halved.pop(microbatch)
        split.backward_weight()
        self._remember(split.deferred())

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that collect gradients."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def forget(self) -> None:
        """Drop what a broken step left."""
        self._stored.clear()
        self._halved.clear()

    def _start_from(self, microbatch: int, loss: Tensor) -> None:
        self._stored[microbatch].roots = [loss]

    def _store(self, microbatch: int, value: Any, output: Any, split: Split | None) -> None:
        outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        # The first stage's inputs are the caller's own: whatever gradient they ask for stays on them.
        inputs = [tensor for tensor in tensors_of(value) if tensor.requires_grad] if self.index > 0 else []
        self._stored[microbatch] = _Stored(inputs, split.roots(outputs) if split else edges(outputs), split)

    def _remember(self, deferred: set[int]) -> None:
        matrices = [parameter for parameter in self.trainable() if parameter.dim() > 1]
        if not self.deferred and not deferred and matrices:
            warnings.warn(
                f"stage {self.index}: no weight gradient could be left for W, because none of its weights goes through "
                'torch.nn.functional.linear; I does all the work: try weight_split="graph"',
                stacklevel=2,
            )
        self.deferred = deferred | (self.deferred or set())


def gradients(inputs: list[Tensor]) -> list[Tensor]:
    """Takes the gradient of each, zeros where there is none."""
    grads = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    return grads


def is_scalar(loss: object) -> TypeGuard[Tensor]:
    """Whether a backward can start from ``loss``, as to its shape."""
    return isinstance(loss, Tensor) and loss.numel() == 1


def describe(loss: object) -> str:
    """What it is, for an error."""
    if not isinstance(loss, Tensor):
        return f"a {type(loss).__name__}"
    return f"a tensor of shape {list(loss.shape)}{'' if loss.requires_grad else ' without gradient'}"
