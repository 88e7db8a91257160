"""Did compute wait for this exposed communication? Told by order and launch times, where they tell it.

No compute ran during an exposed piece, so whatever comes next was either held back or not there yet.
"""

from __future__ import annotations

import numpy as np

from counterflow.trace.columns import Ints
from counterflow.trace.cover import Cover, blocks

WAITED = ("blocking", "compute resumed first", "launched late", "nothing follows", "unknown")
"""What became of an exposed piece. Only for the first compute waited; in the next three it did not."""

BLOCKING, RESUMED, LATE, NOTHING, UNCLEAR = range(len(WAITED))

AT_ONCE_NS = 10_000
"""Compute that starts so soon after a transfer has ended may have waited for it."""


def waited_for(pieces: Cover, communication: Cover, transfers: Ints, compute: Ints, launched: Ints) -> Ints:
    """For each exposed piece of communication the index of what became of it in ``WAITED``.

    * *nothing follows*: no compute starts at the piece's end or later.
    * *compute resumed first*: communication still runs when compute starts, and no transfer has just ended.
    * *launched late*: the next compute was launched only after the piece.
    * *blocking*: the next compute had been launched by then, and starts within ``AT_ONCE_NS`` of the end.
    * *unknown*: it starts later, so it waited for something else, or no record tells its launch.

    Pieces that follow each other within ``AT_ONCE_NS``, without compute between them, are judged by the last.

    Args:
        pieces: when communication is exposed.
        communication: when any of it runs.
        transfers: where kernels end that move data, in order [transfers].
        compute: when compute starts, in order [kernels].
        launched: when the call that launched it had returned, -1 where not told [kernels].

    Returns:
        Of shape [pieces].

    Example:
        >>> import numpy as np
        >>> talk = Cover(np.array([0]), np.array([50_000]))
        >>> one = waited_for(talk, talk, np.array([50_000]), np.array([52_000]), np.array([9_000]))
        >>> WAITED[one[0]]
        'blocking'
    """
    if not len(compute) or not len(pieces):
        return np.full(len(pieces), NOTHING, dtype=np.int8)
    following = np.searchsorted(compute, pieces.end_ns, side="left")
    last = _last_of_run(pieces, following)
    told = np.empty(len(pieces), dtype=np.int8)
    for some in blocks(len(pieces)):
        place = np.minimum(following[some], len(compute) - 1)
        run = Cover(pieces.start_ns[last[some]], pieces.end_ns[last[some]])
        each = _judged(pieces.end_ns[some], run, communication, transfers, compute[place], launched[place])
        told[some] = np.where(following[some] == len(compute), NOTHING, each)
    return told


def _judged(ends: Ints, run: Cover, communication: Cover, transfers: Ints, then: Ints, call: Ints) -> Ints:
    """What became of pieces that end there, judged by the last one of their run and the compute that comes next."""
    goes_on = communication.holds(then)
    over = np.where(goes_on, _latest(transfers, then), run.end_ns)
    just_over = (over > run.start_ns) & (then - over <= AT_ONCE_NS)
    told = np.where(just_over, BLOCKING, np.where(goes_on, RESUMED, UNCLEAR))
    known = call >= 0
    told = np.where(~known & (told == BLOCKING), UNCLEAR, told)
    return np.where(known & (call > np.minimum(over, ends)) & (told != RESUMED), LATE, told)


def _last_of_run(pieces: Cover, following: Ints) -> Ints:
    """For each piece the last of those that follow it at once and come before the same compute."""
    goes_on = (following[1:] == following[:-1]) & (pieces.start_ns[1:] - pieces.end_ns[:-1] <= AT_ONCE_NS)
    lasts = np.append(np.flatnonzero(~goes_on), len(following) - 1)
    return np.asarray(lasts[np.searchsorted(lasts, np.arange(len(following)))])


def _latest(times: Ints, until: Ints) -> Ints:
    """The last of these times until each of those; long before, where there is none."""
    if not len(times):
        return np.full(len(until), -(2**62), dtype=np.int64)
    place = np.searchsorted(times, until, side="right") - 1
    return np.where(place >= 0, times[np.maximum(place, 0)], -(2**62))
