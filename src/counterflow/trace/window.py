"""The work of one GPU in one window of time, which all figures start from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import GpuWork, Ints
from counterflow.trace.cover import Cover
from counterflow.trace.phases import Phases
from counterflow.trace.read import Trace
from counterflow.trace.rules import COMMUNICATION, COMPUTE

Bools = npt.NDArray[np.bool_]


class Window:
    """The work of a GPU, clipped to a window, with the class, the launch and the phase of each piece.

    Args:
        trace: where it is from.
        device: the GPU.
        rows: which pieces of the trace's work it is, as an index; a slice of all takes no copies.
        classes: the classes of all the trace's work [work].
        launch: the rows of all its launch records, -1 where not told [work].
        phases: the phases of all of it.
        start: when the window begins, in ns.
        end: when it ends.
    """

    def __init__(
        self,
        trace: Trace,
        device: int,
        rows: Ints | slice,
        classes: Ints,
        launch: Ints,
        phases: Phases,
        start: int,
        end: int,
    ) -> None:
        self.trace, self.device, self.start, self.end = trace, device, start, end
        self.work = _clipped(trace.work.rows(rows), start, end)
        self.classes, self.launch = classes[rows], launch[rows]
        self.phases, self.phase_rows = phases, phases.rows[rows]
        self.computes = self.classes == COMPUTE
        self.communicates = np.isin(self.classes, COMMUNICATION)
        self.lasts = self.work.end_ns > self.work.start_ns
        """What has a length; the profiler also tells of kernels without one."""
        self.compute = self.cover(self.computes)
        self.communication = self.cover(self.communicates)
        self.exposed = self.communication - self.compute

    def cover(self, which: Bools) -> Cover:
        """When any of these pieces of work runs."""
        return Cover.of(self.work.start_ns, self.work.end_ns, which)

    def name(self, row: int) -> str:
        """The kernel's name."""
        return self.trace.names[int(self.work.name[row])]

    def phase(self, row: int) -> str:
        """The name of the kernel's phase, "" without one."""
        place = int(self.phase_rows[row])
        return self.phases.names[place] if place >= 0 else ""


def _clipped(work: GpuWork, start: int, end: int) -> GpuWork:
    if not len(work) or (work.start_ns.min() >= start and work.end_ns.max() <= end):
        return work
    columns = vars(work) | {"start_ns": work.start_ns.clip(start, end), "end_ns": work.end_ns.clip(start, end)}
    return GpuWork(**columns)


def us(ns: int) -> float:
    """Microseconds, as figures are told."""
    return ns / 1000


def sums(place: Ints, values: Ints, size: int) -> Ints:
    """The sum of the values of each place, exact, shape [size]."""
    total = np.zeros(size, dtype=np.int64)
    np.add.at(total, place, values)
    return total
