"""One matrix product for each group of rows, with a weight gradient that can wait for W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from counterflow.runtime.weights import LinearSplit, recording_split


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``rows`` [rows, in] of group g times the transpose of ``weight[g]``: [rows, out].

    ``weight`` is [groups, out, in]; ``ends``, int32 [groups], says behind which row each group ends, and the last
    group ends with the rows. On a GPU bfloat16 goes through one kernel that reads ``ends`` there; everything else
    through a loop, for which the host has to know them.

    Example:
        >>> import torch
        >>> from counterflow.moe.grouped import grouped_linear
        >>> weight = torch.tensor([[[1.0]], [[10.0]]])
        >>> grouped_linear(torch.ones(3, 1), weight, torch.tensor([1, 3], dtype=torch.int32)).flatten().tolist()
        [1.0, 10.0, 10.0]
    """
    rows = rows.to(weight.dtype)  # under autocast it may be another
    split = recording_split() if _waits(weight) else None
    if split is None:
        out: Tensor = _GroupedLinear.apply(rows, weight, None, (weight,), ends, None)  # type: ignore[no-untyped-call]
        return out
    # Rows without gradient would end the graph here and lose the weight's.
    anchor = None if rows.requires_grad else rows.new_empty((), requires_grad=True)
    deferred: Tensor = _GroupedLinear.apply(rows, None, anchor, (weight,), ends, split)  # type: ignore[no-untyped-call]
    return deferred


def _waits(weight: Tensor) -> bool:
    """Only a parameter's gradient can wait for W: that of anything computed may be needed in I."""
    return torch.is_grad_enabled() and weight.requires_grad and isinstance(weight, nn.Parameter)


class _GroupedLinear(torch.autograd.Function):
    """With a split, autograd does not see the weight (it comes in a tuple only), and its gradient is left for W."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        seen: Tensor | None,
        anchor: Tensor | None,
        hidden: tuple[Tensor],
        ends: Tensor,
        split: LinearSplit | None,
    ) -> Tensor:
        (ctx.weight,), ctx.split = hidden, split
        ctx.save_for_backward(rows, ends)
        with torch.autocast(rows.device.type, enabled=False):  # as in the backward
            return times_weights(rows, ctx.weight.detach(), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends = (saved.detach() for saved in ctx.saved_tensors)  # what is left for W must not keep the graph
        grad = grads[0].contiguous()
        grad_weight = None
        if ctx.split is not None:
            ctx.split.later(ctx.weight, lambda: weight_products(grad, rows, ends))
        elif ctx.needs_input_grad[1]:
            grad_weight = weight_products(grad, rows, ends)
        weight = ctx.weight.detach()
        grad_rows = times_weights(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        return grad_rows, grad_weight, None, None, None, None


def times_weights(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The rows of each group times the transpose of its weight."""
    if has_kernel(rows):
        return torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return torch.cat([part @ weight[group].t() for group, part in enumerate(_parts(rows, ends))])


def weight_products(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the weights [groups, out, in]: in each group that of its results, transposed, times its rows."""
    if has_kernel(rows):
        return torch._grouped_mm(grad.t(), rows, offs=ends)
    return torch.stack([g.t() @ x for g, x in zip(_parts(grad, ends), _parts(rows, ends), strict=True)])


def has_kernel(rows: Tensor) -> bool:
    """Whether one kernel does all groups; it takes at least one row."""
    return rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows) > 0


def _parts(rows: Tensor, ends: Tensor) -> list[Tensor]:
    stops = ends.tolist()
    return [rows[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
