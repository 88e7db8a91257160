"""Slow and obvious: what a whole schedule is, and its lowering in the words of the rules.

The fast path gives the verdict and the programs; this one says in a sentence what is wrong. Tests hold them equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from counterflow.errors import ScheduleError
from counterflow.schedule.action import Action, Kind
from counterflow.schedule.grid import Place, marked
from counterflow.schedule.schedule import Schedule
from counterflow.schedule.transfers import Instruction, Post, Program, Run, Transfer, Transfers, Wait, needs, produces


def require_whole(schedule: Schedule) -> None:
    """Every action there once, on one rank with its like, and behind what it needs of that rank.

    Raises:
        ScheduleError: the first rule broken, with rank, step and action.
    """
    places = _places(schedule)
    chains = defaultdict[tuple[int, int], list[Action]](list)
    for part in places:
        chains[part.stage, part.microbatch].append(part)
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            chain = _chain(schedule, places, chains[stage, microbatch], stage, microbatch)
            for earlier, later in zip(chain, chain[1:], strict=False):
                _require_order(schedule, places, earlier, later)
    for part, (rank, _) in places.items():
        need = needs(part, schedule.num_stages)
        if need is None:
            continue
        payload, stage = need
        made = next(action for action in chains[stage, part.microbatch] if produces(action) == payload)
        # Across ranks the wait enforces the order; on one rank only the row can.
        if places[made][0] == rank:
            _require_order(schedule, places, made, part)


def _refuse(schedule: Schedule, sentence: str, *places: Place) -> NoReturn:
    raise marked(ScheduleError(sentence), schedule, places)


def _places(schedule: Schedule) -> dict[Action, Place]:
    places: dict[Action, Place] = {}
    for rank, row in enumerate(schedule.rows):
        for step, action in enumerate(row):
            for part in action.parts:
                if part in places:
                    before, at = places[part]
                    _refuse(
                        schedule,
                        f"rank {rank}, step {step}: {part} already stands at rank {before}, step {at}; remove one",
                        (rank, step),
                        (before, at),
                    )
                places[part] = rank, step
    return places


def _chain(
    schedule: Schedule, places: dict[Action, Place], found: list[Action], stage: int, microbatch: int
) -> list[Action]:
    """The actions of one stage and micro-batch in the order they need: F; then B, or I and W."""
    found = sorted(found, key=lambda action: "FBIW".index(action.kind))
    kinds = "".join(action.kind for action in found)
    legal = ("F",) if schedule.mode == "forward" else ("FB", "FIW")
    if kinds not in legal:
        _refuse(
            schedule,
            f"stage {stage}, micro-batch {microbatch} has {', '.join(map(str, found)) or 'no action'}; it needs "
            + ("one F" if schedule.mode == "forward" else "one F, and one B or one I and one W"),
            *(places[action] for action in found),
        )
    return found


def _require_order(schedule: Schedule, places: dict[Action, Place], earlier: Action, later: Action) -> None:
    rank, step = places[later]
    before, at = places[earlier]
    if before != rank:
        _refuse(
            schedule,
            f"rank {rank}, step {step}: {later} stands on another rank than {_as_seen_from(later, earlier)} "
            f"(rank {before}); a stage does all its work for a micro-batch on one rank",
            (rank, step),
            (before, at),
        )
    if at >= step:
        _refuse(
            schedule,
            f"rank {rank}, step {step}: {later} stands before {_as_seen_from(later, earlier)}; move it behind",
            (rank, step),
            (before, at),
        )


_WORDS = {Kind.F: "forward", Kind.I: "backward for input"}


def _as_seen_from(later: Action, earlier: Action) -> str:
    if earlier.stage == later.stage:
        return f"its {_WORDS[earlier.kind]} {earlier}"
    return f"{earlier}, whose {produces(earlier)} it needs"


class _Move(NamedTuple):
    """A transfer with its place in both rows: produced after action ``sent``, needed before ``used``."""

    transfer: Transfer
    sent: int
    used: int


def lower(schedule: Schedule) -> Transfers:
    """What ``counterflow.schedule.lower`` does, rule by rule.

    Raises:
        ScheduleError: the schedule is not whole.
    """
    require_whole(schedule)
    moves = list(_moves(schedule))
    channels = defaultdict[tuple[int, int], list[_Move]](list)
    for move in moves:
        channels[move.transfer.source, move.transfer.target].append(move)
    due: dict[Transfer, int] = {}
    free: dict[Transfer, int] = {}
    for (source, target), channel in channels.items():
        due |= _receive_slots(channel)
        free |= _release_slots(channel, channels.get((target, source), []), end=len(schedule.rows[source]))
    slots = [_Slots() for _ in schedule.rows]
    for transfer, sent, used in moves:
        slots[transfer.source].sends[sent + 1].append(transfer)
        slots[transfer.target].receives[due[transfer]].append(transfer)
        slots[transfer.target].arrivals[used].append(transfer)
        slots[transfer.source].releases[free[transfer]].append(transfer)
    return Transfers(schedule, tuple(_program(row, some) for row, some in zip(schedule.rows, slots, strict=True)))


class _Slots:
    """What one rank posts and waits for; slot k stands before its action k, the last one after all of them."""

    def __init__(self) -> None:
        self.sends, self.receives, self.arrivals, self.releases = (
            defaultdict[int, list[Transfer]](list) for _ in range(4)
        )


def _moves(schedule: Schedule) -> Iterator[_Move]:
    """All transfers in the order of their senders' rows; of the two of an F&B, the forward's goes first."""
    users = {}
    for rank, step, part in _parts(schedule):
        need = needs(part, schedule.num_stages)
        if need is not None:
            users[*need, part.microbatch] = rank, step
    for rank, step, part in _parts(schedule):
        payload = produces(part)
        if payload is not None and (payload, part.stage, part.microbatch) in users:
            target, used = users[payload, part.stage, part.microbatch]
            if target != rank:
                yield _Move(Transfer(payload, part.stage, part.microbatch, rank, target), step, used)


def _parts(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for rank, row in enumerate(schedule.rows):
        for step, action in enumerate(row):
            for part in action.parts:
                yield rank, step, part


def _program(row: tuple[Action, ...], slots: _Slots) -> Program:
    """Rule 1 and the order within a slot: sends and receives posted, arrivals and releases waited for."""
    program: list[Instruction] = []
    for slot in range(len(row) + 1):
        if batch := (*slots.sends[slot], *slots.receives[slot]):
            program.append(Post(batch))
        # The forward of an F&B waits for an activation, its backward for a gradient.
        arrivals = sorted(slots.arrivals[slot], key=lambda transfer: transfer.payload)
        program += map(Wait, (*arrivals, *slots.releases[slot]))
        if slot < len(row):
            program.append(Run(row[slot]))
    return tuple(program)


def _receive_slots(channel: list[_Move]) -> dict[Transfer, int]:
    """Rules 2 and 3: one action ahead of its use, and of the use of all that is sent after it."""
    first_use = channel[-1].used
    slots = {}
    for move in reversed(channel):
        first_use = min(first_use, move.used)
        slots[move.transfer] = max(first_use - 1, 0)
    return slots


def _release_slots(channel: list[_Move], answers: list[_Move], end: int) -> dict[Transfer, int]:
    """Rule 4: for each send the first slot in which an answer, sent after its use, is waited for."""
    pending = sorted(answers, key=lambda answer: answer.sent)
    slots = {}
    first = end
    for move in sorted(channel, key=lambda move: move.used, reverse=True):
        while pending and pending[-1].sent >= move.used:
            first = min(first, pending.pop().used)
        slots[move.transfer] = max(first, move.sent + 1)
    return slots
