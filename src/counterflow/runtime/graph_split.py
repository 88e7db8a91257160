"""The fall-back for the split of I and W: torch pipelining's walk over the autograd graph; it knows every operator."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from counterflow.runtime.weights import Roots


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
                    if grad is not None:
                        tensor.grad = grad if tensor.grad is None else tensor.grad + grad
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
