"""How many redundant experts pay: each further slot evens the GPUs a little more, and takes memory on all of them."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.placement import whole_number
from counterflow.experts.replay import Progress, ReplaySettings, replay


@dataclass(frozen=True)
class Redundancy:
    """What one number of replicas comes to.

    ``slots`` are those of each GPU in each layer, which is what its memory goes by. ``balancedness`` is the mean over
    steps and layers, ``slowdown`` that of ``Replay``. ``gain`` is by how much the step to this number, from the one
    with a slot less on every GPU, makes the experts faster, as a share; None for the fewest.
    """

    num_replicas: int
    num_redundant_experts: int
    slots: int
    balancedness: float
    slowdown: float
    gain: float | None


def sweep_replicas(
    windows: Any,
    policy: str,
    most_replicas: int,
    num_gpus: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    settings: ReplaySettings | None = None,
    progress: Progress | None = None,
) -> tuple[Redundancy, ...]:
    """``replay`` with every number of replicas up to ``most_replicas`` that gives all GPUs equally many slots.

    Raises:
        PlacementError: as ``replay``, or no such number holds all experts.

    Example:
        >>> from counterflow.experts import ReplaySettings, sweep_replicas
        >>> settings = ReplaySettings(window_size=1, step_interval=1)
        >>> rows = sweep_replicas([[[8, 2, 1, 1]]] * 4, "balance", 8, 2, settings=settings)
        >>> [(row.num_replicas, round(row.slowdown, 3)) for row in rows]
        [(4, 1.542), (6, 1.0), (8, 1.0)]
    """
    num_gpus, most = whole_number("num_gpus", num_gpus), whole_number("most_replicas", most_replicas)
    experts = np.shape(windows)[-1] if np.ndim(windows) else 0
    fewest = -(-experts // num_gpus) * num_gpus
    if most < fewest:
        raise PlacementError(
            f"at most {most} replicas on {num_gpus} GPUs cannot hold {experts} experts: sweep up to {fewest} or more"
        )
    sizes = range(fewest, most + 1, num_gpus)
    rows: list[Redundancy] = []
    for index, replicas in enumerate(sizes):
        told = None if progress is None else _part(progress, index, len(sizes))
        found = replay(windows, policy, replicas, num_gpus, num_nodes, num_groups, settings, told)
        gain = rows[-1].slowdown / found.slowdown - 1.0 if rows else None
        even = float(found.balancedness.mean())
        rows.append(Redundancy(replicas, replicas - experts, replicas // num_gpus, even, found.slowdown, gain))
    return tuple(rows)


def worthwhile(rows: tuple[Redundancy, ...], slot_cost: float) -> Redundancy:
    """The row up to which slots pay, when one more on every GPU costs ``slot_cost`` of the throughput.

    A slot takes the weights of one expert of every layer away from what else the memory of a GPU is good for, such as
    the cache that limits how many requests are served at once; ``slot_cost`` is what share of the throughput that is
    worth. The row is the one with the largest throughput after that cost: no number of further slots gains as much as
    it costs, though a single one may, by chance, between two that do not.

    Raises:
        PlacementError: ``slot_cost`` is not from 0 to less than 1.

    Example:
        >>> from counterflow.experts.redundancy import Redundancy, worthwhile
        >>> rows = (Redundancy(4, 0, 2, 0.8, 1.25, None), Redundancy(6, 2, 3, 0.99, 1.01, 0.238),
        ...     Redundancy(8, 4, 4, 1.0, 1.0, 0.01))
        >>> worthwhile(rows, 0.02).num_replicas, worthwhile(rows, 0.005).num_replicas
        (6, 8)
    """
    if not (math.isfinite(slot_cost) and 0 <= slot_cost < 1):
        raise PlacementError(f"slot_cost is {reprlib.repr(slot_cost)}; it has to be a share, from 0 to less than 1")
    return max(rows, key=lambda row: ((1 - slot_cost) ** row.slots / row.slowdown, -row.slots))


def _part(progress: Progress, index: int, count: int) -> Progress:
    """The ``index``-th of ``count`` replays, all as long as each other, as progress of the whole."""
    return lambda done, total: progress(index * total + done, count * total)
