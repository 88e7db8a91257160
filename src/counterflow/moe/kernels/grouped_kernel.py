"""The kernel of grouped products of few rows: tiles small enough that all multiprocessors have some."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ROWS, _INNER = 128, 64


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def grouped_gemm_kernel(
    rows, weight, ends, out, width, inner,
    GROUPS: tl.constexpr, PLACES: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (r, c): the r-th tile of ``ROWS`` rows, no two groups in one, by the c-th of ``WIDTH`` features.

    With ``GATED`` each tile has as many features of both halves of the products, of which the first opens the second.
    """
    group = tl.arange(0, PLACES)
    stop = tl.load(ends + group, mask=group < GROUPS, other=0)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < GROUPS), other=0)
    tiles = tl.where(group < GROUPS, (stop - start + ROWS - 1) // ROWS, 0)
    behind = tl.cumsum(tiles, 0)
    number = tl.program_id(0)
    own = (number >= behind - tiles) & (number < behind)
    mine = tl.sum(tl.where(own, group, 0), 0)
    first = tl.sum(tl.where(own, start + (number - behind + tiles) * ROWS, 0), 0)
    end = tl.sum(tl.where(own, stop, 0), 0)
    if first < end:
        column = tl.program_id(1) * WIDTH
        sums = tl.zeros([ROWS, 2 * WIDTH if GATED else WIDTH], tl.float32)
        for k in tl.range(0, inner, INNER, num_stages=STAGES):
            if GATED:
                part = tl.reshape(weight.load([mine, 0, column, k]), [2 * WIDTH, INNER])
            else:
                part = tl.reshape(weight.load([mine, column, k]), [WIDTH, INNER])
            sums = tl.dot(rows.load([first, k]), tl.trans(part), sums)
        if GATED:
            halves = tl.permute(tl.reshape(sums.to(out.dtype.element_ty), [ROWS, 2, WIDTH]), (0, 2, 1))
            gate, up = tl.split(halves)
            gate = gate.to(tl.float32)
            result = (gate * tl.sigmoid(gate)).to(up.dtype) * up
        else:
            result = sums.to(out.dtype.element_ty)
        row, feature = first + tl.arange(0, ROWS)[:, None], column + tl.arange(0, WIDTH)[None, :]
        tl.store(out + row.to(tl.int64) * width + feature, result, mask=row < end)


def product_by_kernel(rows: Tensor, weight: Tensor, ends: Tensor, *, gated: bool) -> Tensor:
    """As ``grouped_linear``; if ``gated``, the first half of the features [..., 2 width] opens the second."""
    (count, inner), groups = rows.shape, len(weight)
    width = weight.shape[1] // 2 if gated else weight.shape[1]
    # Half as wide where wide tiles would leave multiprocessors without any.
    tile = 64 if gated and count <= 2 * _ROWS * groups else 128
    box = [1, 2, tile, _INNER] if gated else [1, tile, _INNER]
    parts = weight.view(groups, 2, width, inner) if gated else weight
    out = rows.new_empty(count, width)
    # So many tiles at most, wherever groups end; the host need not know.
    grid = (triton.cdiv(count, _ROWS) + groups - 1, width // tile)
    grouped_gemm_kernel[grid](
        TensorDescriptor.from_tensor(rows, [_ROWS, _INNER]), TensorDescriptor.from_tensor(parts, box), ends, out,
        width, inner, GROUPS=groups, PLACES=triton.next_power_of_2(groups), GATED=gated,
        ROWS=_ROWS, WIDTH=tile, INNER=_INNER, STAGES=4 if gated else 5, num_warps=8 if gated and tile == 128 else 4,
    )  # fmt: skip
    return out
