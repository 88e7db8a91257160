"""From the placement that serves to one that is even enough, slot by slot: each time what brings most for each move."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np

from counterflow.experts.loads import Floats, Ints
from counterflow.loops import run_loop

AIM = 0.1
"""What a change gains is counted down to this share of the way from the target to the mean: ends leave some room."""

MORE = 0.05
"""What a swap takes from the hottest GPU beyond that counts this much: the next change of the loads comes soon."""


class Paths(NamedTuple):
    """For every layer the changes in their order: slots filled, with what, and what holds after each of them.

    ``changes`` is int64 [layers, most, 4]: a slot and the expert that comes into it, twice; -1 for no second one.
    ``moves`` and ``peaks`` [layers, most] are the experts that GPUs have newly received by then, and the largest load
    of a GPU. The first ``lengths`` [layers] count.
    """

    changes: Ints
    moves: Ints
    peaks: Floats
    lengths: Ints

    def after(self, slots: Ints, lengths: Ints) -> Ints:
        """The ``slots`` [layers, slots] after so many changes of each layer."""
        slots = slots.copy()
        for layer in np.flatnonzero(lengths):
            for one, expert, other, second in self.changes[layer, : lengths[layer]].tolist():
                slots[layer, one] = expert
                if other >= 0:
                    slots[layer, other] = second
        return slots


def lower(
    load: Floats, slots: Ints, num_gpus: int, num_nodes: int, target: Floats, largest: Floats | None = None
) -> Paths:
    """Bring the largest GPU load of each layer down to ``target`` [layers], or as far as single changes bring it.

    Each change takes load from the hottest GPU: a swap with another GPU of its node, or a slot of an expert with
    several replicas that gets another expert. Of all of them the one is made that lowers what GPUs have above the
    target most for each move. An expert that comes back to a GPU that held it at first takes a move back. No GPU
    becomes as hot as the hottest was, no expert comes to a GPU that holds it, and none leaves its node.

    Where a layer has to change at all and a replica's share is above ``largest`` [layers], its expert first gets slots
    of those that have replicas to spare, as long as there are any; that may bring a GPU above the hottest.
    """
    rows, experts = load.shape
    num_slots = slots.shape[1]
    most = 2 * num_slots
    changes, moves = np.zeros((rows, most, 4), dtype=np.int64), np.zeros((rows, most), dtype=np.int64)
    peaks, lengths = np.zeros((rows, most)), np.zeros(rows, dtype=np.int64)
    run_loop(
        _lower,
        rows * num_slots * 256,
        *(
            load.ravel(),
            target,
            np.full(rows, np.inf) if largest is None else largest,
            rows,
            experts,
            num_gpus,
            num_slots // num_gpus,
            num_gpus // num_nodes,
            most,
        ),
        *(slots.ravel().copy(), np.zeros(num_gpus * experts, dtype=np.int64)),
        *(np.zeros(num_gpus * experts, dtype=np.int64), np.zeros(experts, dtype=np.int64), np.zeros(experts)),
        *(np.zeros(num_gpus), np.zeros(num_gpus), np.zeros(experts, dtype=np.int64)),
        *(np.zeros(num_slots, dtype=np.int64), changes.ravel(), moves.ravel(), peaks.ravel(), lengths),
    )
    return Paths(changes, moves, peaks, lengths)


def redealt(load: Floats, slots: Ints, wanted: Ints, num_gpus: int, num_nodes: int) -> Ints:
    """``slots`` [layers, slots] with the experts on each node that ``wanted`` has there, and all others in their slots.

    Those that come, heaviest first, each take a slot that was left on the GPU with the least load; what is left then
    goes to the experts with the largest shares.
    """
    slots = slots.copy()
    room, size = slots.shape[1] // num_gpus, slots.shape[1] // num_nodes
    for layer, first in ((layer, node * size) for layer in range(len(slots)) for node in range(num_nodes)):
        here, weight = slots[layer, first : first + size], load[layer]  # a view: what is written here stands in slots
        home = np.unique(wanted[layer, first : first + size])
        copies = np.bincount(here, minlength=len(weight)).astype(np.float64)
        come = home[copies[home] == 0]
        left = np.flatnonzero(~np.isin(here, home)).tolist()
        while len(left) < len(come):  # only where experts lay on several nodes: a further copy makes room
            left.append(int(np.argmax(np.where(np.isin(here, home), copies[here], 0.0))))
            copies[here[left[-1]]] -= 1
            here[left[-1]] = -1
        stays = np.isin(here, home)
        total = np.where(stays, weight[here] / np.maximum(copies[here], 1), 0.0).reshape(-1, room).sum(axis=1)
        here[left] = -1
        for expert in come[np.argsort(-weight[come], kind="stable")].tolist():
            slot = min(left, key=lambda slot: (total[slot // room], slot))
            left.remove(slot)
            here[slot], copies[expert] = expert, 1
            total[slot // room] += weight[expert]
        for slot in left:
            beside = here[slot // room * room : slot // room * room + room]
            apart = home[~np.isin(home, beside)] if not np.isin(home, beside).all() else home
            heaviest = int(apart[np.argmax(weight[apart] / copies[apart])])
            here[slot] = heaviest
            copies[heaviest] += 1
    return slots


def spend(moves: list[list[int]], peaks: list[list[float]], most: int) -> list[int]:
    """Which point of every layer to stop at, so that all moves together are at most ``most``.

    Point 0 of a layer is as it is, without moves. Each time that layer goes on, to the point, that gains most for
    each further move, of those that still fit.

    Example:
        >>> from counterflow.experts.moves import spend
        >>> spend([[0, 2, 4], [0, 1]], [[9.0, 5.0, 4.0], [7.0, 6.0]], 3)
        [1, 1]
    """
    at, left = [0] * len(moves), most
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        here, best = at[layer], (0.0, 0)
        for point in range(len(moves[layer])):
            more = moves[layer][point] - moves[layer][here]
            gain = peaks[layer][here] - peaks[layer][point]
            if gain > 0 and more <= left:
                best = max(best, (gain / max(more, 0.5), point))
        if best[0] > 0:
            heappush(queue, (-best[0], layer, best[1]))

    for layer in range(len(moves)):
        offer(layer)
    while queue:
        _, layer, point = heappop(queue)
        more = moves[layer][point] - moves[layer][at[layer]]
        if more <= left:
            at[layer], left = point, left - more
        offer(layer)
    return at


def _lower(
    load: Any,
    target: Any,
    largest: Any,
    rows: int,
    experts: int,
    gpus: int,
    room: int,
    per_node: int,
    most: int,
    slots: Any,
    first: Any,
    held: Any,
    copies: Any,
    share: Any,
    total: Any,
    delta: Any,
    head: Any,
    following: Any,
    changes: Any,
    moves: Any,
    peaks: Any,
    lengths: Any,
) -> int:
    num_slots = gpus * room
    for row in range(rows):
        base, at = row * num_slots, row * experts
        mean = 0.0
        for expert in range(experts):
            mean += load[at + expert] / gpus
        goal = min(target[row], max(mean, target[row] - (target[row] - mean) * AIM))
        for index in range(gpus * experts):
            first[index] = 0
            held[index] = 0
        for slot in range(num_slots):
            first[slot // room * experts + slots[base + slot]] = 1
            held[slot // room * experts + slots[base + slot]] += 1
        step, spent, sharing = 0, 0, 1
        while True:
            for expert in range(experts):
                copies[expert] = 0
                head[expert] = -1
            for slot in range(num_slots):
                expert = slots[base + slot]
                copies[expert] += 1
                following[slot] = head[expert]
                head[expert] = slot
            for expert in range(experts):
                share[expert] = load[at + expert] / copies[expert]
            hot = 0
            for gpu in range(gpus):
                total[gpu] = 0.0
                for slot in range(gpu * room, gpu * room + room):
                    total[gpu] += share[slots[base + slot]]
                if total[gpu] > total[hot]:
                    hot = gpu
            peak = total[hot]
            if step:
                peaks[row * most + step - 1] = peak
            if step == most or (peak <= target[row] and (step == 0 or sharing == 0)):
                break
            excess = peak - goal
            ceiling = peak * (1.0 - 1e-9)
            node = hot // per_node * per_node
            best, one, comes, other, second, price = peak * 1e-9, -1, -1, -1, -1, 0
            if sharing:  # the largest share that can be made smaller, and the slot that is missed least
                above = largest[row]
                for gains in range(experts):
                    if share[gains] <= above:
                        continue
                    near = head[gains] // room // per_node
                    least, chosen, lightest = share[gains] * (1.0 - 1e-9), -1, 0.0
                    for loses in range(experts):
                        if copies[loses] < 2 or loses == gains or head[loses] // room // per_node != near:
                            continue
                        after = load[at + loses] / (copies[loses] - 1)
                        if after > least:
                            continue
                        step_to = head[loses]
                        while step_to >= 0:
                            gpu = step_to // room
                            rest = total[gpu] - share[loses]
                            if held[gpu * experts + gains] == 0 and (chosen < 0 or after < least or rest < lightest):
                                least, chosen, lightest = after, step_to, rest
                            step_to = following[step_to]
                    if chosen >= 0:
                        above, one, comes = share[gains], chosen, gains
                        price = 1 - first[one // room * experts + comes]
                        if held[one // room * experts + slots[base + one]] == 1:
                            price -= 1 - first[one // room * experts + slots[base + one]]
                if one < 0:
                    sharing = 0
                    if peak <= target[row]:
                        break
            for gpu in range(node, node + per_node if sharing == 0 else node):
                if gpu == hot or total[gpu] >= goal:
                    continue
                for left in range(hot * room, hot * room + room):
                    large = slots[base + left]
                    if held[gpu * experts + large]:
                        continue
                    for right in range(gpu * room, gpu * room + room):
                        small = slots[base + right]
                        less = share[large] - share[small]
                        if less <= 0.0 or total[gpu] + less >= ceiling or held[hot * experts + small]:
                            continue
                        gain = min(less, excess) - max(0.0, total[gpu] + less - goal)
                        if gain <= 0.0:
                            continue
                        cost = 2 - first[gpu * experts + large] - first[hot * experts + small]
                        if held[hot * experts + large] == 1 and first[hot * experts + large] == 0:
                            cost -= 1
                        if held[gpu * experts + small] == 1 and first[gpu * experts + small] == 0:
                            cost -= 1
                        gain += MORE * max(0.0, less - excess)
                        worth = gain / max(cost, 0.25)
                        if worth > best:
                            best, one, comes, other, second, price = worth, left, small, right, large, cost
            for slot in range(node * room, (node + per_node) * room if sharing == 0 else node * room):
                loses = slots[base + slot]
                if copies[loses] < 2 or load[at + loses] > largest[row] * (copies[loses] - 1):
                    continue
                gpu = slot // room
                rise = load[at + loses] / (copies[loses] - 1) - share[loses]
                choices = experts if gpu == hot else room
                for choice in range(choices):
                    gains = choice if gpu == hot else slots[base + hot * room + choice]
                    if held[gpu * experts + gains] or head[gains] // room // per_node * per_node != node:
                        continue
                    after = load[at + gains] / (copies[gains] + 1)
                    if gpu == hot and after >= share[loses]:
                        continue
                    delta[gpu] += after - share[loses]
                    step_to = head[loses]
                    while step_to >= 0:
                        if step_to != slot:
                            delta[step_to // room] += rise
                        step_to = following[step_to]
                    step_to = head[gains]
                    while step_to >= 0:
                        delta[step_to // room] -= share[gains] - after
                        step_to = following[step_to]
                    gain = max(0.0, total[gpu] - goal) - max(0.0, total[gpu] + delta[gpu] - goal)
                    highest = total[gpu] + delta[gpu]
                    delta[gpu] = 0.0
                    for which in range(2):
                        step_to = head[loses] if which == 0 else head[gains]
                        while step_to >= 0:
                            near = step_to // room
                            if delta[near] != 0.0:
                                gain += max(0.0, total[near] - goal) - max(0.0, total[near] + delta[near] - goal)
                                highest = max(highest, total[near] + delta[near])
                                delta[near] = 0.0
                            step_to = following[step_to]
                    if highest >= ceiling or gain <= 0.0:
                        continue
                    cost = 1 - first[gpu * experts + gains]
                    if held[gpu * experts + loses] == 1 and first[gpu * experts + loses] == 0:
                        cost -= 1
                    worth = gain / max(cost, 0.25)
                    if worth > best:
                        best, one, comes, other, second, price = worth, slot, gains, -1, -1, cost
            if one < 0:
                break
            log = (row * most + step) * 4
            changes[log], changes[log + 1], changes[log + 2], changes[log + 3] = one, comes, other, second
            held[one // room * experts + slots[base + one]] -= 1
            held[one // room * experts + comes] += 1
            slots[base + one] = comes
            if other >= 0:
                held[other // room * experts + slots[base + other]] -= 1
                held[other // room * experts + second] += 1
                slots[base + other] = second
            spent += price
            moves[row * most + step] = spent
            step += 1
        lengths[row] = step
    return 0
