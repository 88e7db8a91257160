"""The fewest moves, slow and obvious: every way to exchange the nodes, and the GPUs within each of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

from counterflow.experts.placement import Placement


def fewest_moves(old: Placement, new: Placement, lost_gpus: Sequence[int] = ()) -> list[int]:
    """For each layer the fewest experts that GPUs newly receive, as ``plan_migration`` counts them.

    Example:
        >>> from counterflow.experts import Placement
        >>> from counterflow.experts.migration_reference import fewest_moves
        >>> fewest_moves(Placement([[0, 1, 2, 0]], 3, 2), Placement([[2, 1, 0, 1]], 3, 2))
        [1]
    """
    left = [gpu for gpu in range(old.num_gpus) if gpu not in lost_gpus]
    moves = []
    for ours, theirs in zip(old.physical_to_logical, new.physical_to_logical, strict=True):
        held = [set(row.tolist()) for row in ours.reshape(old.num_gpus, -1)[left]]
        held += [set() for _ in range(new.num_gpus - len(held))]
        wanted = [set(row.tolist()) for row in theirs.reshape(new.num_gpus, -1)]
        moves.append(
            min(
                sum(len(wanted[gpu] - have) for gpu, have in zip(order, held, strict=True))
                for order in _orders(new.num_gpus, new.num_nodes)
            )
        )
    return moves


def _orders(num_gpus: int, num_nodes: int) -> list[list[int]]:
    size = num_gpus // num_nodes
    nodes = [range(start, start + size) for start in range(0, num_gpus, size)]
    return [
        [gpu for inside in choice for gpu in inside]
        for order in permutations(nodes)
        for choice in product(*(permutations(node) for node in order))
    ]
