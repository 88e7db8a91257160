"""From the placement that serves to one that is as even as the published algorithm's, with as few moves as we find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.loads import Bools, Floats, Ints
from counterflow.experts.migration import plan_migration
from counterflow.experts.moves import lower, redealt, spend
from counterflow.experts.nodes import nearest_groups
from counterflow.experts.peaks import LOWER, gpu_peaks
from counterflow.experts.placement import Placement
from counterflow.experts.published import published_slots
from counterflow.experts.search import EVEN, improve

LARGEST = 1.05
"""A layer that changes gets no replica with a larger share than so many times the largest of the best placement.

What is wrong about the load of an expert falls on the GPUs in proportion to the shares of its replicas.
"""


def at_home(load: Floats, slots: Ints, num_nodes: int, num_groups: int, node_spill: float) -> Bools:
    """The layers [layers] where nodes hold equally many experts, none on two, at most ``node_spill`` off its group."""
    layers, experts = load.shape
    on = np.zeros((layers, num_nodes, experts), dtype=bool)
    np.put_along_axis(on, slots.reshape(layers, num_nodes, -1), True, axis=2)
    once = (on.sum(axis=1) == 1).all(axis=1) & (on.sum(axis=2) == experts // num_nodes).all(axis=1)
    there = (on * load[:, None]).reshape(layers, num_nodes, num_groups, -1).sum(axis=3)
    away = there.sum(axis=(1, 2)) - there.max(axis=1).sum(axis=1)
    whole = (on.reshape(layers, num_nodes, num_groups, -1).any(axis=3).sum(axis=1) == 1).all(axis=1)
    return np.asarray(once & (whole | ((node_spill > 0) & (away <= node_spill * load.sum(axis=1)))))


def from_current(
    current: Placement,
    fresh: Placement,
    load: Floats,
    scaled: Floats,
    at_home: Bools,
    num_nodes: int,
    num_groups: int,
    max_moves: int | None,
) -> Ints:
    """``current`` with the fewest slots changed that we find for it to be as even as published: ``fresh`` at worst."""
    slots, gpus = current.physical_to_logical, current.num_gpus
    published, _, _ = published_slots(load.astype(np.float32), current.num_slots, num_groups, num_nodes, gpus)
    target = gpu_peaks(scaled, published, gpus) / LOWER
    goal = np.where(load.any(axis=1) & at_home, target, np.inf)  # the others stay, or are placed anew
    largest = LARGEST * (scaled / fresh.logical_count).max(axis=1)
    paths = lower(scaled, slots, gpus, num_nodes, goal, largest)
    ends = paths.after(slots, paths.lengths)
    anew = np.flatnonzero(~at_home | (gpu_peaks(scaled, ends, gpus) > goal / LOWER))
    last, last_moves = ends.copy(), np.zeros(len(ends), dtype=np.int64)
    if len(anew):
        last[anew], last_moves[anew] = _fewest(
            current, fresh, scaled, ends, target, largest, anew, at_home, num_nodes, num_groups
        )
    if max_moves is None:
        return last
    must, left = ~at_home, max_moves - int(last_moves[~at_home].sum())
    if left < 0:
        layer = int(np.flatnonzero(must)[0])
        raise PlacementError(
            f"layer {layer} of the current placement does not keep its groups on nodes, and to get there takes "
            f"{max_moves - left} moves in all, more than the {max_moves} of max_moves: allow them, or hierarchy='none'"
        )
    mean = scaled.sum(axis=1) / gpus
    before, after = gpu_peaks(scaled, slots, gpus) / mean, gpu_peaks(scaled, last, gpus) / mean
    moves, peaks = [], []
    for layer, length in enumerate(paths.lengths.tolist()):
        further = layer in anew and not must[layer]
        moves.append([0, *paths.moves[layer, :length].tolist(), *([int(last_moves[layer])] if further else [])])
        along = (paths.peaks[layer, :length] / mean[layer]).tolist()
        peaks.append([float(before[layer]), *along, *([float(after[layer])] if further else [])])
    stops = np.array(spend(moves, peaks, left))
    whole = must | (stops > paths.lengths)
    result = paths.after(slots, np.where(whole, 0, stops))
    result[whole] = last[whole]
    return result


def _fewest(
    current: Placement,
    fresh: Placement,
    scaled: Floats,
    ends: Ints,
    target: Floats,
    largest: Floats,
    anew: Ints,
    at_home: Bools,
    num_nodes: int,
    num_groups: int,
) -> tuple[Ints, Ints]:
    """For the layers ``anew`` the placement that reaches ``target`` with fewest moves, and the moves."""
    old = replace(current, physical_to_logical=current.physical_to_logical[anew], certificate=None)
    plan = plan_migration(old, replace(fresh, physical_to_logical=fresh.physical_to_logical[anew]))
    slots, moves = plan.new.physical_to_logical.copy(), plan.moves.copy()
    load, gpus = scaled[anew], current.num_gpus
    reach = target[anew]
    searched, reached = ends[anew], np.zeros(len(anew), dtype=bool)
    for attempt in range(3 if num_nodes > 1 else 1):
        left = np.flatnonzero(~reached & (at_home[anew] | (attempt > 0)))
        if not len(left):
            continue
        if attempt:  # other groups come to the nodes, the fewest that will do or those of ``fresh``
            here, wanted = old.physical_to_logical[left], slots[left]
            if attempt == 1:
                wanted = _nearest(load[left], here, gpus, num_nodes, num_groups, reach[left])
            start = redealt(load[left], here, wanted, gpus, num_nodes)
            paths = lower(load[left], start, gpus, num_nodes, reach[left], largest[anew][left])
            searched[left] = paths.after(start, paths.lengths)
        searched[left] = _searched(load[left], searched[left], gpus, num_nodes, reach[left])
        reached[left] = gpu_peaks(load[left], searched[left], gpus) <= reach[left] / LOWER
        plan = plan_migration(old, replace(fresh, physical_to_logical=searched))
        fewer = reached & (plan.moves < moves)
        slots[fewer], moves[fewer] = plan.new.physical_to_logical[fewer], plan.moves[fewer]
    return slots, moves


def _searched(load: Floats, slots: Ints, num_gpus: int, num_nodes: int, reach: Floats) -> Ints:
    """``slots`` searched on, node by node, where they are above ``reach``: single changes get stuck before that."""
    layers, experts = load.shape
    slots = slots.copy()
    by_node = slots.reshape(layers, num_nodes, -1)
    on = np.zeros((layers, num_nodes, experts), dtype=bool)
    np.put_along_axis(on, by_node, True, axis=2)
    some = np.flatnonzero(
        (gpu_peaks(load, slots, num_gpus) > reach / LOWER) & (on.sum(axis=2) == experts // num_nodes).all(axis=1)
    )
    if not len(some):
        return slots
    number = on[some].cumsum(axis=2) - 1  # of an expert among those of its node
    rows = np.take_along_axis(number, by_node[some], axis=2).reshape(len(some) * num_nodes, -1)
    held = np.nonzero(on[some])[2].reshape(len(some), num_nodes, experts // num_nodes)
    node_loads = np.take_along_axis(load[some], held.reshape(len(some), -1), axis=1).reshape(len(rows), -1)
    rows = improve(node_loads, rows, num_gpus // num_nodes, 1, np.repeat(reach[some] / (1 + EVEN), num_nodes))
    slots[some] = np.take_along_axis(held, rows.reshape(len(some), num_nodes, -1), axis=2).reshape(len(some), -1)
    return slots


def _nearest(load: Floats, slots: Ints, num_gpus: int, num_nodes: int, num_groups: int, reach: Floats) -> Ints:
    """Slots [layers, slots] of which only the nodes count: those of the groups when as few as can be change theirs."""
    layers, size = len(slots), slots.shape[1] // num_nodes
    on = np.zeros((layers, num_nodes, num_groups), dtype=np.int64)
    node = np.repeat(np.arange(num_nodes), size)
    np.add.at(on, (np.arange(layers)[:, None], node, slots // (load.shape[1] // num_groups)), 1)
    groups = nearest_groups(load, on.argmax(axis=1), num_nodes, slots.shape[1], num_gpus, reach)
    experts = np.arange(load.shape[1]).reshape(num_groups, -1)[groups].reshape(layers, num_nodes, -1)
    return experts[:, :, np.arange(size) % experts.shape[2]].reshape(layers, -1)
