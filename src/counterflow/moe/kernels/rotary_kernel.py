"""The kernel of rotary positions: rows are copied, and the pairs at their ends turned on the way."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def turned_pairs(values, angle, direction, ROWS: tl.constexpr, TURNED: tl.constexpr):
    """``values`` [rows, turned], in float32, each pair turned by its ``angle`` [rows, turned / 2]."""
    cosine, sine = tl.cos(angle), tl.sin(angle) * direction
    left, right = tl.split(tl.reshape(values, [ROWS, TURNED // 2, 2]))
    return tl.reshape(tl.join(left * cosine - right * sine, left * sine + right * cosine), [ROWS, TURNED])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def rotary_kernel(
    x, positions, rates, turned, rows, heads, count, stride, out_stride, direction,
    STRAIGHT: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of ``x``, ``stride`` apart, to rows of ``turned``, ``out_stride`` apart.

    Row r has position r // heads % count.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row[:, None] < rows
    source, out = x + row[:, None] * stride, turned + row[:, None] * out_stride
    if STRAIGHT > 0:
        feature = tl.arange(0, STRAIGHT)[None, :]
        tl.store(out + feature, tl.load(source + feature, mask=real), mask=real)
    pair, feature = tl.arange(0, TURNED // 2), STRAIGHT + tl.arange(0, TURNED)[None, :]
    position = tl.load(positions + row // heads % count, mask=row < rows, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(rates + pair)[None, :]
    values = tl.load(source + feature, mask=real, other=0.0).to(tl.float32)
    values = turned_pairs(values, angle, direction, ROWS, TURNED)
    tl.store(out + feature, values.to(turned.dtype.element_ty), mask=real)


def turn_by_kernel(x: Tensor, positions: Tensor, rates: Tensor, direction: float, out: Tensor | None = None) -> Tensor:
    """``x`` [..., positions, heads, any] with the pairs at the end of each row turned, forward (1) or back (-1).

    If given, ``out`` takes it, whose rows follow each other at one distance.
    """
    heads, width, features = x.shape[-2], x.shape[-1], 2 * len(rates)
    if not _evenly_strided(x):
        x = x.contiguous()
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rows = x.numel() // width
    rotary_kernel[(triton.cdiv(rows, _ROWS),)](
        x, positions, rates, turned, rows, heads, len(positions), _step(x), _step(turned), direction,
        STRAIGHT=width - features, TURNED=features, ROWS=_ROWS,
    )  # fmt: skip
    return turned


def _evenly_strided(x: Tensor) -> bool:
    """Whether all rows follow each other at one distance."""
    distance = _step(x)
    for dim in range(x.dim() - 2, -1, -1):
        if x.shape[dim] > 1 and x.stride(dim) != distance:
            return False
        distance *= x.shape[dim]
    return x.stride(-1) == 1


def _step(x: Tensor) -> int:
    """From one row to the next."""
    return x.stride(-2) if x.shape[-2] > 1 else x.stride(-3)
