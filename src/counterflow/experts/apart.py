"""Copies of one expert that share a GPU are parted, as far as no GPU gets heavier by it than the heaviest one is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from counterflow.experts.loads import Bools, Floats, Ints

FEW_SLOTS = 16
"""Up to so many slots of a node all ways to keep copies apart are tried."""

MOST_TRIED = 20_000
"""Choices of GPUs for one expert, at which trying ends: of layers that were drawn none took 6,000, some 20 ms."""


def parted(load: Floats, slots: Ints, again: Bools, num_gpus: int, gpus_per_node: int, peak: float) -> Ints:
    """The ``slots`` of one layer, with the copies ``again`` [slots] moved off their GPUs while no load passes ``peak``.

    A copy changes places with what lies on another GPU of its node, or makes way there for another expert of the node.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.apart import parted
        >>> slots, again = np.array([1, 1, 0, 2]), np.array([False, True, False, False])
        >>> parted(np.array([5.0, 9.0, 0.0]), slots, again, num_gpus=2, gpus_per_node=2, peak=9.0).tolist()
        [1, 2, 0, 2]
    """
    slots = slots.copy()
    gpu_of = np.arange(len(slots)) // (len(slots) // num_gpus)
    node_of = gpu_of // gpus_per_node
    held = np.zeros((num_gpus, len(load)), dtype=np.int64)
    np.add.at(held, (gpu_of, slots), 1)
    for slot in np.flatnonzero(again):
        here, expert = gpu_of[slot], slots[slot]
        if held[here, expert] < 2:
            continue
        counts = np.bincount(slots, minlength=len(load))
        share = load / counts
        total = np.asarray(np.bincount(gpu_of, weights=share[slots], minlength=num_gpus), dtype=np.float64)
        more = share[expert] - share[slots]  # what the GPU of another slot would gain by changing places
        higher = np.maximum(total[here] - more, total[gpu_of] + more)
        parts = (held[here, slots] == 0) & (held[gpu_of, expert] == 0) & (node_of == node_of[slot])
        other = int(np.where(parts, higher, np.inf).argmin())
        there, moved = gpu_of[other], slots[other]
        if parts[other] and higher[other] <= peak:
            held[there, [expert, moved]] += 1, -1
            slots[other] = expert
        else:
            near = np.unique(slots[node_of == node_of[slot]])
            moved = _successor(load, counts, held, total, near, here, expert, peak)
            if moved < 0:
                continue
        held[here, [expert, moved]] += -1, 1
        slots[slot] = moved
    return slots


def _successor(
    load: Floats, counts: Ints, held: Ints, total: Floats, experts: Ints, here: int, expert: int, peak: float
) -> int:
    """The one of ``experts`` with the largest share that can have a slot of ``expert`` on GPU ``here``, or -1."""
    after = total + held[:, expert] * (load[expert] / (counts[expert] - 1) - load[expert] / counts[expert])
    after[here] -= load[expert] / (counts[expert] - 1)
    gets = load[experts] / (counts[experts] + 1)
    loses = load[experts] / counts[experts] - gets
    above = np.flatnonzero((after > peak) & (np.arange(len(after)) != here))
    fits = (held[here, experts] == 0) & (after[here] + gets <= peak)
    fits &= (after[above, None] - held[np.ix_(above, experts)] * loses <= peak).all(axis=0)
    best = int(np.where(fits, gets, -1.0).argmax())
    return int(experts[best]) if fits[best] else -1


def apart_if_no_higher(load: Floats, slots: Ints, num_gpus: int, num_nodes: int, peak: float) -> Ints:
    """The ``slots`` of one layer, dealt anew on each node whose copies can all lie apart with no load above ``peak``.

    Exact on nodes of at most ``FEW_SLOTS`` slots; on others nothing changes.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.apart import apart_if_no_higher
        >>> apart_if_no_higher(np.array([5.0, 9.0, 0.0]), np.array([1, 1, 0, 2]), 2, 1, peak=9.0).tolist()
        [1, 2, 0, 2]
        >>> apart_if_no_higher(np.array([4.0, 3.0, 1.0]), np.array([0, 0, 1, 2]), 2, 1, peak=4.0).tolist()
        [0, 0, 1, 2]
    """
    nodes, gpus = slots.reshape(num_nodes, -1), num_gpus // num_nodes
    if nodes.shape[1] > FEW_SLOTS:
        return slots
    held = [np.unique(node) for node in nodes]
    if sum(map(len, held)) > len(np.unique(slots)):  # with a spill nodes share experts
        return slots
    changed = nodes.copy()
    for number, (node, experts) in enumerate(zip(nodes, held, strict=True)):
        rows = node.reshape(gpus, -1)
        if any(len(np.unique(row)) < len(row) for row in rows):
            order = experts[np.argsort(-load[experts], kind="stable")]
            found = _Dealing(load[order].tolist(), gpus, rows.shape[1], peak).found()
            if found is not None:
                changed[number] = order[np.concatenate(found)]
    return changed.reshape(-1)


class _Dealing:
    """Experts with ``loads``, the heaviest first, dealt to GPUs with ``room`` slots, one after the other, by trying."""

    def __init__(self, loads: list[float], num_gpus: int, room: int, peak: float) -> None:
        self._loads, self._limit = loads, peak * (1 + 1e-12)
        self._free, self._total = [room] * num_gpus, [0.0] * num_gpus
        self._held: list[list[int]] = [[] for _ in range(num_gpus)]
        self._tried = 0

    def found(self) -> list[list[int]] | None:
        """The experts of each GPU, none twice and no GPU above the limit; None where there is no way, or none soon."""
        return self._held if self._deal(0) else None

    def _deal(self, expert: int) -> bool:
        left, others = sum(self._free), len(self._loads) - expert
        if others == 0 or left < others or left > others * len(self._free):
            return left == others == 0
        for number in range(max(1, left - (others - 1) * len(self._free)), min(len(self._free), left - others + 1) + 1):
            share = self._loads[expert] / number
            for gpus in self._choices(number, share):
                self._tried += 1
                if self._tried > MOST_TRIED:
                    return False
                before = [self._total[gpu] for gpu in gpus]
                for gpu in gpus:
                    self._free[gpu] -= 1
                    self._total[gpu] += share
                    self._held[gpu].append(expert)
                if self._deal(expert + 1):
                    return True
                for gpu, total in zip(gpus, before, strict=True):
                    self._free[gpu] += 1
                    self._total[gpu] = total
                    self._held[gpu].pop()
        return False

    def _choices(self, number: int, share: float) -> Iterator[tuple[int, ...]]:
        """So many GPUs that can take ``share`` each; of choices that differ in nothing but numbers the first."""
        able = [g for g, free in enumerate(self._free) if free and self._total[g] + share <= self._limit]
        seen = set()
        for gpus in combinations(able, number):
            state = tuple(sorted((self._total[gpu], self._free[gpu]) for gpu in gpus))
            if state not in seen:
                seen.add(state)
                yield gpus
