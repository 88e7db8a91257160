"""A stretch of a forward between two transfers: an autograd graph by itself, from leaves to the edges of its outputs.

So a backward can stop wherever rows have to travel, and communication takes no part in autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from counterflow.runtime.weights import Roots, Split
from counterflow.runtime.wire import tensors_of, with_tensors


@dataclass
class Segment:
    """The graph of one compute step.

    It came from the leaves ``inputs``. Of its outputs it keeps the edges: ``roots`` are those of ``leaves``, which went
    on in the outputs' place, and the last one, if it ``sends``, that of rows, whose memory must not be kept.
    """

    inputs: list[Tensor]
    roots: Roots
    leaves: list[Tensor]
    sends: bool
    split: Split

    @classmethod
    def record(
        cls, split: Split, compute: Callable[..., Any], value: tuple[Any, ...], *, sends: bool
    ) -> tuple[Any, Segment]:
        """What ``compute(*value)`` gives, with leaves in the place of its tensors, and the segment.

        With ``sends`` it gives two: what is kept, and the rows to send, which stay in the graph.
        """
        with split.recording():
            result = compute(*value)
        kept, rows = result if sends else (result, None)
        made: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            leaf = tensor.detach()
            if tensor.requires_grad:
                made.append(tensor)
                leaves.append(leaf.requires_grad_())
            return leaf

        kept = with_tensors(kept, cut)
        sends = rows is not None and rows.requires_grad
        roots = split.roots([*made, *tensors_of(rows)] if sends else made)
        return kept if rows is None else (kept, rows), cls(_leaves(value), roots, leaves, sends, split)

    @classmethod
    def record_last(cls, split: Split, compute: Callable[..., Any], value: tuple[Any, ...]) -> tuple[Any, Segment]:
        """As ``record``; what it gives is not cut off, for a loss may be made of it and start the backward."""
        with split.recording():
            output = compute(*value)
        made = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        return output, cls(_leaves(value), split.roots(made), [], False, split)

    def backward(self, of_rows: Tensor | None = None) -> None:
        """Leaves a ``grad`` on each of the inputs, from those on the leaves and ``of_rows``."""
        grads = [leaf.grad for leaf in self.leaves] + ([of_rows] if self.sends else [])
        some = [(root, grad) for root, grad in zip(self.roots, grads, strict=True) if grad is not None]
        self.start([root for root, _ in some], [grad for _, grad in some])

    def start(self, roots: Sequence[Any], grads: list[Tensor]) -> None:
        """A backward from ``roots``."""
        self.leaves = []
        if roots:
            self.split.backward_input(roots, grads, self.inputs)


def _leaves(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(value) if tensor.requires_grad and tensor.is_leaf]
