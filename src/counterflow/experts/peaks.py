"""What each GPU of a placement holds: the largest load of one, and the slots that hold what it holds already."""

from __future__ import annotations

from typing import Any

import numpy as np

from counterflow.experts.loads import Bools, Floats, Ints
from counterflow.loops import run_loop

LOWER = 1 - 1e-12
"""What is not lower by this factor is as low: sums of the same loads in another order differ by less."""


def gpu_loads(load: Floats, slots: Ints, num_gpus: int) -> Floats:
    """The load of every GPU [rows, gpus], each expert's ``load`` [rows, experts] divided evenly over its ``slots``.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.peaks import gpu_loads
        >>> gpu_loads(np.array([[4.0, 3.0, 1.0]]), np.array([[0, 1, 0, 2]]), 2).tolist()
        [[5.0, 3.0]]
    """
    rows, experts = load.shape
    num_slots = slots.shape[1]
    totals = np.zeros((rows, num_gpus))
    run_loop(
        _sum_up,
        rows * (experts + 2 * num_slots),
        # A copy, since numba would compile once more for slots that nobody may write.
        *(load.ravel(), slots.flatten(), rows, experts, num_gpus, num_slots // num_gpus),
        *(np.zeros(experts, dtype=np.int64), totals.ravel()),
    )
    return totals


def gpu_peaks(load: Floats, slots: Ints, num_gpus: int) -> Floats:
    """The largest of the ``gpu_loads`` of each row [rows]."""
    return np.asarray(gpu_loads(load, slots, num_gpus).max(axis=1))


def co_located(slots: Ints, num_gpus: int) -> Bools:
    """Where a slot holds an expert that an earlier slot of its GPU holds [rows, slots].

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.peaks import co_located
        >>> co_located(np.array([[0, 1, 1, 1]]), 2).tolist()
        [[False, False, False, True]]
    """
    rows, num_slots = slots.shape
    again = np.zeros(slots.shape, dtype=np.int64)
    run_loop(
        _mark_again,
        rows * num_slots,
        *(slots.flatten(), rows, num_gpus, num_slots // num_gpus),
        *(np.zeros(int(slots.max(initial=0)) + 1, dtype=np.int64), again.ravel()),
    )
    return again.astype(bool)


def _sum_up(load: Any, slots: Any, rows: int, experts: int, gpus: int, room: int, copies: Any, totals: Any) -> int:
    for row in range(rows):
        first, at = row * gpus * room, row * experts
        for expert in range(experts):
            copies[expert] = 0
        for slot in range(first, first + gpus * room):
            copies[slots[slot]] += 1
        for slot in range(first, first + gpus * room):
            totals[slot // room] += load[at + slots[slot]] / copies[slots[slot]]
    return 0


def _mark_again(slots: Any, rows: int, gpus: int, room: int, last: Any, again: Any) -> int:
    for gpu in range(rows * gpus):
        for slot in range(gpu * room, gpu * room + room):
            if last[slots[slot]] == gpu + 1:
                again[slot] = 1
            last[slots[slot]] = gpu + 1  # the last GPU of all rows that holds it; 0 is none
    return 0
