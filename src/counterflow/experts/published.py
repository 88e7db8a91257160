"""The published algorithm, exactly: the same three maps for every legal input, hundreds of times faster."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from counterflow.experts.loads import Ints, as_float32, is_tensor
from counterflow.experts.placement import refuse_sizes, refuse_slots, unfilled_map, whole_number
from counterflow.experts.replicas import give_replicas, run_on_arrays
from counterflow.experts.rows import from_rows
from counterflow.experts.torch_order import DEEPEST, Floats32, sort_rows, sum_as_torch

Array = TypeVar("Array")


def rebalance_experts(
    weight: Array, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Array, Array, Array]:
    """The published placement of ``num_replicas`` experts, bit for bit: ``physical_to_logical`` and two more maps.

    ``weight`` [layers, experts] holds the load of each expert; torch in gives torch out (int64, on the CPU), anything
    else numpy. Groups of experts stay together on a node where ``num_groups`` is a multiple of ``num_nodes``;
    elsewhere nodes and groups are disregarded, without a word, as published. It is there for those who need exactly
    this; ``balance`` is the better one.

    Returns:
        ``physical_to_logical`` [layers, num_replicas], ``logical_to_physical`` [layers, experts, width], filled up
        with -1, where width is the largest count of this call, and ``logical_count`` [layers, experts].

    Raises:
        PlacementError: the loads are none (see ``as_loads``), the numbers do not divide as they have to, or there are
            a hundred times more replicas than any model has.

    Example:
        >>> import numpy as np
        >>> from counterflow import rebalance_experts
        >>> slots, where, counts = rebalance_experts(np.array([[90, 132, 40, 61]]), 6, 2, 1, 2)
        >>> slots.tolist(), counts.tolist()
        ([[1, 3, 2, 1, 0, 0]], [[2, 2, 1, 1]])

    Source: https://github.com/deepseek-ai/EPLB, ``eplb.py``.
    """
    load = as_float32(weight)
    sizes = [
        whole_number(name, value)
        for name, value in (
            ("num_replicas", num_replicas),
            ("num_groups", num_groups),
            ("num_nodes", num_nodes),
            ("num_gpus", num_gpus),
        )
    ]
    num_replicas, num_groups, num_nodes, num_gpus = sizes
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    refuse_sizes(load.shape[1], num_replicas, num_gpus, num_nodes, num_groups)
    refuse_slots(len(load), num_replicas)
    group_loads = None
    if num_groups > num_nodes:
        group_loads = _group_loads(weight, load, num_groups)
    slots, rank, counts = published_slots(load, num_replicas, num_groups, num_nodes, num_gpus, group_loads)
    width = int(counts.max())
    where = unfilled_map(load.shape[0], load.shape[1], width)
    where[np.arange(len(load))[:, None], slots, rank] = np.arange(num_replicas)
    maps = slots, where, counts
    return tuple(_as_given(weight, array) for array in maps)


def published_slots(
    load: Floats32,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    group_loads: Floats32 | None = None,
) -> tuple[Ints, Ints, Ints]:
    """The expert in each slot, which of its replicas that is, and the replicas of each expert, for checked input."""
    num_layers, num_experts = load.shape
    rows = num_layers * num_nodes
    per_node, slots_per_node = num_experts // num_nodes, num_replicas // num_nodes
    experts = np.broadcast_to(np.arange(num_experts), load.shape)
    if num_groups > num_nodes:
        groups = published_groups(load, num_groups, num_nodes, group_loads)
        experts = np.arange(num_experts).reshape(num_groups, -1)[groups].reshape(load.shape)
        load = from_rows(load, experts)
    replica_of, rank, counts = replicate_rows(load.reshape(rows, per_node), slots_per_node)
    share = load.reshape(rows, per_node) / counts.astype(np.float32)
    order = pack_rows(from_rows(share, replica_of), num_gpus // num_nodes)
    in_node = from_rows(replica_of, order).reshape(num_layers, num_nodes, -1)
    place = (in_node + np.arange(num_nodes)[:, None] * per_node).reshape(num_layers, -1)
    counted = np.empty(load.shape, dtype=np.int64)
    np.put_along_axis(counted, experts, counts.reshape(load.shape), axis=1)
    slots = from_rows(experts, place)
    return slots, from_rows(rank, order).reshape(num_layers, -1), counted


def published_peaks(load: Floats32, num_replicas: int, num_gpus: int) -> Floats32:
    """The largest GPU load [layers] that the published placement without groups has, but for rounding.

    Which expert lies where depends on the order of equal shares as well; what each GPU has, on the shares alone.
    """
    counts, _, _ = give_replicas(load, num_replicas, num_replicas, fewest_first=False)
    share = np.repeat((load / counts.astype(np.float32)).ravel(), counts.ravel()).reshape(len(load), num_replicas)
    share.sort(axis=1)
    share = np.ascontiguousarray(share[:, ::-1])
    placed = from_rows(share, _packed(share, num_gpus)).reshape(len(load), num_gpus, -1)
    with np.errstate(over="ignore"):
        return np.asarray(placed.sum(axis=2).max(axis=1))


def published_groups(load: Floats32, num_groups: int, num_nodes: int, group_loads: Floats32 | None = None) -> Ints:
    """The groups in the order of nodes [layers, groups]."""
    if group_loads is None:
        group_loads = sum_as_torch(load.reshape(len(load), num_groups, -1))
    return pack_rows(group_loads, num_nodes)


def replicate_rows(load: Floats32, num_replicas: int) -> tuple[Ints, Ints, Ints]:
    """The expert of each replica [rows, replicas], its number among them, and the replicas of each expert."""
    num_experts = load.shape[1]
    counts, got, had = give_replicas(load, num_replicas, num_replicas, fewest_first=False)
    first = np.broadcast_to(np.arange(num_experts), load.shape)
    return np.hstack([first, got]), np.hstack([np.zeros(load.shape, dtype=np.int64), had]), counts


def pack_rows(load: NDArray[Any], num_packs: int) -> Ints:
    """The items of each row in the order of packs [rows, items]: by descending load, to the lightest pack with room."""
    rows, items = load.shape
    order = np.tile(np.arange(items), (rows, 1))
    if items == num_packs:
        return order
    key = load.copy()
    scratch = np.zeros(3 * DEEPEST, dtype=np.int64)
    run_on_arrays(sort_rows, rows * items * 8, key.ravel(), order.ravel(), rows, items, scratch)
    return from_rows(order, _packed(key, num_packs))


def _packed(load: NDArray[Any], num_packs: int) -> Ints:
    """The items of each row in the order of packs [rows, items], where ``load`` descends."""
    rows, items = load.shape
    placed, order = np.empty((rows, items), dtype=np.int64), np.tile(np.arange(items), (rows, 1))
    scratch = np.zeros(num_packs, dtype=load.dtype), *np.zeros((2, num_packs), dtype=np.int64)
    sizes = rows * items * 8, load.ravel(), order.ravel(), rows, items, num_packs
    run_on_arrays(_pack, *sizes, *scratch, placed.ravel())
    return placed


def _pack(
    load: Any, order: Any, rows: int, items: int, packs: int, total: Any, filled: Any, heap: Any, placed: Any
) -> int:
    room = items // packs
    for row in range(rows):
        size = packs  # packs with room, the lightest on top, of equals the first
        for pack in range(packs):
            total[pack], filled[pack], heap[pack] = 0, 0, pack
        for index in range(row * items, (row + 1) * items):
            pack = heap[0]
            placed[row * items + pack * room + filled[pack]] = order[index]
            total[pack] += load[index]
            filled[pack] += 1
            if filled[pack] == room:
                size -= 1
                pack = heap[size]
            hole = 0
            while 2 * hole + 1 < size:
                child = 2 * hole + 1
                one, other = heap[child], heap[min(child + 1, size - 1)]
                if total[other] < total[one] or (total[other] == total[one] and other < one):
                    child, one = child + 1, other
                if total[pack] < total[one] or (total[pack] == total[one] and pack < one):
                    break
                heap[hole] = one
                hole = child
            heap[hole] = pack
    return 0


def _group_loads(weight: Any, load: Floats32, num_groups: int) -> Floats32:
    if not is_tensor(weight):
        return sum_as_torch(load.reshape(len(load), num_groups, -1))
    tensor = weight.detach().float().cpu().reshape(load.shape)  # torch's order depends on how a tensor lies in memory
    return np.asarray(tensor.unflatten(-1, (num_groups, -1)).sum(-1).numpy(), dtype=np.float32)


def _as_given(weight: Any, array: Ints) -> Any:
    return weight.new_empty(0, device="cpu").long().new_tensor(array) if is_tensor(weight) else array
