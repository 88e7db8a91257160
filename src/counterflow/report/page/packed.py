"""Columns of whole numbers as text that a page holds: base64 of the narrowest numbers that they fit."""

from __future__ import annotations

import base64

import numpy as np

from counterflow.trace.columns import Ints

_TYPES = (("u8", "<u1"), ("u16", "<u2"), ("u32", "<u4"))

Packed = dict[str, str]


def packed(values: Ints) -> Packed:
    """Numbers from 0 up; those beyond 32 bits as doubles, which are exact up to 104 days of nanoseconds.

    Example:
        >>> import numpy as np
        >>> packed(np.array([1, 2, 300]))
        {'type': 'u16', 'base64': 'AQACACwB'}
    """
    most = int(values.max(initial=0))
    name, dtype = next(((n, d) for n, d in _TYPES if most <= np.iinfo(d).max), ("f64", "<f8"))
    return {"type": name, "base64": base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")}


def packed_times(start_ns: Ints, end_ns: Ints) -> dict[str, Packed]:
    """Intervals in the order of time: how long after the one before each starts, and how long it is."""
    return {"after": packed(np.diff(start_ns, prepend=0)), "length": packed(end_ns - start_ns)}
