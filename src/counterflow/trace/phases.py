"""Which part of the program asked for a piece of GPU work: by the annotations on the CPU, else by kernel order.

Half of a training step is launched by autograd's thread, while the annotations stand on the thread that called it.
So a piece belongs to the innermost annotation that was open when it was launched, on its own thread if that has one,
else on any; identifiers are not used, for they often match nothing. A CUDA graph is one launch: its pieces go by the
annotations on the GPU's own time, where those name them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import Annotations, Ints
from counterflow.trace.cover import Cover, blocks
from counterflow.trace.graph_phases import phases_in_graphs
from counterflow.trace.kernel_order import phases_by_order
from counterflow.trace.parts import Part, part_of
from counterflow.trace.read import Trace, launch_of

NONE = -1
"""The phase of what was launched outside all annotations."""


@dataclass(frozen=True, eq=False)
class Phases:
    """Ranges of the program and the GPU work of each.

    ``names`` are those of the ranges, ``parts`` what each tells of the model, None where it tells nothing; ``rows``
    is for each piece of GPU work the range it belongs to, NONE outside all, shape [work]. ``source`` is
    "annotations", "kernel order" or "none".
    """

    names: tuple[str, ...]
    parts: tuple[Part | None, ...]
    rows: Ints
    source: str


def phases_of(trace: Trace, classes: Ints) -> Phases:
    """The phases by annotations if one of them names a part of a layer, else by the order of kernels if that tells.

    Annotations that name no part (a framework's own, mostly) serve where the order of kernels tells nothing either.

    Args:
        trace: the trace.
        classes: the class of each piece of its work, as ``Rules.classify`` gives it [work].

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow.trace import Rules, open_trace
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> kernels = ["flash_fwd_kernel", "moe_gemm", "deep_ep::intranode::combine"]
        >>> slices = [
        ...     f'{{"ph": "X", "cat": "kernel", "name": "{name}", "tid": 7, "ts": {at}, "dur": 9}}'
        ...     for at, name in zip(range(0, 30, 10), kernels)
        ... ]
        >>> _ = path.write_text(f'{{"traceEvents": [{",".join(slices)}]}}')
        >>> trace = open_trace(path)
        >>> phases = phases_of(trace, Rules().classify(trace.work, trace.names, trace.sms))
        >>> phases.source, phases.names
        ('kernel order', ('attention(F)', 'experts(F)', 'combine(F)'))
    """
    launch = launch_of(trace.work, trace.launches)
    leaves, rows = phase_rows(trace, launch)
    leaves, rows = phases_in_graphs(trace, launch, leaves, rows)
    names = tuple(trace.names[name] for name in leaves.name.tolist())
    parts = tuple(map(part_of, names))
    used = np.unique(rows[rows != NONE]).tolist()
    if not any(parts[row] for row in used):
        found, by_order = phases_by_order(trace, classes)
        if found:
            return Phases(tuple(map(str, found)), tuple(found), by_order, "kernel order")
    return Phases(names, parts, rows, "annotations" if used else "none")


def phase_rows(trace: Trace, launch: Ints) -> tuple[Annotations, Ints]:
    """The innermost annotations, in order, and for each piece of GPU work the row of its own; NONE outside them.

    ``launch`` is the row of each piece's launch record, as ``launch_of`` gives it [work].

    Annotations that hold others, and the profiler's own steps, are no phases; but where an annotation names a part
    of a layer, those inside it that name none (of a collective, say) count as nothing.
    """
    leaves = _leaves(trace)
    rows = np.full(len(trace.work), NONE, dtype=np.int32)
    if not len(leaves) or not len(trace.launches):
        return leaves, rows
    threads = {one: np.flatnonzero(leaves.thread == one) for one in np.unique(leaves.thread).tolist()}
    for some in blocks(len(rows)):
        own = launch[some]
        at = trace.launches.start_ns[own]
        found = _open_at(leaves, np.arange(len(leaves)), at)
        for one, of_thread in threads.items():
            here = trace.launches.thread[own] == one
            row = _open_at(leaves, of_thread, at[here])
            found[here] = np.where(row == NONE, found[here], row)
        rows[some] = np.where(own >= 0, found, NONE)
    return leaves, rows


def _leaves(trace: Trace) -> Annotations:
    ranges = trace.annotations
    steps = np.array([name.startswith("ProfilerStep#") for name in trace.names], dtype=bool)
    own = ranges.rows(np.flatnonzero((ranges.on_gpu == 0) & ~steps[ranges.name])) if len(ranges) else ranges
    own = own.rows(~_inside_parts(trace, own))
    # By start, the longer one first: a range holds another one of its thread exactly if it holds the next one.
    order = np.lexsort((-own.end_ns, own.start_ns, own.thread))
    own = own.rows(order)
    if len(own) > 1:
        holds = (own.thread[1:] == own.thread[:-1]) & (own.end_ns[1:] <= own.end_ns[:-1])
        own = own.rows(np.flatnonzero(~np.append(holds, False)))
    return own.rows(np.argsort(own.start_ns, kind="stable"))


def _inside_parts(trace: Trace, ranges: Annotations) -> npt.NDArray[np.bool_]:
    """Which ranges name no part and begin inside one of their thread that does."""
    named = [name for name in np.unique(ranges.name).tolist() if part_of(trace.names[name])]
    parts = np.isin(ranges.name, named)
    inside = np.zeros(len(ranges), dtype=bool)
    for thread in np.unique(ranges.thread[parts]).tolist():
        here = ranges.thread == thread
        cover = Cover.of(ranges.start_ns[here & parts], ranges.end_ns[here & parts])
        inside |= here & ~parts & cover.holds(ranges.start_ns) & cover.holds(ranges.end_ns - 1)
    return inside


def _open_at(leaves: Annotations, which: Ints, times: Ints) -> Ints:
    """The row of the last of these ranges that began before each time, if it was still open then."""
    starts = leaves.start_ns[which]
    place = np.searchsorted(starts, times, side="right") - 1
    row = which[np.maximum(place, 0)]
    return np.where((place >= 0) & (times < leaves.end_ns[row]), row, NONE)
