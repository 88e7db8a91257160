"""A mixture-of-experts model twice: as it is, and with its experts spread over ranks by a placement."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow import Placement

LAYERS, EXPERTS, WIDTH, TOP_K = 3, 8, 8, 2
GPUS, ROOM = 4, 4  # two copies of every expert
EXPERT_BYTES = 4 * (6 * WIDTH) * 2 + 8 + 3

Held = Sequence[Sequence[int]]


def placements() -> tuple[Placement, Placement]:
    """Two in which most experts lie elsewhere, and none has both copies on one GPU."""
    drawn = torch.Generator().manual_seed(7)
    half = [[torch.randperm(EXPERTS, generator=drawn) for _ in range(2)] for _ in range(2 * LAYERS)]
    rows = torch.stack([torch.cat(pair) for pair in half]).numpy()
    return Placement(rows[:LAYERS], EXPERTS, GPUS), Placement(rows[LAYERS:], EXPERTS, GPUS)


def expert_tensors(layer: int, expert: int) -> list[Tensor]:
    """Of several element sizes, and not a multiple of any; one of them lies transposed in memory."""
    drawn = torch.Generator().manual_seed(100 * layer + expert)
    up, down = torch.randn(6, WIDTH, generator=drawn), torch.randn(6, WIDTH, generator=drawn).T
    return [torch.full((3,), expert, dtype=torch.int8), up, torch.tensor(1.0 + expert, dtype=torch.float64), down]


def slots_of(held: Held, rank: int, room: int) -> dict[int, list[list[Tensor]]]:
    """The tensors of one rank for the experts in ``held``, by layer, with empty slots up to ``room``."""
    slots = {}
    for layer, rows in enumerate(held):
        mine = [expert_tensors(layer, expert) for expert in rows[rank]]
        empty = [[torch.zeros_like(t) for t in expert_tensors(layer, 0)] for _ in range(room - len(mine))]
        slots[layer] = [*mine, *empty]
    return slots


def compute(tensors: Sequence[Tensor], token: Tensor) -> Tensor:
    """One token at a time: a product of matrices need not be bitwise the same with other rows beside it."""
    tag, up, scale, down = tensors
    return (down @ torch.relu(up @ token)) * scale.float() + tag.float().sum()


def route(layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    router = torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(1000 + layer))
    weights, experts = torch.topk(torch.softmax(tokens @ router.T, dim=1), TOP_K)
    return weights, experts


def combine(tokens: Tensor, weights: Tensor, results: Tensor) -> Tensor:
    """``results`` [tokens, k, width], summed in the order of k wherever they were made."""
    for k in range(TOP_K):
        tokens = tokens + weights[:, k, None] * results[:, k]
    return torch.tanh(tokens)


def unplaced(tokens: Tensor) -> Tensor:
    for layer in range(LAYERS):
        weights, experts = route(layer, tokens)
        rows = [
            [compute(expert_tensors(layer, e), token) for e in chosen]
            for token, chosen in zip(tokens, experts.tolist(), strict=True)
        ]
        tokens = combine(tokens, weights, torch.stack([torch.stack(row) for row in rows]))
    return tokens


def placed(
    tokens: Tensor,
    held: Sequence[Held],
    slots: dict[int, list[list[Tensor]]],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The answer to this rank's ``tokens``; rank r of ``group`` holds ``held[layer][r]``."""
    for layer in range(LAYERS):
        weights, experts = route(layer, tokens)
        copies = [
            [(rank, slot) for rank, row in enumerate(held[layer]) for slot, e in enumerate(row) if e == expert]
            for expert in range(EXPERTS)
        ]
        # Copies take turns, so that all of them are put to the test.
        wanted = [
            (*copies[e][(t + dist.get_rank()) % len(copies[e])], t, k)
            for t, chosen in enumerate(experts.tolist())
            for k, e in enumerate(chosen)
        ]
        wanted.sort()
        sizes = [sum(rank == to for to, *_ in wanted) for rank in range(len(held[layer]))]
        send = torch.stack([torch.cat([tokens[t], torch.tensor([float(slot)])]) for _, slot, t, _ in wanted])
        received, their_sizes = exchange(send, sizes, group)
        answers = [compute(slots[layer][int(row[-1])], row[:-1]) for row in received]
        back = torch.stack(answers) if answers else tokens.new_empty(0, WIDTH)
        returned, _ = exchange(back, their_sizes, group)
        results = torch.zeros(len(tokens), TOP_K, WIDTH)
        for (_, _, t, k), row in zip(wanted, returned, strict=True):
            results[t, k] = row
        tokens = combine(tokens, weights, results)
    return tokens


def exchange(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> tuple[Tensor, list[int]]:
    theirs = torch.empty(len(sizes), dtype=torch.int64)
    dist.all_to_all_single(theirs, torch.tensor(sizes), group=group)
    out = rows.new_empty(int(theirs.sum()), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), theirs.tolist(), sizes, group=group)
    return out, theirs.tolist()


def requests(rank: int, number: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(10_000 * rank + number))


def holds_what_it_says(slots: dict[int, list[list[Tensor]]], held: Sequence[Held], rank: int) -> bool:
    return all(
        torch.equal(ours, theirs)
        for layer, rows in enumerate(held)
        for slot, expert in enumerate(rows[rank])
        for ours, theirs in zip(slots[layer][slot], expert_tensors(layer, expert), strict=True)
    )


def changes(states: Sequence[Sequence[Held]]) -> int:
    return sum(a != b for a, b in pairwise(states))
