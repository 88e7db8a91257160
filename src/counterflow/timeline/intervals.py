"""Half-open intervals in columns: what they cover together."""

from __future__ import annotations

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
