"""Half-open intervals in columns: what they cover together, and how few tracks hold them side by side."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

Ns = npt.NDArray[np.int64]


def covered_ns(start_ns: Ns, end_ns: Ns) -> int:
    """The time covered by at least one interval, each ``[start_ns[i], end_ns[i])``; overlaps count once.

    Example:
        >>> import numpy as np
        >>> covered_ns(np.array([0, 5, 20]), np.array([10, 12, 21]))
        13
    """
    if len(start_ns) == 0:
        return 0
    order = np.argsort(start_ns, kind="stable")
    start, reach = start_ns[order], np.maximum.accumulate(end_ns[order])
    gaps = np.maximum(start[1:] - reach[:-1], 0).sum()
    return int(reach[-1] - start[0] - gaps)


def tracks(start_ns: Ns, end_ns: Ns) -> Ns:
    """For each interval the first track that is free when it starts, shape [intervals]; they come in order of start.

    Example:
        >>> import numpy as np
        >>> tracks(np.array([0, 5, 6, 12]), np.array([10, 6, 20, 13])).tolist()
        [0, 1, 1, 0]
    """
    track = np.zeros(len(start_ns), dtype=np.int64)
    if (start_ns[1:] >= end_ns[:-1]).all():
        return track
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # until when, and which
    for row, (start, end) in enumerate(zip(start_ns.tolist(), end_ns.tolist(), strict=True)):
        while busy and busy[0][0] <= start:
            heappush(free, heappop(busy)[1])
        track[row] = heappop(free) if free else len(busy)
        heappush(busy, (end, int(track[row])))
    return track
