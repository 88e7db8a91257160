"""The split of a backward into I and W: what a way to do it has to offer, and the usual way.

``LinearSplit`` cuts at the operator: during F and I it stands in for ``torch.nn.functional.linear`` and hides the
weight from autograd, so that I is a plain backward which leaves (input, gradient of output) behind, and W one
matrix product for each. It works under activation checkpointing, whose recomputation calls the same function, and
fires each weight's hooks once, at W. The other way, ``graph_split.py``, knows every operator and costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Roots = Sequence[Tensor] | Sequence[GradientEdge]
"""What a backward starts from."""


class Split(Protocol):
    """One micro-batch's backward at one stage, cut in two."""

    def __init__(self, module: nn.Module) -> None: ...

    def recording(self) -> AbstractContextManager[None]:
        """Stands around the forward."""

    def roots(self, outputs: list[Tensor]) -> Roots:
        """What to keep of the outputs to start the backward from."""

    def backward_input(self, roots: Roots, grads: list[Tensor], inputs: list[Tensor]) -> None:
        """I: leaves a ``grad`` on each of the inputs."""

    def backward_weight(self) -> None:
        """W: adds what is left to the ``grad`` of the parameters."""

    def deferred(self) -> set[int]:
        """The ids of the parameters whose gradients have waited for W."""


def edges(outputs: list[Tensor]) -> list[GradientEdge]:
    """The places in the graph where ``outputs`` stand, so that the tensors themselves can be freed once sent."""
    return [get_gradient_edge(output) for output in outputs]


_recording: LinearSplit | None = None


def recording_split() -> LinearSplit | None:
    """Who collects the weight gradients of the forward that runs now; None where nobody does.

    A ``torch.autograd.Function`` with a parameter of its own asks this in its forward. If there is one, it hides the
    weight from autograd (in a tuple), and its backward calls ``later`` on it instead of returning its gradient.
    """
    return _recording


class LinearSplit:
    """Defers the weight gradient of every ``F.linear``, and of functions that ask ``recording_split``; the rest (norms,
    biases, embeddings) is done in I.

    ``from torch.nn.functional import linear``, ``x @ weight``, computed weights and fused attention pass it by:
    ``deferred`` tells.

    Source: the idea is the WeightGradStore of the published DualPipe, without its hand-written Linear.
    """

    def __init__(self, module: nn.Module) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self._deferred: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Puts the deferring function in the place of ``F.linear``, for this thread's caller and for autograd's."""
        global _recording
        original, outer = torch.nn.functional.linear, _recording
        torch.nn.functional.linear, _recording = self._linear_in_place_of(original), self
        try:
            yield
        finally:
            torch.nn.functional.linear, _recording = original, outer

    def roots(self, outputs: list[Tensor]) -> Roots:
        """Edges are enough."""
        return edges(outputs)

    def backward_input(self, roots: Roots, grads: list[Tensor], inputs: list[Tensor]) -> None:
        """A plain backward; recording, because a checkpoint runs its forward in here."""
        with self.recording():
            torch.autograd.backward(roots, grads)

    def backward_weight(self) -> None:
        """One product for each deferred call, summed for each weight, handed to autograd at once."""
        sums: dict[int, tuple[Tensor, Tensor]] = {}
        for weight, product_of in self._waiting:
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                product = product_of().to(weight.dtype)
            before = sums.get(id(weight))
            sums[id(weight)] = (weight, product if before is None else before[1] + product)
        self._waiting.clear()
        if sums:
            # Through a view rather than the leaf itself, so that its hooks fire as in any backward.
            views = [weight if weight.grad_fn is not None else weight.view_as(weight) for weight, _ in sums.values()]
            torch.autograd.backward(views, [product for _, product in sums.values()])

    def deferred(self) -> set[int]:
        """The ids of the weights that went through ``F.linear``."""
        return self._deferred

    def later(self, weight: Tensor, product: Callable[[], Tensor]) -> None:
        """W will call ``product`` for the gradient of ``weight``."""
        self._waiting.append((weight, product))
        self._deferred.add(id(weight))

    def _linear_in_place_of(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            # Only a parameter can wait: the gradient of anything computed may be needed in I.
            waits = torch.is_grad_enabled() and weight.requires_grad and isinstance(weight, nn.Parameter)
            if not waits or torch.compiler.is_compiling():
                return original(input, weight, bias)
            if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
                return original(input, weight, bias)  # linear takes these too, but they are no matrix product
            device = input.device.type
            cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            if weight.dtype == torch.float64:
                cast = None  # autocast leaves double precision alone
            if cast is not None:
                input, bias = input.to(cast), None if bias is None else bias.to(cast)
            # An input without gradient (the first stage's) would end the graph here and lose the weight's.
            anchor = None if input.requires_grad else input.new_empty((), requires_grad=True)
            with torch.autocast(device, enabled=False):
                out: Tensor = _DeferredLinear.apply(input, bias, anchor, (weight, cast), self, original)  # type: ignore[no-untyped-call]
            return out

        return linear


class _DeferredLinear(torch.autograd.Function):
    """``F.linear`` whose backward gives the gradients of input and bias, and hands over what the weight needs.

    The weight comes in a tuple, where autograd does not see it: else it would be given None in I, and its hooks would
    fire there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        weight_and_cast: tuple[Tensor, torch.dtype | None],
        split: LinearSplit,
        original: Callable[..., Tensor],
    ) -> Tensor:
        weight, cast = weight_and_cast
        ctx.weight, ctx.cast, ctx.split = weight, cast, split
        ctx.save_for_backward(input)
        return original(input, weight if cast is None else weight.to(cast), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        # Detached, so that what is left for W does not keep the graph, which keeps this.
        input = ctx.saved_tensors[0].detach()
        weight = ctx.weight.detach() if ctx.cast is None else ctx.weight.detach().to(ctx.cast)
        ctx.split.later(ctx.weight, lambda: grad.reshape(-1, grad.shape[-1]).t().mm(input.reshape(-1, input.shape[-1])))
        grad_input = grad.matmul(weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_input, grad_bias, None, None, None, None
