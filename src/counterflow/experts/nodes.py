"""Groups of experts are dealt to nodes: every way is tried where there are few, one is searched for elsewhere."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from counterflow.experts.loads import Floats, Ints
from counterflow.experts.matching import best_pairing
from counterflow.experts.search import improve, pack, replica_counts

MOST_PAIRINGS = 20_000


def deal_groups(
    load: Floats, num_groups: int, num_nodes: int, num_slots: int, num_gpus: int, node_spill: float = 0.0
) -> tuple[Ints, Floats]:
    """The experts of each node [layers, nodes, experts / nodes], and a bound of the largest GPU load [layers].

    Where every pairing is tried, and nothing is spilled, the bound is exact but for the packing inside a node: it is
    the best pairing's. Elsewhere it is what holds for all of them. ``least_peak`` of the layer is a bound as well.
    """
    group_loads = load.reshape(len(load), num_groups, -1)
    each, gpus, slots = num_groups // num_nodes, num_gpus // num_nodes, num_slots // num_nodes
    sums = group_loads.sum(axis=2)
    if _num_pairings(num_groups, num_nodes) <= MOST_PAIRINGS:
        sets, pairings = _pairings(num_groups, num_nodes)
        if node_spill:
            peaks = _level(sums[:, sets].sum(axis=2)[:, pairings], node_spill) / gpus
        else:
            peaks = _peaks(group_loads, sets, pairings, slots, gpus)
        chosen = peaks.argmin(axis=1)
        groups = sets[pairings[chosen]].reshape(len(load), num_groups)
        bound: Floats = np.take_along_axis(peaks, chosen[:, None], axis=1)[:, 0]
    else:
        ones = np.ones(sums.shape, dtype=np.int64)
        groups = improve(sums, pack(sums, ones, num_nodes, 1), num_nodes, 1, sums.sum(axis=1) / num_nodes)
        fullest = np.sort(sums, axis=1)[:, [-1, *range(each - 1)]].sum(axis=1)  # the node of the heaviest group
        bound = (fullest - node_spill * sums.sum(axis=1)) / gpus
    experts = np.arange(load.shape[1]).reshape(num_groups, -1)[groups].reshape(len(load), num_nodes, -1)
    return experts, np.asarray(bound)


def nearest_groups(load: Floats, home: Ints, num_nodes: int, num_slots: int, num_gpus: int, reach: Floats) -> Ints:
    """The groups in the order of nodes [layers, groups], as many as can be on the nodes where they are.

    ``home`` [layers, groups] is the node of each group. Only those dealings count whose bound is below ``reach``
    [layers], and of equals the lowest bound; where there is none, or too many to try, the groups stay.
    """
    layers, num_groups = home.shape
    order = np.argsort(home, axis=1, kind="stable")
    if _num_pairings(num_groups, num_nodes) > MOST_PAIRINGS:
        return order
    sets, pairings = _pairings(num_groups, num_nodes)
    group_loads = load.reshape(layers, num_groups, -1)
    nodes = group_loads[:, sets].reshape(layers * len(sets), -1)
    peaks = (
        least_peak(nodes, num_slots // num_nodes, num_gpus // num_nodes).reshape(layers, -1)[:, pairings].max(axis=2)
    )
    layer, way = np.nonzero(peaks < reach[:, None])
    stay = (home[:, sets][:, :, :, None] == np.arange(num_nodes)).sum(axis=2)  # [layers, sets, nodes]
    tables = stay[layer[:, None], pairings[way]]
    node_of = best_pairing(tables)
    kept = np.take_along_axis(tables, node_of[:, :, None], axis=2).sum(axis=(1, 2))
    best = np.lexsort((peaks[layer, way], -kept, layer))
    best = best[np.unique(layer[best], return_index=True)[1]]
    dealt = np.empty((len(best), num_nodes, num_groups // num_nodes), dtype=np.int64)
    np.put_along_axis(dealt, node_of[best][:, :, None], sets[pairings[way[best]]], axis=1)
    order[layer[best]] = dealt.reshape(len(best), num_groups)
    return order


def _peaks(group_loads: Floats, sets: Ints, pairings: Ints, num_slots: int, num_gpus: int) -> Floats:
    """What the largest GPU load cannot go below [layers, pairings], exact wherever it may be the least of a layer."""
    peaks: Floats = group_loads.sum(axis=2)[:, sets].sum(axis=2)[:, pairings].max(axis=2) / num_gpus
    layers = np.arange(len(peaks))
    first = sets[pairings[peaks.argmin(axis=1)]]  # by the means of its nodes; its hot experts may make another better
    nodes = group_loads[layers[:, None, None], first].reshape(len(layers) * pairings.shape[1], -1)
    exact = least_peak(nodes, num_slots, num_gpus).reshape(len(layers), -1).max(axis=1)
    again = np.flatnonzero(exact > peaks.min(axis=1) * (1 + 1e-12))
    if len(again):
        nodes = group_loads[again][:, sets].reshape(len(again) * len(sets), -1)
        peaks[again] = least_peak(nodes, num_slots, num_gpus).reshape(len(again), -1)[:, pairings].max(axis=2)
    return peaks


def spill(load: Floats, experts: Ints, node_spill: float) -> Ints:
    """``experts`` [layers, nodes, experts / nodes] after exchanges between the heaviest node and the lightest.

    Each time the heaviest expert that fits the difference, and what is left of ``node_spill`` of the layer's load,
    changes places with the lightest one: that moves most load for what leaves its node.
    """
    experts = experts.copy()
    layers = np.arange(len(load))
    load_of: Floats = np.take_along_axis(load, experts.reshape(len(load), -1), axis=1).reshape(experts.shape)
    at_home = np.ones(experts.shape, dtype=bool)
    left = node_spill * load.sum(axis=1)
    while True:
        sums = load_of.sum(axis=2)
        hot, cold = sums.argmax(axis=1), sums.argmin(axis=1)
        ours, theirs = load_of[layers, hot], load_of[layers, cold]
        light = np.where(at_home[layers, cold], theirs, np.inf).argmin(axis=1)
        lightest = theirs[layers, light][:, None]
        half = (sums[layers, hot] - sums[layers, cold])[:, None] / 2
        fits = at_home[layers, hot] & (ours > lightest) & (ours - lightest <= half) & (ours + lightest <= left[:, None])
        fits &= at_home[layers, cold, light][:, None]
        heavy = np.where(fits, ours, -1.0).argmax(axis=1)
        go = layers[fits.any(axis=1)]
        if not len(go):
            return experts
        one, other = (go, hot[go], heavy[go]), (go, cold[go], light[go])
        left[go] -= load_of[one] + load_of[other]
        for array in (experts, load_of):
            array[one], array[other] = array[other], array[one]  # both sides are read before either is written
        at_home[one] = at_home[other] = False


def _level(sums: Floats, node_spill: float) -> Floats:
    """The least that the heaviest node can be left with [..] when that share of all ``sums`` [.., nodes] may leave."""
    heaviest_first = -np.sort(-sums, axis=-1)
    above = heaviest_first.cumsum(axis=-1) - node_spill * sums.sum(axis=-1, keepdims=True)
    return np.asarray((above / np.arange(1, sums.shape[-1] + 1)).max(axis=-1))


def least_peak(load: Floats, num_slots: int, num_gpus: int) -> Floats:
    """What the largest GPU load cannot go below [rows]: the mean, or the largest share of a replica where that is more.

    However the slots are dealt to the experts, the largest share is at least what it is when each slot in turn goes
    to the expert whose share is largest.
    """
    mean = load.sum(axis=1) / num_gpus
    shares = np.divide(load, mean[:, None], out=np.zeros_like(load), where=mean[:, None] > 0)
    needed = np.ceil(shares).sum(axis=1)  # slots, for no share to be larger than the mean
    hot = np.flatnonzero(needed > num_slots)
    if len(hot):
        counts = replica_counts(load[hot], num_slots, num_slots)
        mean[hot] = np.maximum(mean[hot], (load[hot] / counts).max(axis=1))
    return np.asarray(mean)


def _num_pairings(num_groups: int, num_nodes: int) -> int:
    """In how many ways the groups divide into equal sets, whichever node gets which."""
    each, ways = num_groups // num_nodes, 1
    for left in range(num_groups, 0, -each):
        ways *= comb(left - 1, each - 1)
        if ways > MOST_PAIRINGS:
            break
    return ways


@lru_cache(maxsize=8)
def _pairings(num_groups: int, num_nodes: int) -> tuple[Ints, Ints]:
    """The sets of groups that a node can hold [sets, groups], and every way to divide into them [ways, nodes]."""
    each = num_groups // num_nodes
    number: dict[tuple[int, ...], int] = {}
    ways: list[list[int]] = []

    def divide(left: tuple[int, ...], chosen: list[int]) -> None:
        if not left:
            ways.append(chosen)
            return
        for others in combinations(left[1:], each - 1):
            one = (left[0], *others)
            rest = tuple(group for group in left if group not in one)
            divide(rest, [*chosen, number.setdefault(one, len(number))])

    divide(tuple(range(num_groups)), [])
    return np.array(list(number), dtype=np.int64), np.array(ways, dtype=np.int64)
