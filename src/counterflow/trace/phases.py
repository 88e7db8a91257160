"""Which part of the program asked for a piece of GPU work: by the annotations on the CPU.

Half of a training step is launched by autograd's thread, while the annotations stand on the thread that called it.
So a piece belongs to the innermost annotation that was open when it was launched, on its own thread if that has one,
else on any; identifiers are not used, for they often match nothing.
"""

from __future__ import annotations

import numpy as np

from counterflow.trace.columns import Annotations, Ints
from counterflow.trace.read import Trace, launch_of

NONE = -1
"""The phase of what was launched outside all annotations."""


def phase_rows(trace: Trace) -> tuple[Annotations, Ints]:
    """The innermost annotations, in order, and for each piece of GPU work the row of its own; NONE outside them.

    Annotations that hold others, and the profiler's own steps, are no phases.
    """
    leaves = _leaves(trace)
    launch = launch_of(trace.work, trace.launches)
    rows = np.full(len(trace.work), NONE, dtype=np.int64)
    known = launch >= 0
    if not len(leaves) or not known.any():
        return leaves, rows
    at, thread = trace.launches.start_ns[launch[known]], trace.launches.thread[launch[known]]
    anywhere = _open_at(leaves, np.arange(len(leaves)), at)
    for one in np.unique(leaves.thread).tolist():
        here = thread == one
        found = _open_at(leaves, np.flatnonzero(leaves.thread == one), at[here])
        anywhere[here] = np.where(found == NONE, anywhere[here], found)
    rows[known] = anywhere
    return leaves, rows


def _leaves(trace: Trace) -> Annotations:
    ranges = trace.annotations
    names = np.array([name.startswith("ProfilerStep#") for name in trace.names], dtype=bool)
    own = ranges.rows(np.flatnonzero((ranges.on_gpu == 0) & ~names[ranges.name])) if len(ranges) else ranges
    # By start, the longer one first: a range holds another one of its thread exactly if it holds the next one.
    order = np.lexsort((-own.end_ns, own.start_ns, own.thread))
    own = own.rows(order)
    if len(own) > 1:
        holds = (own.thread[1:] == own.thread[:-1]) & (own.end_ns[1:] <= own.end_ns[:-1])
        own = own.rows(np.flatnonzero(~np.append(holds, False)))
    return own.rows(np.argsort(own.start_ns, kind="stable"))


def _open_at(leaves: Annotations, which: Ints, times: Ints) -> Ints:
    """The row of the last of these ranges that began before each time, if it was still open then."""
    starts = leaves.start_ns[which]
    place = np.searchsorted(starts, times, side="right") - 1
    row = which[np.maximum(place, 0)]
    return np.where((place >= 0) & (times < leaves.end_ns[row]), row, NONE)
