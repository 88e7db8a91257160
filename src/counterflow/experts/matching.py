"""Pairing rows with columns so that the sum of what is paired is largest: many small tables at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from counterflow.experts.loads import Ints
from counterflow.loops import run_loop


def best_pairing(weights: Ints) -> Ints:
    """The column of every row, int64 [tables, n], for square ``weights`` [tables, n, n]: exact, and deterministic.

    The Hungarian method with potentials, about ``tables * n**3`` turns.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.matching import best_pairing
        >>> best_pairing(np.array([[[7, 5, 1], [6, 1, 0], [2, 3, 1]]])).tolist()
        [[1, 0, 2]]

    Source: Kuhn, "The Hungarian method for the assignment problem", 1955.
    """
    tables, size, _ = weights.shape
    columns = np.zeros(tables * size, dtype=np.int64)
    work = [np.zeros(size + 1, dtype=np.int64) for _ in range(6)]
    run_loop(_pair, tables * size**3, tables, size, np.ascontiguousarray(-weights).ravel(), columns, *work)
    return columns.reshape(tables, size)


def _pair(
    tables: int,
    size: int,
    cost: Any,
    columns: Any,
    of_row: Any,
    of_column: Any,
    row_at: Any,
    way: Any,
    slack: Any,
    used: Any,
) -> int:
    """Rows join one at a time by the cheapest alternating path; index 0 of each list stands for "none yet"."""
    for table in range(tables):
        base = table * size * size
        for j in range(size + 1):
            of_row[j] = 0
            of_column[j] = 0
            row_at[j] = 0
        for row in range(1, size + 1):
            row_at[0] = row
            for j in range(size + 1):
                slack[j] = 1 << 62
                used[j] = 0
            column = 0
            while row_at[column] != 0:
                used[column] = 1
                here = row_at[column]
                least = 1 << 62
                nearest = 0
                for j in range(1, size + 1):
                    if used[j] == 0:
                        reduced = cost[base + (here - 1) * size + j - 1] - of_row[here] - of_column[j]
                        if reduced < slack[j]:
                            slack[j] = reduced
                            way[j] = column
                        if slack[j] < least:
                            least = slack[j]
                            nearest = j
                for j in range(size + 1):
                    if used[j] == 1:
                        of_row[row_at[j]] += least
                        of_column[j] -= least
                    else:
                        slack[j] -= least
                column = nearest
            while column != 0:
                row_at[column] = row_at[way[column]]
                column = way[column]
        for j in range(1, size + 1):
            columns[table * size + row_at[j] - 1] = j - 1
    return 0
