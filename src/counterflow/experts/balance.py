"""The placement that is as even as we can make it, with a certificate of how even that is."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.apart import apart_if_no_higher, parted
from counterflow.experts.certificate import Certificate, limits
from counterflow.experts.loads import Bools, Floats, Ints, as_loads
from counterflow.experts.nodes import deal_groups, least_peak, spill
from counterflow.experts.peaks import LOWER, co_located, gpu_peaks
from counterflow.experts.placement import Placement, refuse_sizes, refuse_slots, whole_number
from counterflow.experts.published import published_groups, published_peaks, published_slots
from counterflow.experts.rebalance import at_home, from_current
from counterflow.experts.rows import from_rows
from counterflow.experts.search import EVEN, PATIENCE, improve, pack, replica_counts
from counterflow.experts.splits import split_otherwise

MOST_PAIRS = 2**28
"""Experts times GPUs: 2 GiB of table, thousands of times what any model needs."""

FEW_GPUS = 8
"""On so few a single replica more or less shows, and to try other numbers of them costs little."""

SOON = 3
"""There the first search ends after so many moved replicas in vain, since what is tried then is worth more."""

TOLD, ROUNDING = 2.0**-64, 1e-3
"""From this load on, float32 sums as long as here are off by less than this share."""


def balance(
    loads: object,
    num_replicas: int,
    num_gpus: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    hierarchy: str = "auto",
    node_spill: float = 0.0,
    current: Placement | None = None,
    max_moves: int | None = None,
) -> Placement:
    """Place ``num_replicas`` replicas so that the largest load of a GPU is as low as we can make it.

    ``loads`` [layers, experts] is what each expert has to do (see ``as_loads``). Every GPU gets equally many slots.
    Replicas of one expert lie on different GPUs, unless putting some together lowers the layer's largest load: the
    certificate lists those slots. (With at most 16 slots on a node its experts cannot lie apart and as even then; with
    more, or with a spill or ``current``, not in a way that we find.) No layer is less even than the published algorithm
    makes it for the same arguments. The same input gives the same placement, and a layer without load is placed as if
    all its experts were equal.

    ``hierarchy`` says whether the ``num_groups`` groups of experts, equal and in order, each stay on one node:
    ``"node"`` insists on it, ``"none"`` disregards groups, ``"auto"`` keeps them together where there are several
    nodes and they divide over them. ``Placement.hierarchy`` says which it was. ``node_spill`` lets up to that share of
    a layer's load leave the node of its group, expert by expert, where that makes the nodes more even.

    With ``current``, the placement that serves now, as little as can be moves: a layer that is as even as the
    published algorithm would make it stays as it is, any other changes slot by slot until it is. No layer becomes
    less even, unless it has to change because it does not keep its groups on nodes, and copies that share a GPU may
    stay there. ``max_moves`` is the most experts that GPUs newly receive, all layers together, as ``plan_migration``
    counts them; the layers that gain most for each move come first, and some may then stay below the published.

    Raises:
        PlacementError: the loads are none, the numbers do not divide as they have to, ``hierarchy`` is unknown,
            ``node_spill`` is no share or has no groups on nodes to spill from, ``current`` is of another model or
            other sizes, or ``max_moves`` is no number, comes without it, or is too few for groups to get to nodes.

    Example:
        >>> from counterflow import balance
        >>> placement = balance([[90, 132, 40, 61]], num_replicas=6, num_gpus=2)
        >>> placement.gpu_loads([[90, 132, 40, 61]]).tolist()
        [[160.5, 162.5]]
        >>> placement.certificate.max_load_bound.tolist(), placement.certificate.limited_by
        ([161.5], ('slots',))

        >>> later = [[90, 132, 100, 61]]
        >>> after = balance(later, 6, 2, current=placement, max_moves=1)
        >>> placement.gpu_loads(later).tolist(), after.gpu_loads(later).tolist()
        ([[220.5, 162.5]], [[201.0, 182.0]])
    """
    load = as_loads(loads)
    num_replicas, num_gpus = whole_number("num_replicas", num_replicas), whole_number("num_gpus", num_gpus)
    num_nodes, num_groups = whole_number("num_nodes", num_nodes), whole_number("num_groups", num_groups)
    by_node = _keeps_groups(hierarchy, num_groups, num_nodes)
    refuse_sizes(load.shape[1], num_replicas, num_gpus, num_nodes, num_groups if by_node else 1)
    if load.shape[1] * num_gpus > MOST_PAIRS:
        raise PlacementError(
            f"{load.shape[1]} experts on {num_gpus} GPUs are too many: the search keeps a table of both, "
            f"of at most {MOST_PAIRS} entries"
        )
    refuse_slots(len(load), num_replicas)
    groups, nodes = (num_groups, num_nodes) if by_node else (1, 1)
    spill_share = _spill_share(node_spill, by_node)
    _refuse_current(current, max_moves, (*load.shape, num_replicas, num_gpus))
    scaled, exponent = _scaled(load)
    least = least_peak(scaled, num_replicas, num_gpus)
    if nodes > 1:
        slots, bound = _place_by_node(scaled, num_replicas, num_gpus, nodes, groups, spill_share, least)
    else:
        slots, bound = _place_rows(scaled, num_replicas, num_gpus, least), least
    slots, again = _at_least_published(load, scaled, exponent, slots, num_gpus, nodes, groups)
    if current is not None:
        fresh = Placement(slots, load.shape[1], num_gpus, num_nodes)
        stays = at_home(scaled, current.physical_to_logical, nodes, groups, spill_share)
        slots = from_current(current, fresh, load, scaled, stays, nodes, groups, max_moves)
        again = co_located(slots, num_gpus)
    certificate = _certificate(slots, again, num_gpus, load, np.ldexp(least, exponent), np.ldexp(bound, exponent))
    return Placement(slots, load.shape[1], num_gpus, num_nodes, "node" if by_node else "none", certificate)


def _keeps_groups(hierarchy: Any, num_groups: int, num_nodes: int) -> bool:
    if not isinstance(hierarchy, str) or hierarchy not in ("auto", "node", "none"):
        raise PlacementError(f"the hierarchy is {reprlib.repr(hierarchy)}; it has to be 'auto', 'node' or 'none'")
    divides = num_groups % num_nodes == 0
    if hierarchy == "node" and not divides:
        raise PlacementError(
            f"{num_groups} groups do not divide over {num_nodes} nodes, so they cannot each stay on one: "
            f"give a multiple of {num_nodes}, or hierarchy='none'"
        )
    return divides and (hierarchy == "node" or (hierarchy == "auto" and num_nodes > 1))


def _spill_share(node_spill: float, by_node: bool) -> float:
    try:
        share = float(node_spill)
    except Exception:  # a tensor without data raises RuntimeError: the caller is owed one sentence all the same
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise PlacementError(f"node_spill is {reprlib.repr(node_spill)}; it has to be a share of the load, from 0 to 1")
    if share and not by_node:
        raise PlacementError(
            f"node_spill is {share:g}, but no groups are kept on nodes here: leave it out, "
            f"or give num_nodes and a num_groups that is a multiple of it"
        )
    return share


def _refuse_current(current: Placement | None, max_moves: int | None, sizes: tuple[int, int, int, int]) -> None:
    if max_moves is not None:
        _refuse_moves(max_moves)
        if current is None:
            raise PlacementError(
                f"max_moves is {max_moves}, but there is nothing to move from: give the placement that serves now "
                f"(current=)"
            )
    if current is None:
        return
    if not isinstance(current, Placement):
        raise PlacementError(
            f"current is a {type(current).__name__}; it has to be a Placement: make one of your map, or read_placement"
        )
    layers, experts, num_replicas, num_gpus = sizes
    if (current.num_layers, current.num_experts) != (layers, experts):
        raise PlacementError(
            f"the current placement has {current.num_layers} layers of {current.num_experts} experts and the loads "
            f"{layers} of {experts}: give both of one model"
        )
    if (current.num_slots, current.num_gpus) != (num_replicas, num_gpus):
        raise PlacementError(
            f"the current placement has {current.num_slots} slots on {current.num_gpus} GPUs and the new one "
            f"{num_replicas} on {num_gpus}: balance without current, and lay the result beside it with plan_migration"
        )


def _refuse_moves(max_moves: Any) -> None:
    """A whole number from 0: ``whole_number`` begins at 1."""
    if isinstance(max_moves, bool | np.bool_) or not isinstance(max_moves, int | np.integer) or max_moves < 0:
        raise PlacementError(f"max_moves is {reprlib.repr(max_moves)}; it has to be a whole number from 0, or None")


def _scaled(load: Floats) -> tuple[Floats, Ints]:
    """Each layer times a power of two, which loses nothing, so that neither its sum nor a quotient leaves float64."""
    _, exponent = np.frexp(load.max(axis=1))
    scaled = np.ldexp(load, -exponent[:, None])
    scaled[load.max(axis=1) == 0] = 1.0
    return scaled, exponent


def _place_by_node(
    load: Floats, num_slots: int, num_gpus: int, num_nodes: int, num_groups: int, node_spill: float, least: Floats
) -> tuple[Ints, Floats]:
    """The expert in each slot, and what the largest GPU load of each layer cannot go below: at least ``least``."""
    experts, bound = deal_groups(load, num_groups, num_nodes, num_slots, num_gpus)
    bound = np.maximum(bound, least)
    slots = _place_in_nodes(load, experts, num_slots, num_gpus, bound)
    if node_spill:
        experts, bound = deal_groups(load, num_groups, num_nodes, num_slots, num_gpus, node_spill)
        bound = np.maximum(bound, least)
        spilled = _place_in_nodes(load, spill(load, experts, node_spill), num_slots, num_gpus, bound)
        lower = gpu_peaks(load, spilled, num_gpus) < LOWER * gpu_peaks(load, slots, num_gpus)
        slots = np.where(lower[:, None], spilled, slots)
    return slots, bound


def _place_in_nodes(load: Floats, experts: Ints, num_slots: int, num_gpus: int, bound: Floats) -> Ints:
    """The expert in each slot [layers, slots], given those of each node [layers, nodes, experts / nodes]."""
    layers, nodes, _ = experts.shape
    slots, gpus = num_slots // nodes, num_gpus // nodes
    rows = from_rows(load, experts.reshape(layers, -1)).reshape(layers * nodes, -1)
    fullest = rows.sum(axis=1).reshape(layers, nodes).max(axis=1) / gpus  # above the bound where one is not exact
    local = _place_rows(rows, slots, gpus, np.repeat(np.maximum(bound, fullest), nodes))
    return from_rows(experts.reshape(layers * nodes, -1), local).reshape(layers, -1)


def _place_rows(load: Floats, num_slots: int, num_gpus: int, bound: Floats) -> Ints:
    """The expert in each slot [rows, slots], apart where that is possible and nothing is lost by it."""
    room = num_slots // num_gpus
    together = -(-num_slots // (load.shape[1] * num_gpus))  # more than 1 where there are more slots than GPUs can tell
    counts = replica_counts(load, num_slots, num_gpus * together)
    few = together == 1 and num_gpus <= FEW_GPUS
    slots = pack(load, counts, num_gpus, together)
    slots = improve(load, slots, num_gpus, together, bound, SOON if few else PATIENCE)
    uneven = _uneven(load, slots, num_gpus, bound)
    if together > 1:  # every GPU has room for every expert, and with the same ones on all of them they are even
        slots[uneven] = np.tile(np.arange(room) % load.shape[1], num_gpus)
        return slots
    if few and len(uneven):
        slots[uneven] = split_otherwise(load[uneven], slots[uneven], num_gpus, bound[uneven], EVEN)
        uneven = uneven[_uneven(load[uneven], slots[uneven], num_gpus, bound[uneven])]
    if len(uneven) and room > 1:
        freely = improve(load[uneven], slots[uneven], num_gpus, room, bound[uneven])
        lower = gpu_peaks(load[uneven], freely, num_gpus) < (1 - EVEN) * gpu_peaks(
            load[uneven], slots[uneven], num_gpus
        )
        slots[uneven[lower]] = freely[lower]
    return slots


def _uneven(load: Floats, slots: Ints, num_gpus: int, bound: Floats) -> Ints:
    return np.flatnonzero(gpu_peaks(load, slots, num_gpus) > bound * (1 + EVEN))


def _at_least_published(
    load: Floats, scaled: Floats, exponent: Ints, slots: Ints, num_gpus: int, num_nodes: int, num_groups: int
) -> tuple[Ints, Bools]:
    """``slots``, or the published ones where those are more even, and where copies share a GPU (see ``co_located``).

    Copies are parted where they can be.
    """
    rounded, peaks = load.astype(np.float32), gpu_peaks(scaled, slots, num_gpus)
    maybe, part = np.arange(len(load)), rounded
    if num_nodes > 1:  # where its fullest node alone is above ours, there is no need to go on
        groups = published_groups(rounded, num_groups, num_nodes).reshape(len(load), num_nodes, -1)
        by_group = scaled.reshape(len(load), num_groups, -1)
        sums = from_rows(by_group.sum(axis=2), groups.reshape(len(load), -1)).reshape(groups.shape)
        fullest = groups[maybe, sums.sum(axis=2).argmax(axis=1)]
        part = np.take_along_axis(rounded.reshape(by_group.shape), fullest[:, :, None], axis=1).reshape(len(load), -1)
        maybe = np.flatnonzero(sums.sum(axis=2).max(axis=1) / (num_gpus // num_nodes) < peaks)
    if len(maybe):
        theirs = published_peaks(part[maybe], slots.shape[1] // num_nodes, num_gpus // num_nodes).astype(np.float64)
        above = theirs > np.ldexp(peaks[maybe], exponent[maybe]) * (1 + ROUNDING)
        maybe = maybe[~(above & np.isfinite(theirs) & (theirs > TOLD))]
    if len(maybe):
        published, _, _ = published_slots(rounded[maybe], slots.shape[1], num_groups, num_nodes, num_gpus)
        theirs = gpu_peaks(scaled[maybe], published, num_gpus)
        better = theirs < LOWER * peaks[maybe]
        slots[maybe[better]], peaks[maybe[better]] = published[better], theirs[better]
    avoidable = slots.shape[1] // num_gpus <= load.shape[1] // num_nodes
    again = co_located(slots, num_gpus)
    for layer in np.flatnonzero(again.any(axis=1)) if avoidable else ():
        row = parted(scaled[layer], slots[layer], again[layer], num_gpus, num_gpus // num_nodes, peaks[layer])
        row = apart_if_no_higher(scaled[layer], row, num_gpus, num_nodes, peaks[layer])
        if not np.array_equal(row, slots[layer]):
            slots[layer], again[layer] = row, co_located(row[None], num_gpus)
    return slots, again


def _certificate(slots: Ints, again: Bools, num_gpus: int, load: Floats, least: Floats, bound: Floats) -> Certificate:
    max_load = gpu_peaks(load, slots, num_gpus)
    loaded = load.any(axis=1)
    bound = np.where(loaded, np.minimum(bound, max_load), 0.0)  # the same sum in another order may round up
    mean = load.sum(axis=1) / num_gpus
    return Certificate(
        max_load,
        bound,
        limits(max_load, bound, mean, np.where(loaded, least, 0.0)),
        tuple((int(layer), int(slot)) for layer, slot in np.argwhere(again)),
    )
