"""Which matrix products of a forward are an MLP's, by their neighbours: a product up, an activation, a product down.

A product's name seldom tells what it is for. But an MLP has few of them and they stand around its activation: one or
two alike before it (or one before and its like after it), and one down. The product before a router is the router's.
Any other belongs to attention: projections, what is done around its core, the weighted sum of what experts sent back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from counterflow.trace.columns import GpuWork, Ints
from counterflow.trace.hints import Hint

UNKNOWN, OF_MLP, OF_ROUTER, OF_ATTENTION = range(4)

_AS_LONG = 1.3


def products_of(work: GpuWork, hints: Sequence[Hint]) -> Ints:
    """For each kernel, in the order of launch, what its product is for; UNKNOWN of others, and where nothing tells.

    Args:
        work: compute kernels of a forward, in the order of launch.
        hints: what each one's name hints at [kernels].
    """
    told = np.full(len(work), UNKNOWN, dtype=np.int64)
    if not any(hint.activates for hint in hints):
        return told
    edges = [row for row, hint in enumerate(hints) if _parts_stretches(hint)]
    for begin, end in zip([-1, *edges], [*edges, len(hints)], strict=True):
        products = [row for row in range(begin + 1, end) if hints[row].gemm or hints[row].routed]
        active = [row for row in range(begin + 1, end) if hints[row].activates]
        for row in active:
            of_mlp = _around(row, products, work)
            told[[one for one in of_mlp if not hints[one].part]] = OF_MLP
        left = [row for row in products if told[row] == UNKNOWN and not hints[row].part]
        if begin < 0 or (end == len(hints) and not active):
            continue  # what stands beside them may lie beyond the trace
        told[left] = OF_ATTENTION
        if end < len(hints) and left and left[-1] == max(products[-1:] + active[-1:]):
            told[left[-1]] = {"router": OF_ROUTER, "other": UNKNOWN}.get(hints[end].part, OF_ATTENTION)
    return told


def _parts_stretches(hint: Hint) -> bool:
    """No MLP goes on beyond a norm, a router, or what only attention runs."""
    return hint.opens or hint.part in ("attention", "router", "other")


def _around(row: int, products: list[int], work: GpuWork) -> list[int]:
    """The products of the MLP whose activation is in this row; a kernel may be both."""
    place = bisect_right(products, row)
    before, after = products[max(place - 2, 0) : place], products[place : place + 2]
    up = before[-1:]
    alike = [one for one in (before[:-1] + after[:1]) if _alike(work, one, up[0])][:1] if up else []
    down = [one for one in after if one not in alike][:1]
    return [*up, *alike, *down]


def _alike(work: GpuWork, one: int, other: int) -> bool:
    """The products of an MLP up and down may run the same kernel, but the one up is longer where it is two in one."""
    same = work.name[one] == work.name[other] and work.blocks[one] == work.blocks[other]
    shorter, longer = sorted(int(work.end_ns[row] - work.start_ns[row]) for row in (one, other))
    return bool(same) and longer <= _AS_LONG * shorter
