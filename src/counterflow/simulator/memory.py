"""What a rank has to keep: the activations stored by its forwards and not yet freed by its backwards."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from counterflow.errors import SimulatorError
from counterflow.schedule import Rows, Schedule, held_activations
from counterflow.schedule.rows import B, F, I, W
from counterflow.simulator.costs import Costs
from counterflow.timeline import COMPUTE, Timeline


def peak_activations(schedule: Schedule) -> list[int]:
    """For each rank the most activations that it holds at once, one for each stage and micro-batch in flight.

    F stores one; B, or W after an I, frees it. Inside an F&B the forward has stored and the backward has not
    yet freed: the "+1" of the published table.

    Example:
        >>> from counterflow import dualpipe, one_f_one_b
        >>> from counterflow.simulator import peak_activations
        >>> peak_activations(one_f_one_b(4, 8)), peak_activations(dualpipe(4, 8))
        ([4, 3, 2, 1], [5, 5, 5, 5])
    """
    return _largest(schedule.rows, held_activations(schedule.rows))


def peak_activation_bytes(schedule: Schedule, costs: Costs) -> list[int]:
    """For each rank the most bytes of activations that it holds at once, by the two sizes that ``costs`` state.

    Raises:
        SimulatorError: the costs name fewer stages than the schedule has.
    """
    rows = schedule.rows
    stored, freed = _stored_and_freed(rows, _sizes(schedule, costs))
    after = np.cumsum(stored - freed)
    before_rank = np.concatenate(([0.0], after))[rows.first[:-1]]
    # Within an action the forward stores before the backward frees: the most is held in between.
    return _largest(rows, after + freed - np.repeat(before_rank, np.diff(rows.first)))


class Held(NamedTuple):
    """What one rank holds over time: ``amount[k]`` from ``time_ns[k]`` on, shape [changes]."""

    time_ns: npt.NDArray[np.int64]
    amount: npt.NDArray[np.float64]


def activations_over_time(schedule: Schedule, timeline: Timeline, costs: Costs | None = None) -> list[Held]:
    """For each rank the activations that it holds, in the time of ``timeline``.

    They are bytes with ``costs`` that state their sizes, otherwise a number. A forward stores when it starts, a
    backward frees when it ends: I what it lets go, W the rest, B both.

    Raises:
        SimulatorError: the costs name fewer stages than the schedule has, or the timeline is not of the schedule.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> from counterflow.simulator import activations_over_time
        >>> schedule = one_f_one_b(1, 2)
        >>> held = activations_over_time(schedule, simulate(schedule, Costs()))[0]
        >>> held.time_ns.tolist(), held.amount.tolist()
        ([0, 3000, 3000, 6000], [1.0, 0.0, 1.0, 0.0])
    """
    rows = schedule.rows
    sizes = np.array([[0.0, 1.0]] * schedule.num_stages)
    if costs is not None and (given := _sizes(schedule, costs)).any():
        sizes = given
    stored, freed = _stored_and_freed(rows, sizes)
    start, end = _times(schedule, timeline)
    held = []
    for first, last in zip(rows.first.tolist(), rows.first[1:].tolist(), strict=False):
        time = np.column_stack((start[first:last], end[first:last])).reshape(-1)
        change = np.column_stack((stored[first:last], -freed[first:last])).reshape(-1)
        held.append(Held(time[change != 0], np.cumsum(change[change != 0])))
    return held


def _sizes(schedule: Schedule, costs: Costs) -> npt.NDArray[np.float64]:
    """What one micro-batch stores at each stage until I, and until W, shape [stages, 2]."""
    return np.array([costs.stored_bytes(stage) for stage in range(schedule.num_stages)], dtype=float)


def _stored_and_freed(rows: Rows, sizes: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """What each action stores and what it frees, shape [actions]."""
    until_input, until_weight = np.moveaxis(sizes[rows.stage], 2, 0)  # a second part of kind -1 counts for nothing
    stored = (until_input + until_weight) * (rows.kind == F)
    freed = until_input * np.isin(rows.kind, (B, I)) + until_weight * np.isin(rows.kind, (B, W))
    return stored.sum(axis=1), freed.sum(axis=1)


def _times(schedule: Schedule, timeline: Timeline) -> npt.NDArray[np.int64]:
    """Start and end of every action, shape [2, actions]."""
    times = {(span.rank, span.name): (span.start_ns, span.end_ns) for span in timeline if span.lane == COMPUTE}
    places = [(rank, str(action)) for rank, row in enumerate(schedule.rows) for action in row]
    for rank, name in places:
        if (rank, name) not in times:
            raise SimulatorError(
                f"the timeline has no {name} on rank {rank}, which {schedule.name} has; give a step of this schedule"
            )
    return np.array([times[place] for place in places], dtype=np.int64).T


def _largest(rows: Rows, held: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> list[int]:
    """The largest of each rank."""
    spans = zip(rows.first.tolist(), rows.first[1:].tolist(), strict=False)
    return [int(held[first:last].max(initial=0)) for first, last in spans]
