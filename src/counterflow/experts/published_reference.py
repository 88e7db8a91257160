"""The published algorithm, slow and obvious: one layer, one node, one item at a time.

Its arithmetic is float32, and its order of equal loads that of C++'s ``std::sort``, for that is what the published
code runs on. The fast path in ``published.py`` is held to this one.

Source: https://github.com/deepseek-ai/EPLB, ``eplb.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterflow.experts.loads import Ints
from counterflow.experts.torch_order import sum_as_torch


def rebalance_reference(
    weight: NDArray[np.float32], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ints, Ints, Ints]:
    """The three maps of ``rebalance_experts`` for legal float32 ``weight`` [layers, experts].

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.published_reference import rebalance_reference
        >>> slots, where, counts = rebalance_reference(np.array([[4, 3, 1]], dtype=np.float32), 4, 1, 1, 2)
        >>> slots.tolist(), where.tolist(), counts.tolist()
        ([[1, 2, 0, 0]], [[[2, 3], [0, -1], [1, -1]]], [[2, 1, 1]])
    """
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    layers = [_layer(row, num_replicas, num_groups, num_nodes, num_gpus) for row in weight]
    width = max(len(places) for _, where in layers for places in where)
    slots = np.array([slots for slots, _ in layers], dtype=np.int64)
    where = np.array([[p + [-1] * (width - len(p)) for p in where] for _, where in layers], dtype=np.int64)
    counts = np.array([[len(places) for places in where] for _, where in layers], dtype=np.int64)
    return slots, where, counts


def _layer(
    load: NDArray[np.float32], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[list[int], list[list[int]]]:
    """The expert in each slot, and the slots of each expert, first replica first."""
    group_size = len(load) // num_groups
    group_loads = list(sum_as_torch(load.reshape(num_groups, group_size)))
    slots: list[int] = []
    where: list[list[int]] = [[-1] * num_replicas for _ in load]
    for groups in packed(group_loads, num_nodes):
        experts = [group * group_size + member for group in groups for member in range(group_size)]
        replicas, copies = replicated([load[e] for e in experts], num_replicas // num_nodes)
        share = [load[experts[e]] / np.float32(copies[e]) for e in replicas]
        for items in packed(share, num_gpus // num_nodes):
            for item in items:
                expert = replicas[item]
                where[experts[expert]][replicas[:item].count(expert)] = len(slots)
                slots.append(experts[expert])
    return slots, [[slot for slot in places if slot >= 0] for places in where]


def replicated(load: Sequence[np.float32], num_replicas: int) -> tuple[list[int], list[int]]:
    """The expert of each replica, and the replicas of each expert: one more for the largest share, again and again."""
    replicas, copies = list(range(len(load))), [1] * len(load)
    while len(replicas) < num_replicas:
        share = [load[e] / np.float32(copies[e]) for e in range(len(load))]
        hottest = share.index(max(share))
        replicas.append(hottest)
        copies[hottest] += 1
    return replicas, copies


def packed(load: Sequence[np.float32], num_packs: int) -> list[list[int]]:
    """The items of each pack: by descending load, each to the lightest pack that has room."""
    room = len(load) // num_packs
    if room == 1:
        return [[item] for item in range(len(load))]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = [np.float32(0)] * num_packs
    with np.errstate(over="ignore"):  # the published sums also end at infinity
        for item in sorted_as_cpp(range(len(load)), lambda a, b: bool(load[a] > load[b])):
            pack = min((p for p in range(num_packs) if len(packs[p]) < room), key=total.__getitem__)
            packs[pack].append(item)
            total[pack] = total[pack] + load[item]
    return packs


def sorted_as_cpp(items: Sequence[int], before: Callable[[int, int], bool]) -> list[int]:
    """``items`` in the order that libstdc++'s ``std::sort`` gives them: not stable from 17 items on.

    Source: libstdc++, ``bits/stl_algo.h`` and ``bits/stl_heap.h``: quicksort by the median of three down to 16 items,
    heap sort where that goes too deep, one insertion sort over all at the end.
    """
    row = list(items)
    _introsort(row, 0, len(row), 2 * (len(row).bit_length() - 1), before)
    for i in range(1, len(row)):
        value, hole = row[i], i
        while hole and before(value, row[hole - 1]):
            row[hole] = row[hole - 1]
            hole -= 1
        row[hole] = value
    return row


def _introsort(row: list[int], first: int, last: int, depth: int, before: Callable[[int, int], bool]) -> None:
    while last - first > 16:
        if depth == 0:
            row[first:last] = _heap_sorted(row[first:last], before)
            return
        depth -= 1
        cut = _partition(row, first, last, before)
        _introsort(row, cut, last, depth, before)
        last = cut


def _partition(row: list[int], first: int, last: int, before: Callable[[int, int], bool]) -> int:
    a, b, c = first + 1, (first + last) // 2, last - 1
    if before(row[a], row[b]):
        median = b if before(row[b], row[c]) else c if before(row[a], row[c]) else a
    else:
        median = a if before(row[a], row[c]) else c if before(row[b], row[c]) else b
    row[first], row[median] = row[median], row[first]
    pivot, low, high = row[first], first + 1, last
    while True:
        while before(row[low], pivot):
            low += 1
        high -= 1
        while before(pivot, row[high]):
            high -= 1
        if low >= high:
            return low
        row[low], row[high] = row[high], row[low]
        low += 1


def _heap_sorted(heap: list[int], before: Callable[[int, int], bool]) -> list[int]:
    for parent in range(len(heap) // 2 - 1, -1, -1):
        _sift(heap, parent, len(heap), heap[parent], before)
    for end in range(len(heap) - 1, 0, -1):
        value, heap[end] = heap[end], heap[0]
        _sift(heap, 0, end, value, before)
    return heap


def _sift(heap: list[int], top: int, size: int, value: int, before: Callable[[int, int], Any]) -> None:
    """The hole at ``top`` sinks to a leaf, then ``value`` rises from there."""
    hole = top
    while 2 * hole + 2 < size:
        child = 2 * hole + 2
        child -= bool(before(heap[child], heap[child - 1]))
        heap[hole] = heap[child]
        hole = child
    if 2 * hole + 2 == size:
        heap[hole] = heap[2 * hole + 1]
        hole = 2 * hole + 1
    while hole > top and before(heap[(hole - 1) // 2], value):
        heap[hole] = heap[(hole - 1) // 2]
        hole = (hole - 1) // 2
    heap[hole] = value
