"""How many replicas each expert gets: one more for the largest share, again and again. Both algorithms begin so."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterflow.experts.loads import Ints
from counterflow.loops import COMPILED_FROM, compiled


def give_replicas(load: NDArray[Any], num_slots: int, most: int, fewest_first: bool) -> tuple[Ints, Ints, Ints]:
    """The replicas of each expert [rows, experts], and for each further slot who got it and how many it had before.

    A slot goes to the expert with the largest share of ``load`` [rows, experts], of equals to the first or, with
    ``fewest_first``, to one with fewest replicas, and none gets more than ``most``. Shares have the type of ``load``.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.replicas import give_replicas
        >>> counts, got, had = give_replicas(np.array([[4.0, 9.0, 1.0]]), 6, most=6, fewest_first=False)
        >>> counts.tolist(), got.tolist(), had.tolist()
        ([[2, 3, 1]], [[1, 1, 0]], [[1, 2, 1]])
    """
    rows, experts = load.shape
    extra = num_slots - experts
    got, had = np.zeros((rows, extra), dtype=np.int64), np.zeros((rows, extra), dtype=np.int64)
    counts = np.ones(load.shape, dtype=load.dtype)  # floating, so that a quotient keeps the type of the loads
    arguments = (load.ravel(), load.ravel().copy(), counts.ravel(), rows, experts, extra, most, fewest_first)
    scratch = np.zeros(experts, dtype=np.int64)
    run_on_arrays(_give, rows * (experts + extra * 8) * 8, *arguments, got.ravel(), had.ravel(), scratch)
    return counts.astype(np.int64), got, had


_SLOWER = 4  # an element of an array takes plain Python that much longer than one of a list

_turns_so_far = Counter[Any]()


def run_on_arrays(kernel: Any, turns: int, *arguments: Any) -> None:
    """As ``loops.run_loop``, but short ones run on the arrays themselves: lists would not keep float32."""
    _turns_so_far[kernel] += turns * _SLOWER
    with np.errstate(over="ignore"):  # the published sums also end at infinity
        (compiled(kernel) if _turns_so_far[kernel] >= COMPILED_FROM else kernel)(*arguments)


def _give(
    load: Any,
    share: Any,
    counts: Any,
    rows: int,
    experts: int,
    extra: int,
    most: int,
    fewest_first: bool,
    got: Any,
    had: Any,
    heap: Any,
) -> int:
    for row in range(rows):
        at = row * experts
        size = experts
        for expert in range(experts):
            heap[expert] = expert
        sunk = experts // 2  # first every parent sinks, then what has got a replica
        given = 0
        while sunk or given < extra:
            if sunk:
                sunk -= 1
                hole = sunk
                expert = heap[hole]
            else:
                expert = heap[0]
                got[row * extra + given] = expert
                had[row * extra + given] = counts[at + expert]
                counts[at + expert] += 1
                share[at + expert] = load[at + expert] / counts[at + expert]
                given += 1
                hole = 0
                if counts[at + expert] >= most:
                    size -= 1
                    expert = heap[size]
            while 2 * hole + 1 < size:
                child = 2 * hole + 1
                one, other = heap[child], heap[min(child + 1, size - 1)]
                if share[at + other] > share[at + one] or (
                    share[at + other] == share[at + one]
                    and (
                        (fewest_first and counts[at + other] < counts[at + one])
                        or (other < one and not (fewest_first and counts[at + other] > counts[at + one]))
                    )
                ):
                    child, one = child + 1, other
                if share[at + expert] > share[at + one] or (
                    share[at + expert] == share[at + one]
                    and (
                        (fewest_first and counts[at + expert] < counts[at + one])
                        or (expert < one and not (fewest_first and counts[at + expert] > counts[at + one]))
                    )
                ):
                    break
                heap[hole] = one
                hole = child
            heap[hole] = expert
    return 0
