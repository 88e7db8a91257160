"""Rows that one to three hot experts keep uneven: how many replicas these could have, where one more is no help."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np

from counterflow.experts.loads import Floats, Ints
from counterflow.experts.peaks import gpu_peaks
from counterflow.experts.replicas import give_replicas
from counterflow.experts.rows import from_rows
from counterflow.experts.search import heaviest_first, improve, pack

HOT = 3
"""So many of the heaviest experts are tried with other numbers of replicas."""

MORE = 3
"""... each with fewer than so many more than it needs for its share to be below the bound."""

TRIED = 4
"""Of all choices so many are searched on, first the one that is most even when packed."""


def split_otherwise(load: Floats, slots: Ints, num_gpus: int, bound: Floats, near: float) -> Ints:
    """``slots`` [rows, slots], or more even ones with other numbers of replicas of the heaviest experts.

    The largest share is least where each slot goes to it in turn, but a hot expert's shares then often leave gaps that
    nothing fills. Choices are packed if they could come within ``near`` of ``bound`` [rows], the other experts with
    what slots are left in the usual way, and the best of them searched on.
    """
    if load.shape[1] <= HOT:  # there are no others to take what slots are left
        return slots
    order = heaviest_first(load)
    falling = from_rows(load, order)
    rows, counts = _choices(falling, slots.shape[1], num_gpus, bound * (1 + near))
    if not len(rows):
        return slots
    packed = pack(falling[rows], counts, num_gpus, 1)
    by_row = np.lexsort((gpu_peaks(falling[rows], packed, num_gpus), rows))
    nth = np.arange(len(rows)) - np.searchsorted(rows, rows)  # rows ascend: a choice's place among those of its row
    slots, peaks = slots.copy(), gpu_peaks(load, slots, num_gpus)
    for tried in (by_row[nth == 0], by_row[(nth > 0) & (nth < TRIED)]):
        tried = tried[peaks[rows[tried]] > bound[rows[tried]] * (1 + near)]
        row = rows[tried]
        searched = improve(falling[row], packed[tried], num_gpus, 1, bound[row], patience=1)
        reached = gpu_peaks(falling[row], searched, num_gpus)
        best = np.lexsort((reached, row))
        best = best[np.unique(row, return_index=True)[1]]
        best = best[reached[best] < peaks[row[best]]]
        peaks[row[best]] = reached[best]
        slots[row[best]] = from_rows(order[row[best]], searched[best])
    return slots


def _choices(falling: Floats, num_slots: int, num_gpus: int, limit: Floats) -> tuple[Ints, Ints]:
    """The row and the replicas of its heaviest experts, for all that leave no GPU above ``limit`` for sure.

    The ``n`` GPUs that hold a hot expert carry all of it, and with it the experts that the other GPUs have no slots
    for: at least the lightest. Two whose replicas together are more than GPUs meet on one.
    """
    rows, experts = falling.shape
    room, top = num_slots // num_gpus, falling[:, : min(HOT, experts - 1)]
    others = experts - top.shape[1]
    least = np.maximum(np.ceil(top / limit[:, None]), 1).astype(np.int64)
    counts = least[:, None] + _more(top.shape[1])
    left = num_slots - counts.sum(axis=2)
    possible = (left >= others) & (left <= others * num_gpus) & (counts <= num_gpus).all(axis=2)
    lightest = np.zeros((rows, experts + 1))
    np.cumsum(falling[:, ::-1], axis=1, out=lightest[:, 1:])
    share = top[:, None] / counts
    for hot in range(top.shape[1]):
        number = counts[:, :, hot]
        left_over = np.minimum(np.maximum(experts - 1 - room * (num_gpus - number), 0), experts)
        possible &= share[:, :, hot] + from_rows(lightest, left_over) / number <= limit[:, None]
        for other in range(hot):
            apart = number + counts[:, :, other] <= num_gpus
            possible &= apart | (share[:, :, hot] + share[:, :, other] <= limit[:, None])
    row, choice = np.nonzero(possible)
    every = np.ones((len(row), experts), dtype=np.int64)
    every[:, :-others] = counts[row, choice]
    left = left[row, choice]
    most_left = int(left.max(initial=others))
    _, got, _ = give_replicas(falling[:, -others:].copy(), most_left, num_gpus, fewest_first=True)
    more = np.arange(most_left - others) < (left - others)[:, None]  # where fewer slots are left, the first of them
    np.add.at(every.reshape(-1), (got[row] + np.arange(1, len(row) + 1)[:, None] * experts - others)[more], 1)
    return row, every


@lru_cache(maxsize=HOT)
def _more(experts: int) -> Ints:
    return np.array(list(product(range(MORE), repeat=experts)), dtype=np.int64)
