"""What a rank has to keep: the activations stored by its forwards and not yet freed by its backwards."""

from __future__ import annotations

from collections.abc import Callable

from counterflow.schedule import Action, Kind, Schedule
from counterflow.simulator.costs import Costs

Sizes = Callable[[int], tuple[float, float]]
"""For a stage: what one micro-batch stores until I, and what until W."""


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
    return [int(_peak(row, lambda stage: (0, 1))) for row in schedule.rows]


def peak_activation_bytes(schedule: Schedule, costs: Costs) -> list[int]:
    """For each rank the most bytes of activations that it holds at once, by the two sizes that ``costs`` state.

    Raises:
        SimulatorError: the costs name fewer stages than the schedule has.
    """
    return [int(_peak(row, costs.stored_bytes)) for row in schedule.rows]


def _peak(row: tuple[Action, ...], sizes: Sizes) -> float:
    held = peak = 0.0
    for action in row:
        for part in action.parts:
            until_input, until_weight = sizes(part.stage)
            if part.kind is Kind.F:
                held += until_input + until_weight
            if part.kind.sends_gradient:
                held -= until_input
            if part.kind.finishes_weights:
                held -= until_weight
            peak = max(peak, held)
    return peak
