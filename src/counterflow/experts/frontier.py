"""What each further move brings: how balanced a placement can be made with so many moves, for all numbers at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np

from counterflow.experts.balance import balance
from counterflow.experts.certificate import Certificate, limits
from counterflow.experts.loads import Floats, Ints, as_loads
from counterflow.experts.migration import plan_migration
from counterflow.experts.moves import Paths, lower
from counterflow.experts.nodes import least_peak
from counterflow.experts.placement import Placement

SMALLEST_GAIN = 1e-9
"""Of balancedness: the same sums in another order differ by less."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """The balancedness that growing numbers of moves reach, from ``current`` on.

    ``moves``, int64 [points], are all layers' together and grow; ``balancedness`` and ``worst``, float64 [points], are
    the mean and the least of the layers, and never fall. Point 0 is ``current`` as it is. ``as_published`` is the
    first point that is as balanced as ``balance(..., current=)``, and the last one is as balanced as ``balance``
    without ``current``. Up to the ``knee`` moves bring more than all moves do on average, and beyond it less.
    """

    current: Placement
    moves: Ints
    balancedness: Floats
    worst: Floats
    as_published: int
    _load: Floats
    _bound: Floats
    _steps: list[_Step]
    _paths: tuple[Paths, ...]
    _ends: tuple[Ints, ...]
    _hierarchy: str

    @property
    def knee(self) -> int:
        """The point after which further moves bring less than all moves do on average."""
        gain = self.balancedness - self.balancedness[0]
        above = gain * self.moves[-1] - self.moves * gain[-1]
        return int(np.flatnonzero(above >= above.max() - SMALLEST_GAIN)[-1])

    def at(self, max_moves: int) -> int:
        """The last point with at most ``max_moves`` moves."""
        return max(int(np.searchsorted(self.moves, max_moves, side="right")) - 1, 0)

    def placement(self, point: int) -> Placement:
        """That of ``point``, with its certificate.

        Example:
            >>> from counterflow import Placement
            >>> from counterflow.experts import move_frontier
            >>> found = move_frontier([[8, 8, 1, 1]], Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=2))
            >>> [found.placement(point).physical_to_logical.tolist() for point in (0, 1)]
            [[[0, 1, 2, 3]], [[2, 1, 0, 3]]]
        """
        left = np.zeros(self.current.num_layers, dtype=np.int64)
        for step in self._steps[:point]:
            left[step.layer] = step.stop
        slots = self.current.physical_to_logical
        for path in self._paths:
            slots = path.after(slots, np.where(left <= path.lengths, left, 0))
            left -= path.lengths
            left[left <= 0] = 0
        for number, end in enumerate(self._ends, start=1):
            slots = np.where((left == number)[:, None], end, slots)
        bare = replace(self.current, physical_to_logical=slots, certificate=None, hierarchy=self._hierarchy)
        return replace(bare, certificate=_certificate(bare, self._load, self._bound))


class _Step(NamedTuple):
    """A layer goes on to ``stop``: 0 is as it is; the stops along all its paths follow, path by path, then the ends."""

    slope: float
    layer: int
    stop: int
    moves: int
    gain: float


def move_frontier(
    loads: object,
    current: Placement,
    num_groups: int = 1,
    hierarchy: str = "auto",
    node_spill: float = 0.0,
) -> Frontier:
    """How balanced ``current`` becomes for ``loads`` [layers, experts] with growing numbers of moves.

    A layer changes slot by slot, each time where that brings most for each move; in the end it may become what
    ``balance`` makes of it, with ``current`` or without. Of all ways to stop somewhere in every layer none has, for as
    many moves as a point of the frontier, a better mean over the layers. Moves are counted as ``plan_migration`` counts
    them, which may find some to be superfluous. The whole frontier costs two or three calls of ``balance``, whose
    ``num_groups``, ``hierarchy`` and ``node_spill`` these are.

    Raises:
        PlacementError: as ``balance``, or ``current`` does not keep its groups on nodes and has to change first.

    Example:
        >>> from counterflow import Placement
        >>> from counterflow.experts import move_frontier
        >>> found = move_frontier([[8, 8, 1, 1]], Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=2))
        >>> found.moves.tolist(), found.balancedness.round(4).tolist(), found.knee
        ([0, 2], [0.5625, 1.0], 1)
    """
    load = as_loads(loads)
    sizes = (current.num_slots, current.num_gpus, current.num_nodes, num_groups, hierarchy, node_spill)
    fresh = balance(load, *sizes)
    if fresh.hierarchy == "node":
        balance(load, *sizes, current, 0)  # says which layer does not keep its groups on nodes
    served = balance(load, *sizes, current)
    plans = [plan_migration(current, end) for end in (served, fresh)]
    scaled = load / np.where(load.any(axis=1), load.max(axis=1), 1.0)[:, None]
    nodes = current.num_nodes if fresh.hierarchy == "node" else 1
    paths = [_path(scaled, current, end, nodes) for end in (served, fresh)]
    mean, even = scaled.sum(axis=1) / current.num_gpus, current.balancedness(scaled)
    reached = [plan.new.balancedness(scaled) for plan in plans]
    steps: list[_Step] = []
    for layer in range(current.num_layers):
        moves, values = [0], [float(even[layer])]
        for path in paths:
            length = int(path.lengths[layer])
            moves += path.moves[layer, :length].tolist()
            values += np.minimum(mean[layer] / path.peaks[layer, :length], 1.0).tolist()
        moves += [int(plan.moves[layer]) for plan in plans]
        values += [float(balancedness[layer]) for balancedness in reached]
        steps.extend(_steps(layer, moves, values))
    steps.sort(key=lambda step: (-step.slope, step.layer))  # stable: those of one layer keep their order
    moves_so_far = np.cumsum([0, *(step.moves for step in steps)])
    mean_so_far, worst = _balancedness(even, steps)
    as_served = int(np.argmax(mean_so_far >= reached[0].mean() - SMALLEST_GAIN))
    ends = tuple(plan.new.physical_to_logical for plan in plans)
    assert fresh.certificate is not None, "balance gives one"
    bound = fresh.certificate.max_load_bound
    known = (steps, tuple(paths), ends, fresh.hierarchy)
    return Frontier(current, moves_so_far, mean_so_far, worst, as_served, load, bound, *known)


def _certificate(placement: Placement, load: Floats, bound: Floats) -> Certificate:
    """That of ``placement``, given what no placement of these sizes can go below [layers]."""
    max_load = placement.gpu_loads(load).max(axis=1)
    bound = np.minimum(bound, max_load)  # the same sum in another order may round up
    least = least_peak(load, placement.num_slots, placement.num_gpus)
    by_gpu = placement.physical_to_logical.reshape(placement.num_layers, placement.num_gpus, -1)
    again = [
        (layer, gpu * len(row) + slot)
        for layer, rows in enumerate(by_gpu.tolist())
        for gpu, row in enumerate(rows)
        for slot, expert in enumerate(row)
        if expert in row[:slot]
    ]
    return Certificate(
        max_load, bound, limits(max_load, bound, load.sum(axis=1) / placement.num_gpus, least), (*again,)
    )


def _path(scaled: Floats, current: Placement, end: Placement, num_nodes: int) -> Paths:
    """The changes that bring every layer as low as in ``end``, or as far as single changes do."""
    goal = np.where(scaled.any(axis=1), end.gpu_loads(scaled).max(axis=1), np.inf)
    return lower(scaled, current.physical_to_logical, current.num_gpus, num_nodes, goal)


def _steps(layer: int, moves: list[int], values: list[float]) -> list[_Step]:
    """From stop to stop of one layer, so that no others, nor any mixture of them, bring more for as many moves.

    Example:
        >>> from counterflow.experts.frontier import _steps
        >>> [(step.stop, step.moves) for step in _steps(0, [0, 2, 3, 4, 9], [0.5, 0.6, 0.7, 0.9, 0.85])]
        [(3, 4)]
    """
    hull = [0]
    for stop in sorted(range(1, len(moves)), key=lambda stop: (moves[stop], -values[stop])):
        if values[stop] <= values[hull[-1]] + SMALLEST_GAIN:
            continue
        while len(hull) > 1 and _slope(moves, values, hull[-2], hull[-1]) <= _slope(moves, values, hull[-2], stop):
            hull.pop()
        hull.append(stop)
    return [
        _Step(_slope(moves, values, one, other), layer, other, moves[other] - moves[one], values[other] - values[one])
        for one, other in pairwise(hull)
    ]


def _slope(moves: list[int], values: list[float], one: int, other: int) -> float:
    more = moves[other] - moves[one]
    return (values[other] - values[one]) / more if more else inf


def _balancedness(even: Floats, steps: list[_Step]) -> tuple[Floats, Floats]:
    """The mean and the least of all layers after each step, from the balancedness ``even`` [layers] on."""
    now = even.copy()
    mean, worst = [now.mean()], [now.min()]
    for step in steps:
        now[step.layer] += step.gain
        mean.append(now.mean())
        worst.append(now.min())
    return np.maximum.accumulate(mean), np.array(worst)
