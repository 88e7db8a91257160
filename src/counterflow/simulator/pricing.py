"""What all actions and all transfers of a step cost: ``Costs`` over columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from counterflow.errors import SimulatorError
from counterflow.schedule import Action, Kind, Programs, Rows
from counterflow.schedule.rows import SIMPLE, F, Ints
from counterflow.simulator.costs import Costs


def durations_ns(costs: Costs, rows: Rows) -> Ints:
    """How long each action computes, shape [actions]: ``Costs.duration_ns`` for all at once.

    Raises:
        SimulatorError: the costs do not cover one of them.

    Example:
        >>> from counterflow import Costs, one_f_one_b
        >>> durations_ns(Costs(1, 2), one_f_one_b(1, 2).rows).tolist()
        [1000, 2000, 1000, 2000]
    """
    num_stages = int(rows.stage.max(initial=0)) + 1
    code = rows.kind * num_stages + rows.stage
    simple = np.full(len(SIMPLE) * num_stages, np.nan)
    for one in np.flatnonzero(np.bincount(code[rows.kind >= 0], minlength=len(simple))).tolist():
        kind, stage = divmod(one, num_stages)
        simple[one] = _us(costs, Action(SIMPLE[kind], stage, 0))
    paired = rows.kind[:, 1] >= 0
    us = simple[code[:, 0]]
    if paired.any():
        overlapped = np.full(num_stages, np.nan)
        for stage in np.unique(rows.stage[paired, 0]).tolist():
            given = costs.given(Kind.F_B, stage)
            overlapped[stage] = np.nan if given is None else given
        whole = overlapped[rows.stage[paired, 0]]
        us[paired] = np.where(np.isnan(whole), us[paired] + simple[code[paired, 1]], whole)
    missing = np.isnan(us)
    if missing.any():
        costs.duration_ns(rows.action(int(missing.argmax())))  # says which one, and what to give
    return _rounded(us * 1000)


def _us(costs: Costs, action: Action) -> float:
    """Its duration, or nan where only a pair may need it and states its own."""
    try:
        return costs.duration_us(action)
    except SimulatorError:
        return np.nan


def wires_ns(costs: Costs, programs: Programs) -> Ints:
    """How long each transfer occupies its channel, shape [transfers]: ``Costs.wire_ns`` for all at once.

    Raises:
        SimulatorError: the costs name fewer stages than the schedule has.
    """
    if costs.bandwidth_gb_per_s is None or not programs.num_transfers:
        return np.zeros(programs.num_transfers, dtype=np.int64)
    kind, stage = (column.reshape(-1)[programs.made_by] for column in (programs.rows.kind, programs.rows.stage))
    below = np.where(kind == F, stage, stage - 1)
    sizes = np.array([costs.boundary_bytes(one) for one in range(int(below.max()) + 1)])
    return _rounded(sizes[below] / costs.bandwidth_gb_per_s)


def _rounded(ns: npt.NDArray[np.float64]) -> Ints:
    if len(ns) and ns.max() >= 2**62:
        raise SimulatorError(f"an action or a transfer takes {ns.max():g} ns, more than 146 years; lower the costs")
    return np.rint(ns).astype(np.int64)
