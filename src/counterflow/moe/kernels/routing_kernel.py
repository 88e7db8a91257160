"""Kernels for the routing of few tokens, where a chain of small launches takes longer than their work.

Each number compares itself with all others, so a kernel needs neither a sort nor a second pass. Where experts or groups
are equally good, the one with the lower number is taken; torch leaves that open.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterflow.moe.config import ModelConfig

_BLOCK, _CHUNK = 16, 256
"""Numbers of a program, and with how many it compares them at a time."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def choosing_kernel(
    logits, bias, best, sent, weights, counts, scaling,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr,
    BALANCED: tl.constexpr,
):  # fmt: skip
    """One program for each token: its ``best`` experts [k], those it is ``sent`` to, their weights, and the counts."""
    token = tl.program_id(0)
    expert, group, place = tl.arange(0, EXPERTS), tl.arange(0, GROUPS), tl.arange(0, PLACES)
    lowest = float("-inf")
    scores = tl.sigmoid(tl.load(logits + token * EXPERTS + expert).to(tl.float32))
    ranked = scores + tl.load(bias + expert).to(tl.float32)
    grouped = tl.reshape(ranked, [GROUPS, EXPERTS // GROUPS])
    worth = tl.max(grouped, 1)
    if EXPERTS > GROUPS:
        first = tl.arange(0, EXPERTS // GROUPS)[None, :] == tl.argmax(grouped, 1)[:, None]
        worth += tl.max(tl.where(first, lowest, grouped), 1)
    taken = group < 0
    for _ in tl.static_range(TOP_GROUPS):
        taken |= group == tl.argmax(tl.where(taken, lowest, worth), 0)
    open_scores = tl.reshape(tl.where(taken[:, None], grouped, lowest), [EXPERTS])
    chosen = tl.zeros([PLACES], tl.int32)
    for number in tl.static_range(TOP_K):
        found = tl.argmax(open_scores, 0)
        chosen = tl.where(place == number, found, chosen)
        open_scores = tl.where(expert == found, lowest, open_scores)

    real, out = place < TOP_K, token * TOP_K + place
    tl.store(best + out, chosen.to(tl.int64), mask=real)
    if BALANCED:
        chosen = (token * TOP_K + place) % EXPERTS
        tl.store(sent + out, chosen.to(tl.int64), mask=real)
    own = tl.sigmoid(tl.load(logits + token * EXPERTS + chosen, mask=real, other=float("-inf")).to(tl.float32))
    tl.store(weights + out, (own / tl.sum(own, 0) * scaling).to(weights.dtype.element_ty), mask=real)
    tl.atomic_add(counts + chosen, tl.full([PLACES], 1, tl.int64), mask=real)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def serving_kernel(
    chosen, table, copies, slots, rows, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """The slot for each choice: the n-th choice of an expert goes to its replica n + first."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(chosen + row, mask=row < rows, other=0)
    earlier = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, CHUNK):
        other_row = start + tl.arange(0, CHUNK)
        other = tl.load(chosen + other_row, mask=other_row < rows, other=-1)
        earlier += tl.sum(((other[None, :] == own[:, None]) & (other_row[None, :] < row[:, None])).to(tl.int32), 1)
    replica = (earlier + first) % tl.load(copies + own)
    tl.store(slots + row, tl.load(table + own * WIDTH + replica), mask=row < rows)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sorting_kernel(
    source, table, order, inverse, counts, rows, slots,
    LOOK_UP: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The stable order by slot, its inverse, and how many rows there are for each slot, some of all by each program.

    ``source`` is the slots themselves, or with ``LOOK_UP`` the numbers under which ``table`` holds them.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    own = tl.load(source + row, mask=row < rows, other=0)
    if LOOK_UP:
        own = tl.load(table + own)
    before = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([SLOTS], tl.int32)
    for start in range(0, rows, CHUNK):
        other_row = start + tl.arange(0, CHUNK)
        real = other_row < rows
        other = tl.load(source + other_row, mask=real, other=0)
        if LOOK_UP:
            other = tl.load(table + other)
        other = tl.where(real, other, slots)
        earlier = other_row[None, :] < row[:, None]
        same = other[None, :] == own[:, None]
        before += tl.sum(((other[None, :] < own[:, None]) | (same & earlier)).to(tl.int32), 1)
        count += tl.sum((other[None, :] == slot[:, None]).to(tl.int32), 1)
    tl.store(inverse + row, before.to(tl.int64), mask=row < rows)
    tl.store(order + before, row.to(tl.int64), mask=row < rows)
    tl.store(counts + slot, count.to(tl.int64), mask=slot < slots)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def arriving_kernel(
    counts, order, inverse, ends, ranks, slots, rows, RANKS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The order by slot of rows that came by rank and then slot, as in ``counts`` [ranks, slots]; where slots end."""
    rank, slot = tl.arange(0, RANKS)[None, :], tl.arange(0, SLOTS)[:, None]
    came = tl.load(counts + rank * slots + slot, mask=(rank < ranks) & (slot < slots), other=0).to(tl.int32)
    of_rank = tl.sum(came, 0)
    came_from = (tl.cumsum(of_rank, 0) - of_rank)[None, :] + tl.cumsum(came, 0) - came
    run = tl.reshape(came, [SLOTS * RANKS])
    stop = tl.cumsum(run, 0)
    shift = tl.reshape(came_from, [SLOTS * RANKS]) - (stop - run)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] >= (stop - run)[None, :]) & (row[:, None] < stop[None, :])
    source = row + tl.sum(tl.where(inside, shift[None, :], 0), 1)
    tl.store(order + row, source.to(tl.int64), mask=row < rows)
    tl.store(inverse + source, row.to(tl.int64), mask=row < rows)
    if tl.program_id(0) == 0:
        each = tl.arange(0, SLOTS)
        tl.store(ends + each, tl.cumsum(tl.sum(came, 1), 0), mask=each < slots)


def choose_by_kernel(
    logits: Tensor, bias: Tensor, counts: Tensor, config: ModelConfig, dtype: torch.dtype, *, balanced: bool
) -> tuple[Tensor, Tensor]:
    """The weights, in ``dtype``, and the numbers of the experts for ``logits`` [tokens, experts], both [tokens, k].

    ``counts`` [experts] grows by the tokens that are sent to each.
    """
    tokens = len(logits)
    best = torch.empty(tokens, config.top_k, dtype=torch.int64, device=logits.device)
    sent = torch.empty_like(best) if balanced else best
    weights = torch.empty(tokens, config.top_k, dtype=dtype, device=logits.device)
    choosing_kernel[(tokens,)](
        logits, bias, best, sent, weights, counts, config.routed_scaling,
        EXPERTS=config.experts, GROUPS=config.groups, TOP_GROUPS=config.top_groups, TOP_K=config.top_k,
        PLACES=triton.next_power_of_2(config.top_k), BALANCED=balanced, num_warps=1,
    )  # fmt: skip
    return weights, sent


def sort_by_kernel(
    chosen: Tensor, table: Tensor, copies: Tensor, first: int, num_slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For ``chosen`` [tokens, k]: the order by serving slot, its inverse, and the rows for each slot."""
    flat, width = chosen.flatten(), table.shape[1]
    programs = triton.cdiv(len(flat), _BLOCK)
    source = flat if width == 1 else torch.empty_like(flat)
    if width > 1:
        serving_kernel[(programs,)](
            flat, table, copies, source, len(flat), first, WIDTH=width, BLOCK=_BLOCK, CHUNK=_CHUNK
        )
    order, inverse = torch.empty_like(flat), torch.empty_like(flat)
    counts = flat.new_empty(num_slots)
    sorting_kernel[(programs,)](
        source, table, order, inverse, counts, len(flat), num_slots,
        LOOK_UP=width == 1, BLOCK=_BLOCK, SLOTS=triton.next_power_of_2(triton.cdiv(num_slots, programs)), CHUNK=_CHUNK,
    )  # fmt: skip
    return order, inverse, counts


def arrive_by_kernel(counts: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order by slot of rows sorted by rank, its inverse, and where the rows for each slot end, int32."""
    counts = counts.contiguous()
    ranks, slots = counts.shape
    order, inverse = counts.new_empty(rows), counts.new_empty(rows)
    ends = counts.new_empty(slots, dtype=torch.int32)
    arriving_kernel[(triton.cdiv(rows, _BLOCK),)](
        counts, order, inverse, ends, ranks, slots, rows,
        RANKS=triton.next_power_of_2(ranks), SLOTS=triton.next_power_of_2(slots), BLOCK=_BLOCK,
    )  # fmt: skip
    return order, inverse, ends
