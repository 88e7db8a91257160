"""Phases inside a CUDA graph, whose single launch tells nothing of them: by annotations on the GPU's own time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import Annotations, GpuWork, Ints
from counterflow.trace.cover import Cover
from counterflow.trace.parts import part_of
from counterflow.trace.read import Trace, graph_of

_NONE = -1
_ROUNDING_NS = 1  # start and length are rounded each for itself
_DEEPEST = 64
"""So many annotations are looked through at one time; none that a program wrote are nested deeper."""


def phases_in_graphs(trace: Trace, launch: Ints, ranges: Annotations, rows: Ints) -> tuple[Annotations, Ints]:
    """Gives the pieces of a launch of several, made in no annotation of a part, to the ranges on the GPU around them.

    That is the innermost range on a piece's own stream, else on any of its device. The profiler itself writes images
    of the annotations on the CPU there; these stay out, for what was launched in an annotation is known already.

    Args:
        trace: the trace.
        launch: for each piece of its work the row of its launch record, -1 without one [work].
        ranges: the phases known so far.
        rows: which of them each piece belongs to, -1 outside all [work].

    Returns:
        The ranges, with those on the GPU behind them, and the rows.
    """
    named = trace.annotations.rows(np.isin(trace.annotations.name, _parts(trace)))
    on_gpu, on_cpu = (named.rows(np.flatnonzero(named.on_gpu == which)) for which in (1, 0))
    known = np.flatnonzero(launch >= 0)
    if not len(on_gpu) or not len(known):
        return ranges, rows
    launched = trace.launches.start_ns[launch[known]]
    inside = Cover.of(on_cpu.start_ns, on_cpu.end_ns).holds(launched)
    unknown = known[(graph_of(launch)[known] >= 0) & ~inside]
    if not len(unknown):
        return ranges, rows
    on_gpu = on_gpu.rows(~_images(on_gpu, on_cpu, trace.work.rows(known[inside]), launched[inside]))
    found = _holders(on_gpu, trace.work.rows(unknown))
    rows = rows.copy()
    rows[unknown] = np.where(found == _NONE, rows[unknown], len(ranges) + found)
    return Annotations.joined([ranges, on_gpu]), rows


def _parts(trace: Trace) -> list[int]:
    return [name for name in np.unique(trace.annotations.name).tolist() if part_of(trace.names[name])]


def _images(on_gpu: Annotations, on_cpu: Annotations, work: GpuWork, launched: Ints) -> npt.NDArray[np.bool_]:
    """Which ranges on the GPU hold work that was launched in an annotation of their own name."""
    images = np.zeros(len(on_gpu), dtype=bool)
    for name in np.unique(on_cpu.name).tolist():
        own = on_cpu.name == name
        inside = Cover.of(on_cpu.start_ns[own], on_cpu.end_ns[own]).holds(launched)
        for device in np.unique(on_gpu.device).tolist():
            here = (on_gpu.name == name) & (on_gpu.device == device)
            starts = work.start_ns[inside & (work.device == device)]
            first, past = (np.searchsorted(starts, times[here]) for times in (on_gpu.start_ns, on_gpu.end_ns))
            images[here] = past > first
    return images


def _holders(on_gpu: Annotations, work: GpuWork) -> Ints:
    """For each piece the range that holds it, of its own stream if one does; the ranges are in order."""
    found = np.full(len(work), _NONE, dtype=np.int64)
    for device in np.unique(work.device).tolist():
        own = np.flatnonzero(on_gpu.device == device)
        here = np.flatnonzero(work.device == device)
        found[here] = _innermost(on_gpu, own, work, here)
        for stream in np.unique(work.stream[here]).tolist():
            on = here[work.stream[here] == stream]
            same = _innermost(on_gpu, own[on_gpu.stream[own] == stream], work, on)
            found[on] = np.where(same == _NONE, found[on], same)
    return found


def _innermost(on_gpu: Annotations, which: Ints, work: GpuWork, pieces: Ints) -> Ints:
    """Which of these ranges, that hold a piece from start to end, began last; of those the shortest one."""
    which = which[np.lexsort((-on_gpu.end_ns[which], on_gpu.start_ns[which]))]
    start, end = on_gpu.start_ns[which] - _ROUNDING_NS, on_gpu.end_ns[which] + _ROUNDING_NS
    around = np.array([*_around(start.tolist(), end.tolist()), _NONE])
    found = np.searchsorted(start, work.start_ns[pieces], side="right") - 1
    for _ in range(_DEEPEST):
        outside = (found != _NONE) & (end[found] < work.end_ns[pieces] if len(end) else False)
        if not outside.any():
            break
        found[outside] = around[found[outside]]
    else:
        found[outside] = _NONE
    return np.append(which, _NONE)[found]


def _around(starts: list[int], ends: list[int]) -> list[int]:
    """For each range the last one before it that was still open when it began; the ranges are in order."""
    still_open: list[int] = []
    around = []
    for place, start in enumerate(starts):
        while still_open and ends[still_open[-1]] < start:
            still_open.pop()
        around.append(still_open[-1] if still_open else _NONE)
        still_open.append(place)
    return around
