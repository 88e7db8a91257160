"""The search for an even placement: replica counts, packing, then swaps and moved replicas; plain loops, serial.

A *row* is one layer, or one node of a layer: its experts are numbered from 0, its slots lie GPU by GPU. ``together``
is the most copies of one expert that a GPU may hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from counterflow.experts.loads import Floats, Ints
from counterflow.experts.replicas import give_replicas
from counterflow.loops import run_loop

EVEN_ENOUGH = 4e-4
"""The search of a row ends this near to its bound, as a share of it; and a little farther after every moved replica."""

EVEN = 1e-3
"""So near to its bound a row is even, however long it took: the noise in any real load is larger."""

GOOD = 0.5
"""A swap that lowers the largest load by this share of what one can at best is taken, without a look for another."""

PATIENCE = 16
"""So many moved replicas in a row that lower nothing end the search."""


def replica_counts(load: Floats, num_slots: int, most: int) -> Ints:
    """How many replicas each expert gets [rows, experts], so that the largest share is least.

    Experts of equal share get equally many, as far as that goes: so also those without any load.
    """
    return give_replicas(load, num_slots, most, fewest_first=True)[0]


def heaviest_first(share: Floats) -> Ints:
    """The experts of each row [rows, experts] by descending ``share``, of shares alike in all but 2^-36 by number.

    Numbers are sorted much faster than they are told their order, so that an expert takes the last bits of its share.
    """
    experts = share.shape[1]
    own = (1 << max(experts - 1, 1).bit_length()) - 1
    key = ~np.ascontiguousarray(share).view(np.int64)  # of numbers from 0 on, the larger one has the larger bits
    key &= ~own
    key |= np.arange(experts)
    key.sort(axis=1)
    key &= own
    return key


def pack(load: Floats, counts: Ints, num_gpus: int, together: int) -> Ints:
    """The expert in each slot [rows, slots]: by descending share, each to the lightest GPU that may hold it."""
    rows, experts = load.shape
    num_slots = int(counts[0].sum())
    share = load / counts
    order = heaviest_first(share)
    slots = np.zeros((rows, num_slots), dtype=np.int64)
    run_loop(
        _pack,
        rows * num_slots * 32,
        *(share.ravel(), counts.ravel(), order.ravel(), rows, experts, num_gpus, num_slots // num_gpus, together),
        *(slots.ravel(), np.zeros(num_gpus), np.zeros(num_gpus, dtype=np.int64)),
        np.zeros(num_gpus, dtype=np.int64),
    )
    return slots


def improve(load: Floats, slots: Ints, num_gpus: int, together: int, bound: Floats, patience: int = PATIENCE) -> Ints:
    """``slots`` [rows, slots] with a largest GPU load that is no larger, searched until it is near to ``bound`` [rows].

    First swaps between the hottest GPU and another, each time the first good one from the lightest GPU on. Where none
    helps, an expert of the hottest GPU gets a replica from another expert, wherever that one's lies, and the swaps
    begin anew; what does not end lower is taken back.
    """
    rows, experts = load.shape
    num_slots = slots.shape[1]
    slots = slots.copy()
    run_loop(
        _improve,
        rows * num_slots * 64,
        *(load.ravel(), bound, rows, experts, num_gpus, num_slots // num_gpus, together, patience, slots.ravel()),
        *(np.zeros(num_slots, dtype=np.int64), np.zeros(num_slots), np.zeros(experts, dtype=np.int64)),
        *(np.zeros(experts), np.zeros(num_gpus * experts, dtype=np.int64), np.zeros(num_gpus)),
        np.zeros(num_gpus, dtype=np.int64),
    )
    return slots


def _pack(
    share: Any,
    counts: Any,
    order: Any,
    rows: int,
    experts: int,
    gpus: int,
    room: int,
    together: int,
    slots: Any,
    total: Any,
    filled: Any,
    heap: Any,
) -> int:
    for row in range(rows):
        first, at = row * gpus * room, row * experts
        size = gpus  # GPUs with room, the lightest on top; behind them, from the end, those set aside
        for gpu in range(gpus):
            total[gpu], filled[gpu], heap[gpu] = 0.0, 0, gpu
        for index in range(experts):
            expert = order[at + index]
            left, aside, passes = counts[at + expert], 0, 1
            while left or aside:
                if left and size:  # the lightest GPU takes a copy, and is set aside unless that was the last one
                    gpu = heap[0]
                    slots[first + gpu * room + filled[gpu]] = expert
                    total[gpu] += share[at + expert]
                    filled[gpu] += 1
                    left -= 1
                    stays = left == 0 and aside == 0 and filled[gpu] < room
                    if not stays:
                        size -= 1
                        aside += 1
                    last, hole = gpu if stays else heap[size], 0
                    while 2 * hole + 1 < size:
                        child = 2 * hole + 1
                        if child + 1 < size and total[heap[child + 1]] < total[heap[child]]:
                            child += 1
                        if total[last] <= total[heap[child]]:
                            break
                        heap[hole] = heap[child]
                        hole = child
                    heap[hole] = last
                    if not stays:
                        heap[gpus - aside] = gpu
                elif left == 0 or passes < together:  # those set aside come back
                    for index_aside in range(gpus - aside, gpus):
                        gpu = heap[index_aside]
                        if filled[gpu] < room:
                            hole = size
                            size += 1
                            while hole and total[heap[(hole - 1) // 2]] > total[gpu]:
                                heap[hole] = heap[(hole - 1) // 2]
                                hole = (hole - 1) // 2
                            heap[hole] = gpu
                    aside = 0
                    passes += 1
                else:  # room only where the expert is already: an expert of a full GPU goes there and makes way
                    near = 0
                    while filled[near] == room:
                        near += 1
                    for slot in range(gpus * room):
                        far, moved = slot // room, slots[first + slot]
                        if filled[far] < room or moved == expert:
                            continue
                        there, here = 0, 0
                        for other in range(room):
                            if slots[first + far * room + other] == expert:
                                there += 1
                            if other < filled[near] and slots[first + near * room + other] == moved:
                                here += 1
                        if there < together and here < together:
                            slots[first + near * room + filled[near]] = moved
                            slots[first + slot] = expert
                            total[near] += share[at + moved]
                            total[far] += share[at + expert] - share[at + moved]
                            filled[near] += 1
                            break
                    left -= 1
    return 0


def _improve(
    load: Any,
    bound: Any,
    rows: int,
    experts: int,
    gpus: int,
    room: int,
    together: int,
    patience: int,
    slots: Any,
    now: Any,
    value: Any,
    copies: Any,
    share: Any,
    held: Any,
    total: Any,
    order: Any,
) -> int:
    num_slots = gpus * room
    for gpu in range(gpus):
        order[gpu] = gpu
    for row in range(rows):
        first, at = row * num_slots, row * experts
        random = row + 1
        lowest, hottest = 0.0, 0  # the largest GPU load of what stands in `slots`, and where it is
        turn, in_vain = 0, 0
        while True:
            stop = bound[row] * (1.0 + min(EVEN_ENOUGH * (1.0 + turn / 8.0), EVEN))
            for expert in range(experts):
                copies[expert] = 0
            for slot in range(num_slots):
                now[slot] = slots[first + slot]
                copies[now[slot]] += 1
            if turn:  # an expert of the hottest GPU gets a replica of the one that, of a few, it makes least heavier
                random = (random * 1103515245 + 12345) % 2147483648
                gains = now[hottest * room + random // 65536 % min(room, 2)]
                asked, chosen, least = 1 + turn % 4, -1, 0.0
                for _ in range(64):
                    random = (random * 1103515245 + 12345) % 2147483648
                    slot = random // 256 % num_slots
                    loses = now[slot]
                    if copies[loses] < 2 or loses == gains or copies[gains] >= gpus * together:
                        continue
                    there = 0
                    for other in range(slot // room * room, slot // room * room + room):
                        if now[other] == gains:
                            there += 1
                    if there == together:
                        continue
                    heavier = load[at + loses] / (copies[loses] - 1) - load[at + loses] / copies[loses]
                    if chosen < 0 or heavier < least:
                        chosen, least = slot, heavier
                    asked -= 1
                    if asked == 0:
                        break
                if chosen >= 0:
                    copies[now[chosen]] -= 1
                    copies[gains] += 1
                    now[chosen] = gains
            for expert in range(experts):
                share[expert] = load[at + expert] / copies[expert]
            for gpu in range(gpus):  # the slots of a GPU stand by descending share from here on
                total[gpu] = 0.0
                for slot in range(gpu * room, gpu * room + room):
                    expert = now[slot]
                    held[gpu * experts + expert] += 1
                    total[gpu] += share[expert]
                    hole = slot
                    while hole > gpu * room and value[hole - 1] < share[expert]:
                        value[hole], now[hole] = value[hole - 1], now[hole - 1]
                        hole -= 1
                    value[hole], now[hole] = share[expert], expert
            for at_rank in range(1, gpus):  # the GPUs stand by ascending load, nearly so from the turn before
                gpu, hole = order[at_rank], at_rank
                while hole and total[order[hole - 1]] > total[gpu]:
                    order[hole] = order[hole - 1]
                    hole -= 1
                order[hole] = gpu
            while True:
                hot = order[gpus - 1]
                peak = total[hot]
                if peak <= stop:
                    break
                best, given, taken, cold, cold_rank = peak * (1.0 - 1e-9), -1, -1, -1, 0
                for at_rank in range(gpus):
                    gpu = order[at_rank]
                    if best <= stop or peak - best >= GOOD * (peak - total[gpu]) / 2.0:  # one of two keeps their mean
                        break
                    ideal = (peak - total[gpu]) / 2.0
                    right = gpu * room
                    end = right + room
                    for left in range(hot * room, hot * room + room):
                        while right < end and value[right] > value[left] - ideal:
                            right += 1
                        if (
                            right < end
                            and total[gpu] + value[left] - value[right] < best
                            and held[gpu * experts + now[left]] < together
                            and held[hot * experts + now[right]] < together
                        ):
                            best, given, taken = total[gpu] + value[left] - value[right], left, right
                            cold, cold_rank = gpu, at_rank
                        if (
                            right > gpu * room
                            and peak - value[left] + value[right - 1] < best
                            and held[gpu * experts + now[left]] < together
                            and held[hot * experts + now[right - 1]] < together
                        ):
                            best, given, taken = peak - value[left] + value[right - 1], left, right - 1
                            cold, cold_rank = gpu, at_rank
                if cold < 0:
                    break
                large, small = now[given], now[taken]
                held[hot * experts + large] -= 1
                held[hot * experts + small] += 1
                held[cold * experts + small] -= 1
                held[cold * experts + large] += 1
                total[hot] -= share[large] - share[small]
                total[cold] += share[large] - share[small]
                while given + 1 < hot * room + room and value[given + 1] > share[small]:
                    value[given], now[given] = value[given + 1], now[given + 1]
                    given += 1
                value[given], now[given] = share[small], small
                while taken > cold * room and value[taken - 1] < share[large]:
                    value[taken], now[taken] = value[taken - 1], now[taken - 1]
                    taken -= 1
                value[taken], now[taken] = share[large], large
                while cold_rank + 1 < gpus and total[order[cold_rank + 1]] < total[cold]:
                    order[cold_rank] = order[cold_rank + 1]
                    cold_rank += 1
                order[cold_rank] = cold
                hot_rank = gpus - 1 if order[gpus - 1] == hot else gpus - 2
                while hot_rank and total[order[hot_rank - 1]] > total[hot]:
                    order[hot_rank] = order[hot_rank - 1]
                    hot_rank -= 1
                order[hot_rank] = hot
            for slot in range(num_slots):
                held[slot // room * experts + now[slot]] = 0
            turn += 1
            in_vain += 1
            if turn == 1 or total[hot] < lowest * (1.0 - 1e-9):
                lowest, hottest, in_vain = total[hot], hot, 0
                for slot in range(num_slots):
                    slots[first + slot] = now[slot]
            if lowest <= stop or in_vain >= patience:
                break
    return 0
