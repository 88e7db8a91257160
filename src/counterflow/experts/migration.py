"""From one placement to another: the fewest experts that GPUs newly receive, from whom, and in which order."""

from __future__ import annotations

import json
import operator
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterflow.errors import PlacementError
from counterflow.experts.certificate import Certificate
from counterflow.experts.cycles import NOWHERE, Change, at_once, cycles, in_steps, kept_and_coming
from counterflow.experts.loads import Floats, Ints
from counterflow.experts.matching import best_pairing
from counterflow.experts.placement import Placement

FORMAT = 1


class Fetch(NamedTuple):
    """An expert that comes into a slot; GPUs as ``MigrationPlan.new`` numbers them, slots from 0 on each GPU."""

    expert: int
    from_gpu: int
    from_slot: int
    to_gpu: int
    to_slot: int


@dataclass(frozen=True)
class Swap:
    """Fetches of one layer that take effect together, and the experts of every GPU afterwards."""

    layer: int
    fetches: tuple[Fetch, ...]
    held: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """How ``old`` becomes ``new``, layer by layer.

    ``new`` is the placement asked for, with its GPUs exchanged within each node, its nodes exchanged, and its slots
    exchanged within each GPU, so that as much as can be stays where it is: no load and no balance differs from it.
    ``old_gpus[g]`` is the GPU of ``old`` that is GPU ``g`` of ``new``, -1 for one that was added. ``layers`` are those
    in which a slot changes, and ``moves``, int64 [layers], counts the experts that a GPU newly receives: a second copy
    on a GPU that holds the expert is no move.
    """

    old: Placement
    new: Placement
    old_gpus: tuple[int, ...]
    layers: tuple[int, ...]
    moves: Ints
    _units: dict[int, tuple[tuple[Change, ...], ...]]

    @property
    def share(self) -> Floats:
        """The moves of every layer over its slots, float64 [layers]."""
        return self.moves / self.new.num_slots

    def held(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The experts of every GPU of ``new`` in ``layer`` before it is migrated, slot by slot."""
        old = _by_gpu(self.old)[layer].tolist()
        return tuple(tuple(old[gpu]) if gpu >= 0 else () for gpu in self.old_gpus)

    def swaps(self, layer: int, most: int | None = None) -> tuple[Swap, ...]:
        """The steps of ``layer``: after each of them every expert has a slot, after the last one it is as in ``new``.

        No step brings more than ``most`` experts into a GPU. With GPUs and slots as many as before, 1 is enough for
        any layer; otherwise a layer changes in one step. A fetch reads what its slot holds before the step. It reads
        on its own GPU if it can, else on its node, and from the GPU that sends least by then.

        Raises:
            PlacementError: the layer cannot do with ``most``.

        Example:
            >>> from counterflow import Placement, plan_migration
            >>> plan = plan_migration(Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 2, 3, 1]], 4, 2))
            >>> [tuple(fetch) for fetch in plan.swaps(0)[0].fetches]
            [(2, 1, 0, 0, 1), (1, 0, 1, 1, 0)]
        """
        held = [list(row) for row in self.held(layer)]
        room = self.new.num_slots // self.new.num_gpus
        sent: Counter[int] = Counter()
        steps = []
        for changes in in_steps(self._units.get(layer, ()), most, layer):
            fetches = tuple(self._fetches(changes, held, sent))
            # Where the slots of a GPU change in number, that is the one step of the layer: all are settled by it.
            held = [(row + [NOWHERE] * room)[:room] for row in held]
            for fetch in fetches:
                held[fetch.to_gpu][fetch.to_slot] = fetch.expert
            steps.append(Swap(layer, fetches, tuple(map(tuple, held))))
        return tuple(steps)

    def _fetches(self, changes: list[Change], held: list[list[int]], sent: Counter[int]) -> Iterator[Fetch]:
        holders: dict[int, dict[int, int]] = defaultdict(dict)
        for gpu, row in enumerate(held):
            for slot in reversed(range(len(row))):
                holders[row[slot]][gpu] = slot
        source: dict[tuple[int, int], tuple[int, int]] = {}
        # Those with the fewest holders first: the others can make way for them.
        for gpu, expert in sorted({(gpu, e) for gpu, _, e in changes}, key=lambda it: (len(holders[it[1]]), it)):
            copies = holders[expert]
            if not copies:
                source[gpu, expert] = NOWHERE, NOWHERE
                continue
            node = self._node(gpu)
            best = min(copies, key=lambda other: (other != gpu, self._node(other) != node, sent[other], other))
            sent[best] += best != gpu
            source[gpu, expert] = best, copies[best]
        for gpu, slot, expert in sorted(changes):
            yield Fetch(expert, *source[gpu, expert], gpu, slot)

    def _node(self, gpu: int) -> int:
        """As ``new`` has it, or, where it knows of one node only, as ``old`` had it."""
        if self.new.num_nodes > 1 or self.old_gpus[gpu] < 0:
            return gpu // (self.new.num_gpus // self.new.num_nodes)
        return self.old_gpus[gpu] // (self.old.num_gpus // self.old.num_nodes)

    def to_json(self) -> str:
        """The plan as text, for those who carry it out with means of their own.

        Example:
            >>> import json
            >>> from counterflow import Placement, plan_migration
            >>> plan = plan_migration(Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 2, 3, 1]], 4, 2))
            >>> json.loads(plan.to_json())["layers"][0]["fetches"][0]
            {'expert': 2, 'from_gpu': 1, 'from_slot': 0, 'to_gpu': 0, 'to_slot': 1}
        """
        layers = [
            {
                "layer": layer,
                "moves": int(self.moves[layer]),
                "fetches": [fetch._asdict() for swap in self.swaps(layer) for fetch in swap.fetches],
            }
            for layer in self.layers
        ]
        return (
            json.dumps(
                {
                    "format": FORMAT,
                    "moves": self.moves.tolist(),
                    "share": self.share.tolist(),
                    "old_gpus": list(self.old_gpus),
                    "layers": layers,
                    "placement": json.loads(self.new.to_json()),
                }
            )
            + "\n"
        )


def plan_migration(
    old: Placement, new: Placement, *, lost_gpus: Iterable[int] = (), reload_lost: bool = False
) -> MigrationPlan:
    """Plan how to get from ``old`` to ``new`` with the fewest moves: experts that a GPU newly receives.

    What a placement is worth does not depend on which GPU of a node is which, nor on which node is which: in each
    layer those of ``new`` are exchanged for the fewest moves, and its slots within each GPU. No GPU changes its node.

    The GPUs ``lost_gpus`` of ``old`` send nothing. Those that are left, in their order, are the first GPUs of ``new``,
    and further ones were added. An expert whose every copy was lost is an error, unless ``reload_lost`` says that it
    will be loaded from elsewhere: its fetches come from GPU -1.

    Raises:
        PlacementError: the placements are of different models, a GPU is lost that never was, GPUs are left over, or
            an expert has no copy left.

    Example:
        >>> from counterflow import Placement, plan_migration
        >>> old = Placement([[0, 1, 2, 0], [0, 1, 2, 2]], num_experts=3, num_gpus=2)
        >>> new = Placement([[0, 2, 1, 0], [2, 1, 1, 0]], num_experts=3, num_gpus=2)
        >>> plan = plan_migration(old, new)
        >>> plan.moves.tolist(), plan.layers, plan.new.physical_to_logical.tolist()
        ([0, 1], (1,), [[0, 1, 2, 0], [0, 1, 2, 1]])
    """
    _refuse_other_model(old, new)
    old_gpus = _old_gpus(old, new, lost_gpus)
    rows = _by_gpu(old)
    before = [[rows[layer, gpu].tolist() if gpu >= 0 else [] for gpu in old_gpus] for layer in range(old.num_layers)]
    wanted = _exchanged(old, new, old_gpus)
    same_sizes = old_gpus == tuple(range(old.num_gpus)) and old.num_slots == new.num_slots
    after, moves = np.empty_like(wanted), np.zeros(new.num_layers, dtype=np.int64)
    units = {}
    for layer, held in enumerate(before):
        if not reload_lost:
            _refuse_missing(layer, held, old.num_experts)
        kept = [kept_and_coming(ours, theirs) for ours, theirs in zip(held, wanted[layer].tolist(), strict=True)]
        steps = cycles(held, kept) if same_sizes else at_once(kept)
        for gpu, slot, expert in (change for unit in steps for change in unit):
            kept[gpu][0][slot] = expert
        after[layer] = [row for row, _ in kept]
        moves[layer] = sum(len({*row} - {*ours}) for ours, (row, _) in zip(held, kept, strict=True))
        if steps:
            units[layer] = steps
    settled = replace(
        new, physical_to_logical=after.reshape(new.num_layers, -1), certificate=_settled(new.certificate, after)
    )
    return MigrationPlan(old, settled, old_gpus, tuple(units), moves, units)


def _refuse_other_model(old: Placement, new: Placement) -> None:
    if (old.num_layers, old.num_experts) != (new.num_layers, new.num_experts):
        raise PlacementError(
            f"the old placement has {old.num_layers} layers of {old.num_experts} experts and the new one "
            f"{new.num_layers} of {new.num_experts}: give two placements of one model"
        )


def _old_gpus(old: Placement, new: Placement, lost_gpus: Iterable[int]) -> tuple[int, ...]:
    """The GPU of ``old`` for each of ``new``, -1 where it was added."""
    lost = set()
    for gpu in lost_gpus:
        try:
            number = operator.index(gpu)
        except TypeError:
            number = NOWHERE
        if not 0 <= number < old.num_gpus:
            raise PlacementError(
                f"the lost GPU {reprlib.repr(gpu)} is none of the old placement: "
                f"give numbers from 0 to {old.num_gpus - 1}"
            )
        lost.add(number)
    left = [gpu for gpu in range(old.num_gpus) if gpu not in lost]
    if len(left) > new.num_gpus:
        raise PlacementError(
            f"the old placement has {len(left)} GPUs left and the new one {new.num_gpus}: "
            f"say which {len(left) - new.num_gpus} are gone (lost_gpus=)"
        )
    return (*left, *[NOWHERE] * (new.num_gpus - len(left)))


def _refuse_missing(layer: int, held: list[list[int]], num_experts: int) -> None:
    missing = set(range(num_experts)).difference(*held)
    if missing:
        raise PlacementError(
            f"expert {min(missing)} of layer {layer} has no copy left, for all were on lost GPUs: "
            f"load it from a checkpoint and say so (reload_lost=True)"
        )


def _by_gpu(placement: Placement) -> Ints:
    """[layers, gpus, slots of a GPU]."""
    return placement.physical_to_logical.reshape(placement.num_layers, placement.num_gpus, -1)


def _holds(placement: Placement) -> NDArray[np.float32]:
    """1.0 where a GPU holds an expert [layers, gpus, experts]: float, for which alone a product is fast."""
    holds = np.zeros((placement.num_layers, placement.num_gpus, placement.num_experts), dtype=np.float32)
    np.put_along_axis(holds, _by_gpu(placement), 1.0, axis=2)
    return holds


def _exchanged(old: Placement, new: Placement, old_gpus: tuple[int, ...]) -> Ints:
    """The rows of ``new`` [layers, gpus, slots of a GPU], whole GPUs exchanged so that most experts stay."""
    layers, gpus, nodes = new.num_layers, new.num_gpus, new.num_nodes
    per_node = gpus // nodes
    ours = _holds(old)[:, list(old_gpus)]
    ours[:, [gpu < 0 for gpu in old_gpus]] = 0.0
    stay = (ours @ _holds(new).transpose(0, 2, 1)).astype(np.int64)
    # Of two exchanges with equally many moves the one that leaves more GPUs alone.
    stay = stay * (gpus + 1) + np.eye(gpus, dtype=np.int64)
    blocks = stay.reshape(layers, nodes, per_node, nodes, per_node).transpose(0, 1, 3, 2, 4)
    within = best_pairing(blocks.reshape(-1, per_node, per_node)).reshape(layers, nodes, nodes, per_node)
    worth = np.take_along_axis(blocks, within[..., None], axis=4).sum(axis=(3, 4))
    node = best_pairing(worth)
    inside = np.take_along_axis(within, node[:, :, None, None], axis=2)[:, :, 0]
    gpu = (node[:, :, None] * per_node + inside).reshape(layers, gpus)
    return np.take_along_axis(_by_gpu(new), gpu[:, :, None], axis=1)


def _settled(certificate: Certificate | None, rows: Ints) -> Certificate | None:
    """The same certificate, with the second copies on a GPU found where they are now."""
    if certificate is None:
        return None
    room = rows.shape[2]
    again = [
        (layer, gpu * room + slot)
        for layer in sorted({layer for layer, _ in certificate.co_located})
        for gpu, row in enumerate(rows[layer].tolist())
        for slot in range(room)
        if row[slot] in row[:slot]
    ]
    return replace(certificate, co_located=tuple(again))
