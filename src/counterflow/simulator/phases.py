"""When a rank idles: while the pipeline fills, while it is full, and while it drains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from counterflow.errors import ScheduleError
from counterflow.schedule import Action, ActionNames, Kind
from counterflow.schedule.rows import B, F, I
from counterflow.timeline import COMPUTE, Timeline


class Phases(NamedTuple):
    """The bubble of each rank in three parts, int64 arrays of shape [ranks], in nanoseconds."""

    warm_up_ns: npt.NDArray[np.int64]
    steady_ns: npt.NDArray[np.int64]
    cool_down_ns: npt.NDArray[np.int64]


def bubble_phases(timeline: Timeline) -> Phases:
    """The bubble of ``timeline``, simulated or measured, split at two moments of each rank.

    A rank warms up until its first backward (B, I or F&B) starts, and cools down from the end of its last forward
    (F or F&B) on; where all forwards end before the first backward starts, nothing is steady between. In a step
    of forwards alone, warm-up is the time before a rank's first action and cool-down that behind its last.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> from counterflow.simulator import bubble_phases
        >>> phases = bubble_phases(simulate(one_f_one_b(4, 8), Costs()))
        >>> phases.warm_up_ns.tolist(), phases.steady_ns.tolist(), phases.cool_down_ns.tolist()
        ([6000, 5000, 4000, 3000], [0, 0, 0, 0], [3000, 4000, 5000, 6000])
    """
    num_ranks = timeline.num_ranks
    on_lane = timeline.lane == (timeline.lanes.index(COMPUTE) if COMPUTE in timeline.lanes else -1)
    forward, backward = _kinds(timeline, on_lane)
    rank, start, end = timeline.rank[on_lane], timeline.start_ns[on_lane], timeline.end_ns[on_lane]
    if not len(rank):
        return Phases(*np.zeros((3, num_ranks), dtype=np.int64))
    begin, finish = start.min(), end.max()
    parts = np.zeros((3, num_ranks), dtype=np.int64)
    for one in range(num_ranks):
        here = rank == one
        if not here.any():
            parts[1, one] = finish - begin
            continue
        if backward.any():
            warm = start[here & backward].min(initial=finish)
            cool = max(end[here & forward].max(initial=begin), warm)
        else:
            warm, cool = start[here].min(), end[here].max()
        cuts = np.array([begin, warm, cool, finish])
        edges = np.concatenate((cuts[:1], np.column_stack((start[here], end[here])).reshape(-1), cuts[-1:]))
        idle_from, idle_to = np.maximum.accumulate(edges)[::2], edges[1::2]
        for part, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False)):
            parts[part, one] = np.maximum(np.minimum(idle_to, high) - np.maximum(idle_from, low), 0).sum()
    return Phases(*parts)


def _kinds(timeline: Timeline, on_lane: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """For each span of the compute lane whether a forward is in it, and whether a backward (B or I)."""
    if isinstance(timeline.names, ActionNames):
        kind = timeline.names.rows.kind[timeline.name[on_lane]]
        return (kind == F).any(axis=1), ((kind == B) | (kind == I)).any(axis=1)
    found = np.zeros((2, int(on_lane.sum())), dtype=bool)
    for index, name in enumerate(timeline.name[on_lane].tolist()):
        try:
            parts = Action.parse(timeline.names[name]).parts
        except ScheduleError:
            continue
        found[0, index] = any(part.kind is Kind.F for part in parts)
        found[1, index] = any(part.kind.sends_gradient for part in parts)
    return found[0], found[1]
