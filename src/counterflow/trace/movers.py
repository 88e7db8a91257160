"""Which work of one GPU moves data, or may: the rest computes.

Work that was launched for itself is judged by its stream. Inside a CUDA graph a stream tells nothing, for each replay
lays the branches of the graph on streams as it likes, compute and copies on the same ones; nor does it in a trace whose
launches are not told. There it counts what ran beside compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import KERNEL, MEMCPY, GpuWork, Ints
from counterflow.trace.cover import Cover
from counterflow.trace.hints import Hint
from counterflow.trace.kernel_phases import PAUSE
from counterflow.trace.rules import COMMUNICATION, COMPUTE, LONG_NS, UNKNOWN_KERNEL

Bools = npt.NDArray[np.bool_]

OUT, IN = "Memcpy DtoH", "Memcpy HtoD"
"""The two legs of an exchange through the memory of the host."""

_RIGHT_AFTER_NS = 20_000
_BESIDE = 0.25


@dataclass(frozen=True, eq=False)
class Movers:
    """What moves data among the work of one GPU, in the order of launch; all arrays are of shape [work].

    ``alone``: whether its launch is told and launched nothing else. ``moves``: communication, and what may be.
    ``aside``: what is not, but runs on a stream of communication, as casts before a transfer do. ``joined``: whether it
    goes with the one before, as copies do that move one exchange together. ``origin``: for a copy that brings in what
    another one took out the place of that one, else -1.
    """

    alone: Bools
    moves: Bools
    aside: Bools
    joined: Bools
    origin: Ints

    @classmethod
    def of(
        cls,
        work: GpuWork,
        classes: Ints,
        launched: Ints,
        in_graph: Bools,
        names: Sequence[str],
        hints: Mapping[int, Hint],
        sms: int,
    ) -> Movers:
        """Look at the work of one GPU in the order of its launch.

        Args:
            work: the work.
            classes: the class of each piece [work].
            launched: when each piece was launched, in ns [work]; -1 where not told.
            in_graph: whether its launch launched others too [work].
            names: the trace's names.
            hints: what each name hints at.
            sms: how many SMs the GPU has, 0 where not told.
        """
        alone = (launched >= 0) & ~in_graph
        aside = _aside(work, classes, in_graph)
        moves = np.isin(classes, (*COMMUNICATION, UNKNOWN_KERNEL)) | _copies(work, in_graph, alone, names)
        moves |= _small_kernels(work, classes, ~alone & ~moves & ~aside, hints, sms)
        origin = _origins(work, np.flatnonzero(moves & ~alone), names)
        return cls(alone, moves, aside, _joined(work, launched, np.flatnonzero(moves & (origin < 0))), origin)

    def edges(self, work: GpuWork, computes: Ints) -> Bools:
        """Before which compute kernels communication begins; ``computes``: their places.

        Where launches are not told one by one, what is still running as it starts was not needed for it.
        """
        edge = np.zeros(len(computes) + 1, dtype=bool)
        begins = self.moves & ~self.joined & (self.origin < 0)
        edge[np.searchsorted(computes, np.flatnonzero(begins & self.alone))] = True
        ends = np.maximum.accumulate(work.end_ns[computes])
        edge[np.searchsorted(ends, work.start_ns[begins & ~self.alone], side="right")] = True
        return edge[:-1]


def _aside(work: GpuWork, classes: Ints, in_graph: Bools) -> Bools:
    length = work.end_ns - work.start_ns
    talks = np.isin(classes, COMMUNICATION)
    streams, place = np.unique(work.stream, return_inverse=True)
    talking, computing = (
        np.bincount(place, weights=length * which, minlength=len(streams)) for which in (talks, classes == COMPUTE)
    )
    talkative = talking > computing
    talkative[computing.argmax()] = False
    return np.asarray(talkative[place] & ~talks & ~in_graph)


def _copies(work: GpuWork, in_graph: Bools, alone: Bools, names: Sequence[str]) -> Bools:
    """Copies on a stream that runs no kernels, and those between GPU and host that run beside kernels.

    In a graph they need not: there it is enough that each copy to the host is followed by one back.
    """
    copies, kernels = work.kind == MEMCPY, work.kind == KERNEL
    lonely = copies & ~np.isin(work.stream, np.unique(work.stream[kernels]))
    through_host = copies & ~alone & _named(work, names, (OUT, IN))
    beside = _share_beside(work, through_host, Cover.of(work.start_ns, work.end_ns, kernels)) >= _BESIDE
    back = _origins(work, np.flatnonzero(through_host & in_graph), names) >= 0
    returned = 2 * np.count_nonzero(back) == np.count_nonzero(through_host)
    return np.asarray(lonely | (through_host & (beside or returned)))


def _small_kernels(work: GpuWork, classes: Ints, which: Bools, hints: Mapping[int, Hint], sms: int) -> Bools:
    """Long kernels on at most half of the SMs, of a name that hints at nothing and often runs beside larger ones."""
    kernels = (work.kind == KERNEL) & (classes == COMPUTE)
    small = kernels & which & (work.blocks > 0) & (work.blocks <= sms // 2)
    long = small & (work.end_ns - work.start_ns >= LONG_NS)
    unknown = [name for name in np.unique(work.name[long]).tolist() if hints[name] == Hint()]
    found = np.zeros(len(work), dtype=bool)
    larger = Cover.of(work.start_ns, work.end_ns, kernels & ~small)
    for name in np.setdiff1d(unknown, work.name[kernels & ~small]).tolist():
        own = kernels & (work.name == name)
        found |= own & (_share_beside(work, own, larger) >= _BESIDE)
    return found


def _share_beside(work: GpuWork, which: Bools, others: Cover) -> float:
    """How much of the time of some work lies beside other work."""
    start, end = work.start_ns[which], work.end_ns[which]
    return float(others.within_ns(start, end).sum() / max((end - start).sum(), 1))


def _origins(work: GpuWork, rows: Ints, names: Sequence[str]) -> Ints:
    """An exchange through the host has two legs: the n-th copy in brings what the n-th copy out took.

    Only where no copy in begins before its copy out has ended. The trace may begin or end inside an exchange.
    """
    origin = np.full(len(work), -1, dtype=np.int64)
    moving = work.rows(rows)
    out, into = (rows[_named(moving, names, (leg,))] for leg in (OUT, IN))
    into = into[max(len(into) - len(out), 0) :]
    out = out[: len(into)]
    if (work.end_ns[out] <= work.start_ns[into]).all():
        origin[into] = out
    return origin


def _named(work: GpuWork, names: Sequence[str], begins: tuple[str, ...]) -> Bools:
    named = [name for name in np.unique(work.name).tolist() if names[name].startswith(begins)]
    return np.isin(work.name, named)


def _joined(work: GpuWork, launched: Ints, rows: Ints) -> Bools:
    """Which of these transfers go with the one before.

    They were launched right after it, with no compute and no pause in between; or, where launches are not told one
    by one (a graph, a trace of the GPU alone), they run right after it.
    """
    joined = np.zeros(len(work), dtype=bool)
    if len(rows) < 2:
        return joined
    usual = np.median(np.diff(launched))
    launches, reach = launched[rows], np.maximum.accumulate(work.end_ns[rows])
    one_by_one = (launches[:-1] >= 0) & (launches[1:] > launches[:-1])
    pause = np.where(one_by_one, np.diff(launches), work.start_ns[rows[1:]] - reach[:-1])
    at_once = (np.diff(rows) == 1) & (pause <= PAUSE * usual)
    joined[rows[1:]] = np.where(one_by_one, at_once, pause <= _RIGHT_AFTER_NS)
    joined[rows[begins_of_exchanges(joined[rows], np.append(0, pause))]] = False
    return joined


def begins_of_exchanges(joined: Bools, pause: Ints) -> list[int]:
    """Where exchanges begin inside runs of copies that were launched on end.

    An exchange takes as many copies each time. So a run as long as two others together, of lengths that come several
    times, is those two; of several places to cut it, the one with the longest pause is taken.

    Args:
        joined: whether each copy goes with the one before [copies].
        pause: how long after the one before it came [copies].

    Example:
        >>> import numpy as np
        >>> joined = np.array([0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1], dtype=bool)
        >>> begins_of_exchanges(joined, np.array([0] * 12 + [9, 7, 1]))
        [12]
    """
    begins = np.flatnonzero(~joined)
    lengths = np.diff(begins, append=len(joined))
    kinds, often = np.unique(lengths, return_counts=True)
    known: set[int] = set()
    cuts: dict[int, list[int]] = {}
    for length, times in zip(kinds.tolist(), often.tolist(), strict=True):
        cuts[length] = [one for one in sorted(known) if length - one in known]
        if times > 1 and not cuts[length]:
            known.add(length)
    found = []
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        places = [begin + cut for cut in cuts[length]]
        found += sorted(places, key=lambda place: int(pause[place]))[-1:]
    return found
