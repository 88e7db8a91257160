"""One placement for several kinds of traffic at once, each of which loads the experts in its own way."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.balance import balance
from counterflow.experts.loads import Floats, Ints, as_loads
from counterflow.experts.placement import Placement
from counterflow.loops import run_loop

STEPS_PER_SLOT = 800
"""So many moves are tried for each slot of a layer; three times as many lower the sum by 1 % on 32 GPUs."""

STEPS = 160_000
"""Up to five times as many where they come to no more than this: few slots are where a search gets caught."""

HOT = 0.015
"""The first moves may raise the sum by so much for each scenario; what later ones may falls to nothing as a square."""

LOWER = 1 - 1e-9
"""What is not lower by this factor is as low: loads that were added and taken off many times have lost that much."""


def balance_scenarios(
    loads: Mapping[str, object] | Iterable[object],
    num_replicas: int,
    num_gpus: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    hierarchy: str = "auto",
) -> Placement:
    """Place the experts once for several scenarios, so that none of them has a GPU that the others made hot.

    ``loads`` are the scenarios: a name and [layers, experts] for each, or an array [scenarios, layers, experts]. For
    every layer the sum over the scenarios of the largest GPU load, each as a multiple of that scenario's mean, is made
    as low as we can: every scenario counts alike, however many tokens were recorded of it. It is never higher than for
    ``balance`` of any one scenario or of their mixture, from which the search starts. The parts of one long recording
    are scenarios too: a placement for all of them relies less on what only one of them saw.

    The other arguments are those of ``balance``. The same input gives the same placement; it has no certificate, which
    would be for one load alone.

    Raises:
        PlacementError: no scenario, loads that are none (see ``as_loads``) or of different shapes, or numbers that do
            not divide as they have to.

    Example:
        >>> from counterflow.experts import balance_scenarios
        >>> code, prose = [[8, 8, 1, 1]], [[1, 1, 8, 8]]
        >>> placement = balance_scenarios({"code": code, "prose": prose}, num_replicas=4, num_gpus=2)
        >>> placement.balancedness(code).tolist(), placement.balancedness(prose).tolist()
        ([1.0], [1.0])

    Source: threshold accepting, Dueck and Scheuer, Journal of Computational Physics 90 (1990).
    """
    scenarios = _as_scenarios(loads)
    sizes = (num_replicas, num_gpus, num_nodes, num_groups, hierarchy)
    starts = [balance(load, *sizes) for load in (scenarios.mean(axis=0), *scenarios)]
    first = starts[0]
    relative = scenarios * first.num_gpus
    slots = first.physical_to_logical.copy()
    lowest = _sum_of_peaks(relative, first)
    for start in starts[1:]:
        slots, lowest = _lower(relative, start, slots, lowest)
    searched = replace(first, physical_to_logical=_search(relative, slots, first), certificate=None)
    slots, _ = _lower(relative, searched, slots, lowest)
    return replace(searched, physical_to_logical=slots)


def _as_scenarios(loads: Any) -> Floats:
    """The loads of each scenario [scenarios, layers, experts]; those of a layer add up to 1, or to 0."""
    if isinstance(loads, Mapping):
        named = {reprlib.repr(name): load for name, load in loads.items()}
    elif getattr(loads, "ndim", 3) == 3 and isinstance(loads, Iterable):
        named = {str(number): load for number, load in enumerate(loads)}
    else:
        raise PlacementError(
            f"the scenarios are a {type(loads).__name__}, of {getattr(loads, 'ndim', 0)} dimensions; "
            f"give a name and loads for each, or an array [scenarios, layers, experts]"
        )
    if not named:
        raise PlacementError("there is no scenario; give the loads of at least one")
    arrays: dict[str, Floats] = {}
    for name, load in named.items():
        try:
            arrays[name] = as_loads(load)
        except PlacementError as error:
            raise PlacementError(f"scenario {name}: {error}") from None
        if np.ndim(load) == 1 and not isinstance(loads, Mapping):
            raise PlacementError(
                f"scenario {name} has one dimension; give [layers, experts] for each: [[...]] where there is one layer"
            )
    (first, shape), *others = ((name, array.shape) for name, array in arrays.items())
    for name, other in others:
        if other != shape:
            raise PlacementError(
                f"scenario {name} has {other[0]} layers and {other[1]} experts, scenario {first} {shape[0]} and "
                f"{shape[1]}; give loads of the same model"
            )
    stacked = np.stack(list(arrays.values()))
    largest = stacked.max(axis=2, keepdims=True)
    stacked = np.divide(stacked, largest, out=np.zeros_like(stacked), where=largest > 0)  # or a sum may overflow
    return np.asarray(stacked / np.maximum(stacked.sum(axis=2, keepdims=True), 1.0))


def _sum_of_peaks(relative: Floats, placement: Placement) -> Floats:
    """What is made low [layers]: the sum over the scenarios of the largest GPU load."""
    return np.asarray(np.sum([placement.gpu_loads(load).max(axis=1) for load in relative], axis=0))


def _lower(relative: Floats, placement: Placement, slots: Ints, lowest: Floats) -> tuple[Ints, Floats]:
    """``slots``, and the ``placement`` of those layers where that is lower."""
    peaks = _sum_of_peaks(relative, placement)
    lower = peaks < LOWER * lowest
    return np.where(lower[:, None], placement.physical_to_logical, slots), np.where(lower, peaks, lowest)


def _search(relative: Floats, slots: Ints, like: Placement) -> Ints:
    """``slots`` [layers, slots] with a lower sum of peaks, mostly: what it may not raise, the caller holds it to."""
    scenarios, rows, experts = relative.shape
    num_slots, gpus = like.num_slots, like.num_gpus
    steps = num_slots * max(STEPS_PER_SLOT, min(5 * STEPS_PER_SLOT, STEPS // num_slots))
    nodes = like.num_nodes if like.hierarchy == "node" else 1
    slots = slots.copy()
    run_loop(
        _anneal,
        rows * steps * gpus * scenarios // 8,
        *(relative.transpose(1, 0, 2).ravel(), rows, scenarios, experts, gpus, num_slots // gpus, gpus // nodes),
        *(
            -(-num_slots // (experts * gpus)),
            steps,
            HOT * scenarios,
            slots.ravel(),
            np.zeros(num_slots, dtype=np.int64),
        ),
        *(np.zeros(experts, dtype=np.int64), np.zeros(gpus * experts, dtype=np.int64)),
        *(np.zeros(scenarios * gpus), np.zeros(scenarios * gpus)),
    )
    return slots


def _anneal(
    load: Any,
    rows: int,
    scenarios: int,
    experts: int,
    gpus: int,
    room: int,
    gpus_per_node: int,
    together: int,
    steps: int,
    hot: float,
    slots: Any,
    best: Any,
    count: Any,
    held: Any,
    total: Any,
    after: Any,
) -> int:
    num_slots = gpus * room
    for row in range(rows):
        first, at = row * num_slots, row * scenarios * experts
        for expert in range(experts):
            count[expert] = 0
        for index in range(gpus * experts):
            held[index] = 0
        for slot in range(num_slots):
            expert = slots[first + slot]
            best[slot] = expert
            count[expert] += 1
            held[slot // room * experts + expert] += 1
        now = 0.0
        for scenario in range(scenarios):
            peak = 0.0
            for gpu in range(gpus):
                load_of_gpu = 0.0
                for slot in range(gpu * room, gpu * room + room):
                    expert = slots[first + slot]
                    load_of_gpu += load[at + scenario * experts + expert] / count[expert]
                total[scenario * gpus + gpu] = load_of_gpu
                peak = max(peak, load_of_gpu)
            now += peak
        lowest = now
        random = row + 1
        for step in range(steps):
            allowed = now + hot * (1.0 - step / steps) * (1.0 - step / steps)
            random = random * 48271 % 2147483647
            kind = random
            random = random * 48271 % 2147483647
            one = random % num_slots
            if kind % 4:  # mostly a slot of the GPU that is the hottest in some scenario
                scenario = kind // 64 % scenarios
                hottest = scenario * gpus
                for index in range(scenario * gpus, scenario * gpus + gpus):
                    if total[index] > total[hottest]:
                        hottest = index
                one = (hottest - scenario * gpus) * room + one % room
            random = random * 48271 % 2147483647
            other = random % num_slots
            here, there = one // room, other // room
            mine, yours = slots[first + one], slots[first + other]
            if mine == yours or here // gpus_per_node != there // gpus_per_node:
                continue
            if held[there * experts + mine] >= together:
                continue
            swaps = kind // 4 % 5 > 0  # else `mine` gets a replica in the place of one of `yours`
            if swaps and (here == there or held[here * experts + yours] >= together):
                continue
            if not swaps and (count[yours] < 2 or count[mine] >= gpus_per_node * together):
                continue
            then = 0.0
            for scenario in range(scenarios):
                base = scenario * gpus
                my_load = load[at + scenario * experts + mine]
                your_load = load[at + scenario * experts + yours]
                peak = 0.0
                if swaps:
                    more = my_load / count[mine] - your_load / count[yours]
                    after[base + here] = total[base + here] - more
                    after[base + there] = total[base + there] + more
                    peak = max(after[base + here], after[base + there])
                    for gpu in range(gpus):
                        if total[base + gpu] > peak and gpu != here and gpu != there:
                            peak = total[base + gpu]
                else:
                    my_share, your_share = my_load / (count[mine] + 1), your_load / (count[yours] - 1)
                    less, more = my_load / count[mine] - my_share, your_share - your_load / count[yours]
                    for gpu in range(gpus):
                        changed = held[gpu * experts + yours] * more - held[gpu * experts + mine] * less
                        if gpu == there:
                            changed += my_share - your_share
                        after[base + gpu] = total[base + gpu] + changed
                        peak = max(peak, after[base + gpu])
                then += peak
            if then >= allowed:
                continue
            now = then
            slots[first + other] = mine
            held[there * experts + mine] += 1
            held[there * experts + yours] -= 1
            if swaps:
                slots[first + one] = yours
                held[here * experts + yours] += 1
                held[here * experts + mine] -= 1
                for scenario in range(scenarios):
                    total[scenario * gpus + here] = after[scenario * gpus + here]
                    total[scenario * gpus + there] = after[scenario * gpus + there]
            else:
                count[mine] += 1
                count[yours] -= 1
                for index in range(scenarios * gpus):
                    total[index] = after[index]
            if now < lowest * (1.0 - 1e-9):
                lowest = now
                for slot in range(num_slots):
                    best[slot] = slots[first + slot]
        for slot in range(num_slots):
            slots[first + slot] = best[slot]
    return 0
