"""Kernels that go over rows once, where torch takes a kernel for each step."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterflow.moe.kernels.rotary_kernel import turned_pairs

_WIDTH = 1024
"""Features of a row that one program takes, where rows can be divided."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def rms_norm_kernel(x, added, total, weight, normed, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each row: with ``ADDS`` the ``total`` of ``x`` and ``added``; that divided by its norm."""
    feature = tl.arange(0, BLOCK)
    real, row = feature < width, tl.program_id(0).to(tl.int64) * width
    values = tl.load(x + row + feature, mask=real, other=0.0)
    if ADDS:
        values = (values.to(tl.float32) + tl.load(added + row + feature, mask=real, other=0.0)).to(values.dtype)
        tl.store(total + row + feature, values, mask=real)
    precise = values.to(tl.float32)
    precise *= tl.rsqrt(tl.sum(precise * precise, 0) / width + eps) * tl.load(weight + feature, mask=real, other=0.0)
    tl.store(normed + row + feature, precise.to(values.dtype), mask=real)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def silu_and_mul_kernel(x, opened, width, BLOCK: tl.constexpr):
    """Program (r, p): part ``p`` of row ``r``, the first half of whose features opens the second."""
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, real = tl.program_id(0).to(tl.int64), feature < width
    gate = tl.load(x + row * 2 * width + feature, mask=real).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + feature, mask=real)
    opening = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(opened + row * width + feature, opening * up, mask=real)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def weighing_kernel(x, weights, returned, places, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (t, p): part ``p`` of token ``t``, and the results of its experts from their ``places``, by weight."""
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, real = tl.program_id(0).to(tl.int64), feature < width
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + number)
        result = tl.load(returned + place * width + feature, mask=real, other=0.0).to(tl.float32)
        total += tl.load(weights + token * TOP_K + number).to(tl.float32) * result
    kept = tl.load(x + token * width + feature, mask=real, other=0.0)
    tl.store(out + token * width + feature, kept + total.to(kept.dtype), mask=real)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def norm_rope_cache_kernel(
    x, weight, eps, positions, rates, latents, request_step, position_step,
    LATENT: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One program for each request: its latent normed, its key turned, and both kept at its position."""
    request = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + request)
    row, kept = x + request * (LATENT + TURNED), latents + request * request_step + position * position_step
    feature, turned = tl.arange(0, LATENT), LATENT + tl.arange(0, TURNED)[None, :]
    values = tl.load(row + feature).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / LATENT + eps) * tl.load(weight + feature)
    tl.store(kept + feature, values.to(latents.dtype.element_ty))
    angle = position.to(tl.float32) * tl.load(rates + tl.arange(0, TURNED // 2))[None, :]
    key = turned_pairs(tl.load(row + turned).to(tl.float32), angle, 1.0, 1, TURNED)
    tl.store(kept + turned, key.to(latents.dtype.element_ty))


def norm_by_kernel(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x`` [..., width], with ``added`` if that is given, and the same normed by ``weight``."""
    x, width = x.contiguous(), x.shape[-1]
    total, normed = x if added is None else torch.empty_like(x), torch.empty_like(x)
    added, block = x if added is None else added.contiguous(), triton.next_power_of_2(width)
    rms_norm_kernel[(x.numel() // width,)](
        x, added, total, weight, normed, width, eps,
        ADDS=total is not x, BLOCK=block, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return total, normed


def gate_by_kernel(x: Tensor) -> Tensor:
    """``x`` [..., 2 width], whose first half of features opens the second: [..., width]."""
    x, width = x.contiguous(), x.shape[-1] // 2
    opened = x.new_empty(*x.shape[:-1], width)
    silu_and_mul_kernel[(opened.numel() // width, triton.cdiv(width, _WIDTH))](
        x, opened, width, BLOCK=_WIDTH, num_warps=4
    )
    return opened


def weigh_by_kernel(x: Tensor, weights: Tensor, returned: Tensor, places: Tensor) -> Tensor:
    """``x`` [..., width] and the ``weights`` [tokens, k] times the rows of ``returned`` at ``places`` [tokens * k]."""
    x, width, out = x.contiguous(), x.shape[-1], torch.empty_like(x)
    weighing_kernel[(len(weights), triton.cdiv(width, _WIDTH))](
        x, weights, returned, places, out, width, TOP_K=weights.shape[1], BLOCK=_WIDTH, num_warps=4
    )
    return out


def keep_by_kernel(x: Tensor, weight: Tensor, eps: float, positions: Tensor, rates: Tensor, latents: Tensor) -> None:
    """Norm and turn ``x`` [n, latent + turned], and put row i at ``positions[i]`` of ``latents[i]`` [room, as wide]."""
    turned = 2 * len(rates)
    norm_rope_cache_kernel[(len(x),)](
        x.contiguous(), weight, eps, positions, rates, latents, latents.stride(0), latents.stride(1),
        LATENT=x.shape[1] - turned, TURNED=turned, num_warps=1,
    )  # fmt: skip
