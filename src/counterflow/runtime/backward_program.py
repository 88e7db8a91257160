"""The backward of a micro-batch as a program: through the segments that its forward has left, the last one first."""

from __future__ import annotations

from operator import methodcaller

import torch
from torch import Tensor

from counterflow.errors import PipelineError
from counterflow.runtime.chunk import Program
from counterflow.runtime.exchange import Rows
from counterflow.runtime.forward_program import ForwardProgram
from counterflow.runtime.segment import Segment
from counterflow.runtime.weights import Split
from counterflow.schedule.chunk_plans import backward_steps


class BackwardProgram(Program):
    """The backward that follows ``forward``, whose graphs it uses up.

    It starts from ``loss`` or, without one, from the gradients ``grads`` of the output's tensors that have one. The
    gradients of weights come with the ``(W)`` steps or, without ``weights``, with ``backward_weight``.
    """

    def __init__(
        self, forward: ForwardProgram, grads: list[Tensor] | None, loss: Tensor | None = None, *, weights: bool = True
    ) -> None:
        super().__init__(backward_steps(forward.chunk.shared, weights=weights))
        self._forward, self._grads, self._loss = forward, grads or [], loss
        self._waiting: dict[tuple[str, int], list[Split]] = {}
        self.deferred: set[int] = set()
        self._between = {id(leaf) for segment in forward.segments.values() for leaf in segment.inputs}
        last = len(forward.chunk.blocks)
        self._add("tail", "_tail", last, weights)
        for block in reversed(range(last)):
            self._do.append(methodcaller("_send"))
            if forward.chunk.shared[block]:
                self._add("shared", "_shared", block, weights)
            self._add("mlp", "_experts", block, weights)
            self._do.append(methodcaller("_send"))
            self._add("attn", "_before", block, weights)

    def backward_weight(self) -> None:
        """All of W that no step has done."""
        for name, block in list(self._waiting):
            self._weight(name, block)

    def _add(self, name: str, step: str, block: int, weights: bool) -> None:
        self._do.append(methodcaller(step, block))
        if weights:
            self._do.append(methodcaller("_weight", name, block))

    def _weight(self, name: str, block: int) -> None:
        for split in self._waiting.pop((name, block)):
            split.backward_weight()
            # Only a split that walks the graph meets another segment's inputs; for others torch ends in an error.
            if split.deferred() & self._between:
                where = "what follows the last rows" if name == "tail" else f"{name} of block {block}"
                raise PipelineError(
                    f"{where} reads, with gradient, what another part left on the module; gradients "
                    "flow from part to part through carry and rows only: put it into carry, or leave it detached"
                )
            self.deferred |= split.deferred()

    def _tail(self, last: int) -> None:
        segment = self._take("tail", last, "tail")
        if self._loss is None:
            segment.start(segment.roots, self._grads)
        else:
            segment.start([self._loss], [torch.ones_like(self._loss)])
        self._grads, self._loss = [], None
        self._return(last - 1)

    def _return(self, block: int) -> None:
        """The gradient of what a block got back goes to where it was made."""
        self._pack_grad(self._forward.returned.pop(block, None), block, self._forward.rows(block))

    def _shared(self, block: int) -> None:
        self._take("shared", block, "shared").backward()

    def _experts(self, block: int) -> None:
        self._take("mlp", block, "mlp").backward(self._land())
        self._pack_grad(self._forward.received.pop(block, None), block, self._forward.rows(block).back())

    def _before(self, block: int) -> None:
        rows = self._land()
        if ("attn-b", block) in self._forward.segments:
            self._take("attn-b", block, "attn").backward(rows)
            self._take("attn-a", block, "attn").backward()
        else:
            self._take("attn", block, "attn").backward(rows)
        if block > 0:
            self._return(block - 1)
        else:
            del self._forward  # W needs nothing of it but the splits

    def _take(self, name: str, block: int, step: str) -> Segment:
        segment = self._forward.segments.pop((name, block))
        self._waiting.setdefault((step, block), []).append(segment.split)
        return segment

    def _pack_grad(self, leaf: Tensor | None, block: int, rows: Rows) -> None:
        if leaf is not None:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self._pack(grad, self._forward.chunk.blocks[block].exchange, rows)
            leaf.grad = None
