"""How many activations a rank holds: one for each stage and micro-batch between its forward and its last backward."""

from __future__ import annotations

import numpy as np

from counterflow.schedule.rows import B, F, Ints, Rows, W


def held_activations(rows: Rows) -> Ints:
    """The most activations that its rank holds during each action, shape [actions].

    F stores one; B, or W after an I, frees it. Inside an F&B the forward has stored and the backward has not
    yet freed.

    Example:
        >>> from counterflow import one_f_one_b
        >>> from counterflow.schedule import held_activations
        >>> held_activations(one_f_one_b(2, 2).rows).tolist()
        [1, 2, 2, 1, 1, 1, 1, 1]
    """
    stored = (rows.kind == F).sum(axis=1)
    freed = ((rows.kind == B) | (rows.kind == W)).sum(axis=1)
    after = np.cumsum(stored - freed)
    before_rank = np.concatenate(([0], after))[rows.first[:-1]]
    held: Ints = after + freed - np.repeat(before_rank, np.diff(rows.first))
    return held
