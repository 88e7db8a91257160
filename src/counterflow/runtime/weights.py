"""The split of a backward into I and W: three calls, and two ways to keep them.

``LinearSplit`` cuts at the operator: during F and I it stands in for ``torch.nn.functional.linear`` and hides the
weight from autograd, so that I is a plain backward which leaves (input, gradient of output) behind, and W one
matrix product for each. It works under activation checkpointing, whose recomputation calls the same function, and
fires each weight's hooks once, at W. ``GraphSplit`` walks the autograd graph: it knows every operator, and costs more
the smaller they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Roots = Sequence[Tensor] | Sequence[GradientEdge]
"""What a backward starts from."""


class Split(Protocol):
    """One micro-batch's backward at one stage, cut in two."""

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


class LinearSplit:
    """Defers the weight gradient of every ``F.linear``; the rest (norms, biases, embeddings) is done in I.

    ``from torch.nn.functional import linear``, ``x @ weight`` and fused attention pass it by: ``deferred`` tells.

    Source: the idea is the WeightGradStore of the published DualPipe, without its hand-written Linear.
    """

    def __init__(self, module: nn.Module) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._deferred: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Puts the deferring function in the place of ``F.linear``, for this thread's caller and for autograd's."""
        original = torch.nn.functional.linear
        torch.nn.functional.linear = self._linear_in_place_of(original)
        try:
            yield
        finally:
            torch.nn.functional.linear = original

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
        for weight, x, grad in self._waiting:
            with torch.autocast(x.device.type, enabled=False):
                product = grad.reshape(-1, grad.shape[-1]).t().mm(x.reshape(-1, x.shape[-1])).to(weight.dtype)
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

    def later(self, weight: Tensor, x: Tensor, grad: Tensor) -> None:
        """The gradient of ``weight`` [out, in] will be ``grad`` [..., out] times ``x`` [..., in]."""
        self._waiting.append((weight, x, grad))
        self._deferred.add(id(weight))

    def _linear_in_place_of(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if not (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
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
        (input,) = ctx.saved_tensors
        weight = ctx.weight.detach() if ctx.cast is None else ctx.weight.detach().to(ctx.cast)
        ctx.split.later(ctx.weight, input, grad)
        grad_input = grad.matmul(weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_input, grad_bias, None, None, None, None


class GraphSplit:
    """Cuts at the nodes of the autograd graph where the way to a parameter leaves the way to the stage's inputs.

    I runs the graph down to the inputs and keeps what arrives at these nodes; W goes on from there to the parameters.
    It knows every operator, and pays for it: both halves of a custom Function run twice, a checkpoint recomputes once
    more for each group of parameters, and a weight used twice takes I's way between its uses again.

    Source: the walk of torch pipelining (``_backward.py``), on one root, so that outputs may be views and parameters
    may lead to an output around the inputs.
    """

    def __init__(self, module: nn.Module) -> None:
        self._groups: list[_Group] = []
        self._deferred: set[int] = set()
        self._root: Tensor | None = None

    def recording(self) -> AbstractContextManager[None]:
        """Nothing to record."""
        return nullcontext()

    def roots(self, outputs: list[Tensor]) -> Roots:
        """Tensors, to be gathered under one root."""
        return outputs

    def backward_input(self, roots: Roots, grads: list[Tensor], inputs: list[Tensor]) -> None:
        """With no input to reach (the first stage's are token ids) everything is left to W."""
        if not roots:
            return
        root: Tensor = _Root.apply(grads, *roots)  # type: ignore[no-untyped-call]
        top = root.grad_fn
        assert top is not None, "every root requires a gradient"
        parents = _parents(top)
        ends = {get_gradient_edge(tensor).node for tensor in inputs}
        above_inputs = _upwards(ends, parents)
        to_inputs = above_inputs or {top}
        leaves = [node for node in parents if hasattr(node, "variable") and node not in ends]
        self._groups = _grouped({leaf: _upwards({leaf}, parents, until=to_inputs) & to_inputs for leaf in leaves})
        self._deferred = {id(leaf.variable) for group in self._groups for leaf in group.leaves}
        arrived: dict[Node, tuple[Tensor | None, ...]] = {top: (torch.ones_like(root),)}
        hooks = [node.register_prehook(_keep_in(arrived, node)) for group in self._groups for node in group.cut]
        try:
            if above_inputs:
                found = torch.autograd.grad(root, inputs, retain_graph=True, allow_unused=True)
                for tensor, grad in zip(inputs, found, strict=True):
                    tensor.grad = grad
        finally:
            for hook in hooks:
                hook.remove()
        for group in self._groups:
            group.arrived = {node: arrived[node] for node in group.cut if node in arrived}
        # A node that Python wrote lives only as long as what it leads to.
        if any(isinstance(node, BackwardCFunction) for group in self._groups for node in group.cut):
            self._root = root

    def backward_weight(self) -> None:
        """Goes on from where I stopped."""
        for group in self._groups:
            group.backward()
        self._groups, self._root = [], None

    def deferred(self) -> set[int]:
        """The ids of all parameters that the stage used."""
        return self._deferred


class _Root(torch.autograd.Function):
    """One scalar above all outputs, whose backward hands them their gradients."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


@dataclass
class _Group:
    """Parameters, as leaves of the graph, that share nodes of the cut, and the gradients that arrived at these."""

    leaves: list[Any]
    cut: set[Node]
    arrived: dict[Node, tuple[Tensor | None, ...]] = field(default_factory=dict)

    def backward(self) -> None:
        """From the cut to the leaves; between two nodes of the cut what arrived in I stands, and is not added to."""
        starts = [
            (GradientEdge(node, index), grad)
            for node, grads in self.arrived.items()
            for index, grad in enumerate(grads)
            if grad is not None
        ]
        hooks = [node.register_prehook(lambda _, grads=grads: grads) for node, grads in self.arrived.items()]
        try:
            # Other groups may pass the same nodes, so the buffers stay until the last reference goes.
            torch.autograd.backward(
                [edge for edge, _ in starts],
                [grad for _, grad in starts],
                retain_graph=True,
                inputs=[leaf.variable for leaf in self.leaves],
            )
        finally:
            for hook in hooks:
                hook.remove()


def _parents(top: Node) -> dict[Node, list[Node]]:
    """For each node under ``top``, and for itself, the nodes that lead to it."""
    parents: dict[Node, list[Node]] = {top: []}
    waiting = [top]
    while waiting:
        node = waiting.pop()
        for child, _ in node.next_functions:
            if child is not None:
                if child not in parents:
                    parents[child] = []
                    waiting.append(child)
                parents[child].append(node)
    return parents


def _upwards(nodes: set[Node], parents: dict[Node, list[Node]], until: Collection[Node] = ()) -> set[Node]:
    """All nodes that lead to these, themselves included; the search ends at ``until``."""
    found = {node for node in nodes if node in parents}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        if node not in until:
            new = set(parents[node]) - found
            found |= new
            waiting += new
    return found


def _grouped(cuts: dict[Node, set[Node]]) -> list[_Group]:
    """Leaves whose cuts meet belong together."""
    group_at: dict[Node, _Group] = {}
    for leaf, cut in cuts.items():
        together = _Group([leaf], cut)
        for other in {id(group_at[node]): group_at[node] for node in cut if node in group_at}.values():
            together = _Group([*other.leaves, *together.leaves], other.cut | together.cut)
        group_at |= dict.fromkeys(together.cut, together)
    return list({id(group): group for group in group_at.values()}.values())


def _keep_in(arrived: dict[Node, tuple[Tensor | None, ...]], node: Node) -> Callable[[Any], None]:
    def keep(grads: tuple[Tensor | None, ...]) -> None:
        arrived[node] = grads

    return keep


SPLITS: dict[str, type[LinearSplit] | type[GraphSplit]] = {"linear": LinearSplit, "graph": GraphSplit}
