"""The two places where the order in which torch works shows in a result: how it adds, and how it sorts."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats32: TypeAlias = NDArray[np.float32]

LANES = 8  # torch's sums have no path for AVX-512: 8 float32 wherever AVX2 is
INSERTION = 16  # std::sort leaves runs up to this long to its last insertion sort
DEEPEST = 64  # pending ranges of a sort: one for each level of quicksort, and there are at most 2 log2 of the length


def sum_as_torch(values: Floats32) -> Floats32:
    """The float32 sums over the last axis, each added up in the order in which torch adds a contiguous row.

    8 lanes side by side; in each 4 partial sums; in each of those a cascade of 4 levels.

    Source: PyTorch, ``aten/src/ATen/native/cpu/SumKernel.cpp``.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.torch_order import sum_as_torch
        >>> sum_as_torch(np.array([[2**24, 1, 1], [1, 1, 2**24]], dtype=np.float32)).tolist()
        [16777216.0, 16777218.0]
    """
    with np.errstate(over="ignore"):  # torch's sums also end at infinity
        *shape, length = values.shape
        columns = values.reshape(-1, length).T
        if length < LANES:
            return _row_sum(columns).reshape(shape)
        whole = length // LANES * LANES
        lanes = _row_sum(columns[:whole].reshape(whole // LANES, -1)).reshape(LANES, -1)
        total = np.zeros(columns.shape[1], dtype=np.float32)
        for column in (*columns[whole:], *lanes):
            total += column
        return total.reshape(shape)


def _row_sum(rows: Floats32) -> Floats32:
    whole = len(rows) // 4 * 4
    partial = _cascade(rows[:whole].reshape(whole // 4, 4, rows.shape[1]))
    for row in rows[whole:]:
        partial[0] += row
    for k in range(1, 4):
        partial[0] += partial[k]
    first: Floats32 = partial[0]
    return first


def _cascade(rows: Floats32) -> Floats32:
    """The sum over the first axis: what a level has gathered is carried to the next, as digits are in a counter."""
    power = max(4, max(len(rows) - 1, 1).bit_length() // 4)
    levels = np.zeros((4, *rows.shape[1:]), dtype=np.float32)
    full = len(rows) >> power << power
    for index, row in enumerate(rows, start=1):
        levels[0] += row
        for level in range(1, 4):
            if index > full or index & ((1 << level * power) - 1):
                break
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
    for level in range(1, 4):
        levels[0] += levels[level]
    first: Floats32 = levels[0]
    return first


def sort_rows(key: Any, order: Any, rows: int, length: int, pending: Any) -> int:
    """Sort each row of ``key`` [rows * length] downwards, and ``order`` with it, as ``std::sort`` does (a loop kernel).

    Not stable from 17 items on: quicksort by the median of three down to 16 items, heap sort where that goes too deep
    (``pending`` has room for 3 * DEEPEST numbers), one insertion sort over all at the end.

    Source: libstdc++, ``bits/stl_algo.h`` and ``bits/stl_heap.h``.
    """
    for row in range(rows):
        start = row * length
        levels, rest = 0, length
        while rest > 1:
            levels, rest = levels + 2, rest // 2
        pending[0], pending[1], pending[2] = start, start + length, levels
        num_pending = 1
        while num_pending:
            num_pending -= 1
            first, last = pending[3 * num_pending], pending[3 * num_pending + 1]
            depth = pending[3 * num_pending + 2]
            while last - first > INSERTION and depth:
                depth -= 1
                a, b, c = first + 1, (first + last) // 2, last - 1
                if key[a] > key[b]:
                    median = b if key[b] > key[c] else c if key[a] > key[c] else a
                else:
                    median = a if key[a] > key[c] else c if key[b] > key[c] else b
                key[first], key[median] = key[median], key[first]
                order[first], order[median] = order[median], order[first]
                pivot = key[first]
                low, high = first + 1, last
                while True:
                    while key[low] > pivot:
                        low += 1
                    high -= 1
                    while pivot > key[high]:
                        high -= 1
                    if low >= high:
                        break
                    key[low], key[high] = key[high], key[low]
                    order[low], order[high] = order[high], order[low]
                    low += 1
                pending[3 * num_pending], pending[3 * num_pending + 1] = low, last
                pending[3 * num_pending + 2] = depth
                num_pending += 1
                last = low
            size = last - first
            if size <= INSERTION:
                continue
            heaped, end = size // 2, size  # first every parent sinks, then what leaves the top frees the end
            while end > 1:
                if heaped:
                    heaped -= 1
                    top = heaped
                    value, item = key[first + top], order[first + top]
                else:
                    end -= 1
                    top = 0
                    value, item = key[first + end], order[first + end]
                    key[first + end], order[first + end] = key[first], order[first]
                hole = top
                while 2 * hole + 1 < end:
                    child = 2 * hole + 1
                    if child + 1 < end and not key[first + child + 1] > key[first + child]:
                        child += 1
                    key[first + hole], order[first + hole] = key[first + child], order[first + child]
                    hole = child
                while hole > top and key[first + (hole - 1) // 2] > value:
                    parent = (hole - 1) // 2
                    key[first + hole], order[first + hole] = key[first + parent], order[first + parent]
                    hole = parent
                key[first + hole], order[first + hole] = value, item
        for index in range(start + 1, start + length):
            value, item = key[index], order[index]
            hole = index
            while hole > start and value > key[hole - 1]:
                key[hole], order[hole] = key[hole - 1], order[hole - 1]
                hole -= 1
            key[hole], order[hole] = value, item
    return 0
