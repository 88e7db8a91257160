"""Which compute hides which communication, exactly: every instant of a row goes to one column."""

from __future__ import annotations

import numpy as np

from counterflow.trace.columns import Ints
from counterflow.trace.cover import Cover


def owned(start_ns: Ints, end_ns: Ints, until_ns: int = -(2**62)) -> tuple[Ints, Ints, Ints]:
    """Give each instant to one of the intervals that cover it: to the one that started first, of equals the first told.

    Args:
        start_ns: where the intervals begin, in order [intervals].
        end_ns: where they end [intervals].
        until_ns: what lies before that is owned already.

    Returns:
        Which intervals own time [pieces], and from when to when: disjoint and in order, their union is the whole.

    Example:
        >>> import numpy as np
        >>> which, start, end = owned(np.array([0, 2, 3, 5]), np.array([4, 30, 3, 50]))
        >>> list(zip(which.tolist(), start.tolist(), end.tolist()))
        [(0, 0, 4), (1, 4, 30), (3, 30, 50)]
    """
    # What began earlier has all ended by then.
    ended = np.maximum.accumulate(np.append(until_ns, end_ns))[:-1]
    start = np.maximum(start_ns, ended)
    kept = np.flatnonzero(end_ns > start)
    return kept, start[kept], end_ns[kept]


def hidden_under(talk: Cover, column: Ints, start_ns: Ints, end_ns: Ints, columns: int) -> Ints:
    """How much of some communication lies under each column of compute, in ns [columns].

    Args:
        talk: the communication.
        column: which column each stretch of time counts for [pieces].
        start_ns: where the stretches begin, disjoint and in order, as ``owned`` gives them [pieces].
        end_ns: where they end [pieces].
        columns: how many there are.

    Example:
        >>> import numpy as np
        >>> talk = Cover(np.array([0]), np.array([10]))
        >>> hidden_under(talk, np.array([1, 0]), np.array([2, 8]), np.array([5, 20]), 2).tolist()
        [2, 3]
    """
    total = np.zeros(columns, dtype=np.int64)
    np.add.at(total, column, talk.within_ns(start_ns, end_ns))
    return total
