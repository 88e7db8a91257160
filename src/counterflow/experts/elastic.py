"""GPUs lost, GPUs added, other numbers of replicas: the fewest experts that have to move for all of them to live."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.loads import Floats, Ints, as_loads
from counterflow.experts.migration import MigrationPlan, plan_migration
from counterflow.experts.placement import Placement, refuse_sizes, whole_number

MOST_SLOTS = 2**13
"""A layer of any model has hundreds."""

MOST_PAIRS = 2**16
"""Slots times those of a GPU: beyond that, where GPUs have thousands each, a placement is left as it is first made."""

MOST_TRIED = 2**22
"""Slots times changes that are looked at together: of more changes some are."""

MOST_TURNS = 64
"""So many improvements of a layer at most."""

MOST_OTHERS = 16
"""The hottest GPU changes with the so many that have least to do."""


@dataclass(frozen=True, eq=False)
class Resized:
    """A placement for other GPUs or slots, and the way there.

    ``fewest``, int64 [layers], is what no placement of these sizes gets by with less than, and ``plan.moves`` is as
    much. ``reload`` lists (layer, expert) wherever all copies were on lost GPUs: their weights come from a checkpoint,
    as fetches from GPU -1.
    """

    plan: MigrationPlan
    fewest: Ints
    reload: tuple[tuple[int, int], ...]

    @property
    def placement(self) -> Placement:
        """The new one."""
        return self.plan.new


def resize(
    current: Placement,
    loads: object = None,
    *,
    lost_gpus: Iterable[int] = (),
    num_gpus: int | None = None,
    num_replicas: int | None = None,
    num_nodes: int | None = None,
) -> Resized:
    """The smallest change after which every expert is live on ``num_gpus`` GPUs with equally many slots.

    The GPUs ``lost_gpus`` of ``current`` are gone; those left, in their order, are the first of the new placement, and
    where ``num_gpus`` are more, GPUs were added. Slots of a GPU stay as many as they were, unless ``num_replicas`` says
    otherwise. Nodes stay where each of them keeps equally many GPUs and none is added, and groups of experts that are
    kept on nodes stay there if none of the nodes is gone; else all GPUs count as one node, unless ``num_nodes`` tells.

    No placement of these sizes takes fewer moves, as ``plan_migration`` counts them with GPUs in that order: an expert
    moves that no GPU can keep, and one to every added GPU, and no other. What is left open (to which GPU, and which
    copies make way) is decided for the ``loads`` [layers, experts], equal ones if none are given, by a search. Give the
    result to ``balance`` as ``current`` to go on from there, with as many moves as are worth it.

    Raises:
        PlacementError: the slots are too few for the experts, a GPU is lost that never was, or numbers do not divide.

    Example:
        >>> from counterflow import Placement
        >>> from counterflow.experts import resize
        >>> current = Placement([[0, 1, 2, 3, 0, 2]], num_experts=4, num_gpus=3)
        >>> resized = resize(current, lost_gpus=[1])
        >>> resized.placement.physical_to_logical.tolist(), resized.plan.moves.tolist(), resized.reload
        ([[0, 1, 3, 2]], [1], ((0, 3),))
    """
    lost = _lost(current, lost_gpus)
    left = [gpu for gpu in range(current.num_gpus) if gpu not in lost]
    if not left:
        raise PlacementError(f"all {current.num_gpus} GPUs are lost: make a new placement, with balance")
    num_gpus = len(left) if num_gpus is None else whole_number("num_gpus", num_gpus)
    if num_gpus < len(left):
        raise PlacementError(
            f"{len(left)} GPUs are left and {num_gpus} are asked for: say which {len(left) - num_gpus} more are lost"
        )
    load = _load(current, loads)
    room = current.num_slots // current.num_gpus
    slots = num_gpus * room if num_replicas is None else whole_number("num_replicas", num_replicas)
    kept_nodes = _nodes_kept(current, left, num_gpus)
    nodes = (kept_nodes or 1) if num_nodes is None else whole_number("num_nodes", num_nodes)
    rows = [current.physical_to_logical.reshape(current.num_layers, current.num_gpus, -1)[:, gpu] for gpu in left]
    held = np.stack(rows, axis=1)
    if slots < current.num_experts:
        raise PlacementError(_too_few(held, load, slots, num_gpus))
    refuse_sizes(current.num_experts, slots, num_gpus, nodes)
    if slots > MOST_SLOTS:
        raise PlacementError(f"{slots} slots are too many to be resized: at most {MOST_SLOTS} are searched")
    by_node = current.hierarchy == "node" and kept_nodes == nodes == current.num_nodes
    wanted, fewest, at_home = [], [], by_node
    for layer, row in enumerate(held):
        homes = _homes(current, layer) if by_node else [np.arange(current.num_experts)]
        filled = [
            _filled(part, load[layer], home, num_gpus // len(homes), slots // num_gpus)
            for part, home in zip(np.split(row, len(homes)), homes, strict=True)
        ]
        wanted.append(np.concatenate([filling for filling, _ in filled]))
        fewest.append(sum(moves for _, moves in filled))
        at_home = at_home and len(homes) == nodes
    if not lost and (num_gpus, slots) == (current.num_gpus, current.num_slots):
        wanted = list(current.physical_to_logical)
    new = Placement(np.stack(wanted), current.num_experts, num_gpus, nodes, "node" if at_home else "none")
    gone = ((layer, set(range(current.num_experts)).difference(row.ravel().tolist())) for layer, row in enumerate(held))
    return Resized(
        plan_migration(current, new, lost_gpus=lost, reload_lost=True),
        np.array(fewest, dtype=np.int64),
        tuple((layer, expert) for layer, experts in gone for expert in sorted(experts)),
    )


def _lost(current: Placement, lost_gpus: Iterable[int]) -> set[int]:
    lost = set()
    for gpu in lost_gpus:
        try:
            number = operator.index(gpu)
        except TypeError:
            number = -1
        if isinstance(gpu, bool | np.bool_) or not 0 <= number < current.num_gpus:
            raise PlacementError(
                f"the lost GPU {reprlib.repr(gpu)} is none of the current placement: "
                f"give numbers from 0 to {current.num_gpus - 1}"
            )
        lost.add(number)
    return lost


def _load(current: Placement, loads: object) -> Floats:
    if loads is None:
        return np.ones((current.num_layers, current.num_experts))
    current.gpu_loads(loads)  # says where they are of another model
    load = as_loads(loads)
    return load / np.where(load.any(axis=1), load.max(axis=1), 1.0)[:, None]


def _nodes_kept(current: Placement, left: list[int], num_gpus: int) -> int | None:
    """How many nodes there are still, where all keep equally many GPUs and none is added."""
    sizes = np.bincount(np.array(left) // (current.num_gpus // current.num_nodes))
    sizes = sizes[sizes > 0]
    return len(sizes) if len(left) == num_gpus and (sizes == sizes[0]).all() else None


def _homes(current: Placement, layer: int) -> list[Ints]:
    """The experts of each node, where each is on one of them and they have equally many; else all of them together."""
    nodes = current.physical_to_logical[layer].reshape(current.num_nodes, -1)
    homes = [np.unique(node) for node in nodes]
    once = all(len(home) * len(homes) == current.num_experts for home in homes)
    return homes if once else [np.arange(current.num_experts)]


def _too_few(held: Ints, load: Floats, slots: int, num_gpus: int) -> str:
    """Which experts of the first layer are one too many: those without a copy left, then those with least load."""
    num_experts = load.shape[1]
    copies = np.bincount(held[0].ravel(), minlength=num_experts)
    order = np.lexsort((np.arange(num_experts), load[0], copies > 0))
    without = sorted(order[: num_experts - slots].tolist())
    named = ", ".join(map(str, without[:8])) + (f" and {len(without) - 8} more" if len(without) > 8 else "")
    least = -(-num_experts // num_gpus) * num_gpus
    return (
        f"{slots} slots on {num_gpus} GPUs cannot hold {num_experts} experts, and in layer 0 there would be none for "
        f"{named}: give at least {least} replicas, or more GPUs"
    )


# --- one layer ----------------------------------------------------------------------------------------------


def _filled(held: Ints, load: Floats, experts: Ints, num_gpus: int, room: int) -> tuple[Ints, int]:
    """The slots of a layer, or of one node of it, and the moves: no fewer than that can be.

    At most as many ``experts`` as a largest matching pairs with GPUs that hold them, ``room`` for each GPU, are live
    without a move. Any other takes one, and so does a GPU that holds nothing yet. That many are enough, for there is a
    slot for all of them, and any GPU fills up with what it has.
    """
    has = [set(row) for row in held.tolist()] + [set[int]() for _ in range(num_gpus - len(held))]
    keeper = _keepers(has, experts.tolist(), room)
    rows: list[list[int]] = [[] for _ in range(num_gpus)]
    for expert, gpu in keeper.items():
        rows[gpu].append(expert)
    total = [float(sum(load[expert] for expert in row)) for row in rows]
    copies = dict.fromkeys(experts.tolist(), 1)

    def give(gpu: int, expert: int) -> None:
        rows[gpu].append(expert)
        total[gpu] += load[expert] / copies[expert]

    added = list(range(len(held), num_gpus))
    for expert in sorted(set(copies) - keeper.keys(), key=lambda expert: (-load[expert], expert)):
        open_gpus = [gpu for gpu in added if not rows[gpu]] or [gpu for gpu in range(num_gpus) if len(rows[gpu]) < room]
        give(min(open_gpus, key=lambda gpu: (total[gpu], gpu)), expert)
    for gpu in added:
        if not rows[gpu]:
            expert = max(copies, key=lambda expert: (load[expert] / copies[expert], -expert))
            copies[expert] += 1
            give(gpu, expert)
    on = [set(row) for row in rows]
    while True:
        open_gpus = [gpu for gpu in range(num_gpus) if len(rows[gpu]) < room]
        if not open_gpus:
            break
        gpu = min(open_gpus, key=lambda gpu: (total[gpu], gpu))
        choices = (has[gpu] - on[gpu]) or on[gpu]
        expert = max(choices, key=lambda expert: (load[expert] / copies[expert], -expert))
        copies[expert] += 1
        on[gpu].add(expert)
        give(gpu, expert)
    slots = np.array(rows, dtype=np.int64).ravel()
    holds = np.zeros((num_gpus, len(load)), dtype=bool)
    for gpu, here in enumerate(has):
        holds[gpu, sorted(here)] = True
    return _levelled(slots, load, holds), max(len(experts) - len(keeper), num_gpus - len(held))


def _keepers(has: list[set[int]], experts: list[int], room: int) -> dict[int, int]:
    """A GPU that holds it for as many experts as can be, at most ``room`` for each GPU.

    Example:
        >>> from counterflow.experts.elastic import _keepers
        >>> _keepers([{0, 1}, {0, 2}], [0, 1, 2], room=1)
        {1: 0, 2: 1}

    Source: Kuhn, "The Hungarian method for the assignment problem", 1955: one augmenting path after the other.
    """
    holders = {expert: [gpu for gpu, here in enumerate(has) if expert in here] for expert in experts}
    keeper: dict[int, int] = {}
    kept: list[set[int]] = [set() for _ in has]
    for expert in sorted(experts, key=lambda expert: (len(holders[expert]), expert)):
        came_from: dict[int, int] = {}  # the expert that would come to a GPU
        queue = [expert]
        end = None
        for asking in queue:
            for gpu in holders[asking]:
                if gpu in came_from:
                    continue
                came_from[gpu] = asking
                if len(kept[gpu]) < room:
                    end = gpu
                    break
                queue.extend(sorted(kept[gpu]))
            if end is not None:
                break
        while end is not None:
            asking = came_from[end]
            before = keeper.get(asking)
            keeper[asking] = end
            kept[end].add(asking)
            if before is not None:
                kept[before].remove(asking)
            end = before
    return dict(sorted(keeper.items()))


# --- how even it is, for the same moves ---------------------------------------------------------------------


def _levelled(slots: Ints, load: Floats, holds: Any) -> Ints:
    """``slots`` after all single changes that lower the hottest GPU and take no more moves, the best one each time."""
    gpus = len(holds)
    now = _evenness(slots[None], load, gpus)[0]
    for _ in range(MOST_TURNS if len(slots) ** 2 // gpus <= MOST_PAIRS else 0):
        changes = _changes(slots, load, holds)
        changes = changes[:: -(-len(changes) * (len(slots) + len(load)) // MOST_TRIED) or 1]
        if not len(changes):
            break
        after = np.repeat(slots[None], len(changes), axis=0)
        every = np.arange(len(changes))
        after[every, changes[:, 0]] = changes[:, 1]
        after[every, changes[:, 2]] = changes[:, 3]
        found = _evenness(after, load, gpus)
        best = int(np.lexsort((found[:, 1], found[:, 0]))[0])
        lower, flatter = found[best] < now * (1 - 1e-9)
        if not lower and not (flatter and found[best, 0] <= now[0] * (1 + 1e-12)):
            break
        slots, now = after[best], found[best]
    return slots


def _evenness(slots: Ints, load: Floats, num_gpus: int) -> Floats:
    """The largest GPU load and the sum of the squares [rows, 2]."""
    flat = slots + np.arange(len(slots))[:, None] * len(load)
    copies = np.bincount(flat.ravel(), minlength=len(slots) * len(load)).reshape(len(slots), -1)
    share = load[slots] / np.take_along_axis(copies, slots, axis=1)
    total = share.reshape(len(slots), num_gpus, -1).sum(axis=2)
    return np.stack([total.max(axis=1), (total**2).sum(axis=1)], axis=1)


def _changes(slots: Ints, load: Floats, holds: Any) -> Ints:
    """Slot and expert, twice [changes, 4]: what takes load from the hottest GPU, and no more moves than there are."""
    gpus, experts = holds.shape
    room = len(slots) // gpus
    gpu_of = np.arange(len(slots)) // room
    copies = np.bincount(slots, minlength=experts)
    on = np.zeros((gpus, experts), dtype=np.int64)
    np.add.at(on, (gpu_of, slots), 1)
    share = load[slots] / copies[slots]
    total = share.reshape(gpus, room).sum(axis=1)
    hot = int(total.argmax())
    near = np.isin(gpu_of, np.argsort(total, kind="stable")[:MOST_OTHERS]) & (gpu_of != hot)
    free = holds | (on > 0)  # [gpus, experts]: comes without a move
    saves = ~holds & (on == 1)  # goes with a move
    spare = copies[slots] > 1
    found: list[tuple[int, int, int, int]] = []
    for mine in range(hot * room, hot * room + room):
        expert = int(slots[mine])
        if spare[mine]:  # its place to another one that was here
            found += [(mine, int(other), mine, int(other)) for other in np.flatnonzero(free[hot]) if other != expert]
        # To have more copies elsewhere, where it was before.
        found += [(int(at), expert, int(at), expert) for at in np.flatnonzero(spare & free[gpu_of, expert] & near)]
        # To change places with another one.
        costs = ~free[gpu_of, expert] * 1 + ~free[hot, slots] - saves[hot, expert] - saves[gpu_of, slots]
        swaps = np.flatnonzero((costs <= 0) & near & (share < share[mine]) & (slots != expert))
        found += [(mine, int(slots[at]), int(at), expert) for at in swaps]
        if saves[hot, expert] and holds[hot].any():  # it goes to another GPU, and one that was here takes its place
            own = np.flatnonzero(holds[hot])
            stays = int(own[np.argmin(load[own] / (copies[own] + 1))])
            found += [(mine, stays, int(at), expert) for at in np.flatnonzero(spare & near & (slots != expert))]
    return np.array(found, dtype=np.int64).reshape(-1, 4)
