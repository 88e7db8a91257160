"""What may change hands at once in a layer: simple cycles over its GPUs, which leave every expert a slot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from counterflow.errors import PlacementError

NOWHERE = -1
"""Where an expert comes from (GPU, slot) whose every copy was lost, and what a slot holds that something comes to."""

Change = tuple[int, int, int]
"""GPU, slot on it, and the expert that comes there."""


def kept_and_coming(held: list[int], wanted: list[int]) -> tuple[list[int], list[int]]:
    """What stays in each slot of one GPU, -1 where something else comes, and what comes."""
    left = Counter(wanted)
    slots = []
    for slot in range(len(wanted)):
        expert = held[slot] if slot < len(held) else NOWHERE
        stays = left[expert] > 0
        left[expert] -= stays
        slots.append(expert if stays else NOWHERE)
    return slots, sorted(left.elements())


def at_once(kept: list[tuple[list[int], list[int]]]) -> tuple[tuple[Change, ...], ...]:
    """All changes of a layer as one unit, each in the next free slot."""
    changes: list[Change] = []
    for gpu, (slots, come) in enumerate(kept):
        free = [slot for slot, expert in enumerate(slots) if expert == NOWHERE]
        changes.extend((gpu, slot, expert) for slot, expert in zip(free, come, strict=True))
    return (tuple(changes),)


def cycles(held: list[list[int]], kept: list[tuple[list[int], list[int]]]) -> tuple[tuple[Change, ...], ...]:
    """The changes of a layer in units that touch each GPU once, and leave every expert a slot in whatever order.

    Each expert goes from a GPU that drops it to one that it comes to. Drops that nobody waits for go to nobody, and
    what comes beyond that comes from nobody. These arcs form closed walks, for a GPU drops as much as comes to it,
    and a closed walk falls into simple cycles. One cycle moves the experts on it and changes no count of copies,
    but for the one that nobody sends and the one that nobody waits for, of which another copy always remains.
    """
    nobody = len(held)
    waiting: dict[int, list[int]] = defaultdict(list)
    for gpu, (_, come) in enumerate(kept):
        for expert in come:
            waiting[expert].append(gpu)
    arcs: list[list[tuple[int, int, int]]] = [[] for _ in range(nobody + 1)]  # by GPU: slot, expert, to whom
    for gpu, (slots, _) in enumerate(kept):
        for slot, stays in enumerate(slots):
            if stays == NOWHERE:
                expert = held[gpu][slot]
                arcs[gpu].append((slot, expert, waiting[expert].pop() if waiting[expert] else nobody))
    for expert in sorted(waiting):
        arcs[nobody].extend((NOWHERE, expert, gpu) for gpu in waiting[expert])
    return tuple(_simple_cycles(arcs, nobody))


def _simple_cycles(arcs: list[list[tuple[int, int, int]]], nobody: int) -> Iterator[tuple[Change, ...]]:
    """Take all ``arcs`` away, a simple cycle at a time: on each GPU what comes takes the slot of what goes."""
    for start in range(nobody + 1):
        gpus, walk = [start], list[tuple[int, int, int]]()
        while arcs[gpus[-1]]:
            walk.append(arcs[gpus[-1]].pop())
            gpu = walk[-1][2]
            if gpu not in gpus:
                gpus.append(gpu)
                continue
            first = gpus.index(gpu)
            ring, members = walk[first:], gpus[first:]
            del walk[first:], gpus[first + 1 :]
            comes = [ring[-1], *ring[:-1]]
            yield tuple(
                (member, goes[0], come[1])
                for member, goes, come in zip(members, ring, comes, strict=True)
                if member != nobody
            )


def in_steps(units: tuple[tuple[Change, ...], ...], most: int | None, layer: int) -> list[list[Change]]:
    """The units in as few steps as first fit finds, none of which brings more than ``most`` into a GPU."""
    steps: list[tuple[Counter[int], list[Change]]] = []
    for unit in units:
        come = Counter(gpu for gpu, _, _ in unit)
        largest = max(come.values(), default=0)
        if most is not None and largest > most:
            raise PlacementError(
                f"layer {layer} has to bring {largest} experts into GPU {max(come, key=lambda gpu: come[gpu])} "
                f"at once, and {most} may come: allow {largest}"
            )
        fitting = (step for step in steps if most is None or all(step[0][gpu] + come[gpu] <= most for gpu in come))
        step = next(fitting, None)
        if step is None:
            steps.append(step := (Counter(), []))
        step[0].update(come)
        step[1].extend(unit)
    return [changes for _, changes in steps]
