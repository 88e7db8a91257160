"""The kernel of attention over cached latents: a block of heads goes over the tokens of its request once."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_LOG2_E = 1.4426950408889634
_HEADS, _TOKENS, _WARPS = 64, 64, 8
"""Of a tile. 64 heads are what a Hopper tensor core takes at once; what they need of 64 latents of 576 features
fits twice: one is fetched while another is used."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def latent_attention_kernel(
    query, latents, keys, positions, mixed, weights, scale, heads,
    WIDTH: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (b, i, p): heads ``b`` of query ``i`` over part ``p`` of its tokens, by softmax in powers of two.

    ``latents`` and ``keys`` describe the same tensor, in tiles of the features that are mixed and of those behind them.
    With several ``PARTS``, ``mixed`` [parts, n, heads, width] is float32, and ``weights`` [parts, n, heads] the
    logarithm of the sum that each is divided by.
    """
    query_number = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    real = head[:, None] < heads
    feature, turned_feature = tl.arange(0, WIDTH), tl.arange(0, TURNED)
    rows = query + (query_number * heads + head[:, None]) * (WIDTH + TURNED)
    plain = tl.load(rows + feature[None, :], mask=real, other=0.0)
    turned = tl.load(rows + WIDTH + turned_feature[None, :], mask=real, other=0.0)

    seen = tl.load(positions + query_number).to(tl.int32) + 1
    each = tl.cdiv(tl.cdiv(seen, PARTS), TOKENS) * TOKENS
    begin = tl.program_id(2) * each
    end = tl.minimum(begin + each, seen)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, WIDTH], tl.float32)
    for start in tl.range(begin, end, TOKENS, num_stages=2):
        before_end = start + tl.arange(0, TOKENS) < end
        latent = tl.reshape(latents.load([tl.program_id(1), start, 0]), [TOKENS, WIDTH])
        key = tl.reshape(keys.load([tl.program_id(1), start, WIDTH]), [TOKENS, TURNED])
        scores = tl.dot(plain, tl.trans(latent))
        scores = tl.dot(turned, tl.trans(key), scores) * scale
        scores = tl.where(before_end[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        sums = tl.dot(shares.to(latent.dtype), latent, sums * shrink[:, None])
        highest = higher

    out = (tl.program_id(2) * tl.num_programs(1) + query_number) * heads + head
    if PARTS > 1:
        # A part may be empty: it weighs nothing, and its mix must not be NaN.
        empty = total == 0
        total = tl.where(empty, 1.0, total)
        tl.store(weights + out, tl.where(empty, float("-inf"), highest + tl.log2(total)), mask=head < heads)
    sums /= total[:, None]
    tl.store(mixed + out[:, None] * WIDTH + feature[None, :], sums.to(mixed.dtype.element_ty), mask=real)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def joining_kernel(mixed, weights, joined, rows, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """One program for each row [width] of ``joined``: its parts, by their weights."""
    row = tl.program_id(0).to(tl.int64)
    part, feature = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    weight = tl.load(weights + part * rows + row)
    share = tl.exp2(weight - tl.max(weight, 0))
    parts = tl.load(mixed + (part[:, None] * rows + row) * WIDTH + feature[None, :])
    sums = tl.sum(parts * share[:, None], 0) / tl.sum(share, 0)
    tl.store(joined + row * WIDTH + feature, sums.to(joined.dtype.element_ty))


def mixed_by_kernel(
    folded: Tensor, latents: Tensor, positions: Tensor, width: int, scale: float, parts: int | None = None
) -> Tensor:
    """As ``mixed_latents``; the tokens of a request are divided into ``parts``, a power of two, or as many as pay."""
    count, heads, features = folded.shape
    folded = folded.contiguous()
    tile = min(_HEADS, max(16, triton.next_power_of_2(heads)))
    blocks = triton.cdiv(heads, tile)
    parts = parts or parts_for(count * blocks, latents.shape[1], multiprocessors(folded.device))
    out = folded.new_empty(count, heads, width)
    mixed = out if parts == 1 else folded.new_empty(parts, count, heads, width, dtype=torch.float32)
    weights = folded.new_empty(parts, count, heads, dtype=torch.float32)
    latent_attention_kernel[(blocks, count, parts)](
        folded, tiles(latents, width), tiles(latents, features - width), positions, mixed, weights, scale * _LOG2_E,
        heads, WIDTH=width, TURNED=features - width, HEADS=tile, TOKENS=_TOKENS, PARTS=parts,
        num_warps=_WARPS if tile == _HEADS else 4,
    )  # fmt: skip
    if parts > 1:
        joining_kernel[(count * heads,)](mixed, weights, out, count * heads, WIDTH=width, PARTS=parts, num_warps=4)
    return out


def tiles(latents: Tensor, features: int) -> TensorDescriptor:
    """``latents`` in tiles of so many of its features, as the copy engine of a multiprocessor fetches them."""
    return TensorDescriptor.from_tensor(latents, [1, _TOKENS, features])


def parts_for(programs: int, room: int, multiprocessors: int) -> int:
    """Into how many parts to divide the tokens, so that none is short and no multiprocessor idle: a power of 2."""
    parts = 1
    while parts < 64 and 2 * parts * programs <= multiprocessors and room // (2 * parts) >= 2 * _TOKENS:
        parts *= 2
    return parts


def multiprocessors(device: torch.device) -> int:
    """How many ``device`` has; 1 where there are none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
