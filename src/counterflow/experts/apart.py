"""Copies of one expert that share a GPU are parted, as far as no GPU gets heavier by it than the heaviest one is."""

from __future__ import annotations

import numpy as np

from counterflow.experts.loads import Bools, Floats, Ints


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
