"""Rotary positions: the last features of a row are turned, pair by pair, by angles that grow with its position."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from counterflow.moe.kernels import can_turn


def turned_behind(x: Tensor, positions: Tensor, features: int, base: float) -> Tensor:
    """``x`` [..., positions, heads, any] with the last ``features`` of each row turned, in float32 or finer.

    ``positions`` is one-dimensional; all heads are turned alike. In bfloat16 on a GPU one kernel turns and copies, and
    the same one turns the gradient back.
    """
    if can_turn(x, features):
        turned: Tensor = _Turned.apply(x, positions, features, base)  # type: ignore[no-untyped-call]
        return turned
    return turned_plainly(x, positions, features, base)


def turned_plainly(x: Tensor, positions: Tensor, features: int, base: float) -> Tensor:
    """The same, step by step."""
    straight, turning = torch.split(x, [x.shape[-1] - features, features], dim=-1)
    return torch.cat([straight, rotated(turning, turns(positions, features, base, x.dtype)[:, None])], dim=-1)


def turns(positions: Tensor, features: int, base: float, dtype: torch.dtype) -> Tensor:
    """By what each pair of features is turned at ``positions`` [...]: complex [..., features / 2]."""
    precise = torch.promote_types(dtype, torch.float32)
    angles = positions.to(precise).unsqueeze(-1) * rates(features, base, positions.device, precise)
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """``x`` [..., features] with each pair of neighbouring features turned."""
    precise = torch.promote_types(x.dtype, torch.float32)
    # Not contiguous(), which leaves a single row where it is, however odd its place.
    pairs = torch.unflatten(x.to(precise), -1, (-1, 2)).clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(pairs)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def rates(features: int, base: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """By how much each pair of ``features`` is turned from one position to the next: [features / 2]."""
    return base ** -(torch.arange(0, features, 2, device=device, dtype=dtype) / features)


class _Turned(torch.autograd.Function):
    """Its gradient is turned the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, features: int, base: float) -> Tensor:
        from counterflow.moe.kernels.rotary_kernel import turn_by_kernel

        ctx.save_for_backward(positions)
        ctx.pairs = features, base
        return turn_by_kernel(x, positions, kept_rates(features, base, x.device), 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from counterflow.moe.kernels.rotary_kernel import turn_by_kernel

        (positions,), (features, base) = ctx.saved_tensors, ctx.pairs
        return turn_by_kernel(grads[0], positions, kept_rates(features, base, positions.device), -1.0), None, None, None


@cache
def kept_rates(features: int, base: float, device: torch.device) -> Tensor:
    """The same for all time, in float32, for kernels."""
    # Made at the first use, which is never in a graph: the kernel is compiled then.
    return rates(features, base, device, torch.float32)
