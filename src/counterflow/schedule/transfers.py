"""A schedule's communication made explicit: the one lowering that check, simulator and executor share.

Each rank gets a program of three instructions. ``Post`` starts sends and receives and does not block.
``Wait`` blocks for one of them. ``Run`` computes one action. Four rules place them:

1. A send is posted right after the action that produces it, in one batch with the receives then due.
2. A receive is posted one action before it is needed, so that it moves under that action; not earlier,
   for a posted receive holds a buffer (and on NCCL a few SMs) until it is served.
3. Channels match first-in first-out for each ordered pair of ranks. The sender's order therefore rules:
   a receive is posted no later than any that was sent after it.
4. A receive is waited for right before its action. A send is waited for once a later message from its
   receiver proves that it has arrived, so the wait frees the buffer and never stalls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from counterflow.errors import ScheduleError
from counterflow.schedule.action import Action, Kind
from counterflow.schedule.schedule import Schedule

Payload = Literal["activation", "gradient"]


class Transfer(NamedTuple):
    """One message: what ``stage`` produced for ``microbatch`` goes from rank ``source`` to ``target``.

    An activation goes to the next stage, a gradient to the one before.
    """

    payload: Payload
    stage: int
    microbatch: int
    source: int
    target: int

    def __str__(self) -> str:
        return f"{_name(self.payload, self.stage, self.microbatch)} from rank {self.source} to {self.target}"


@dataclass(frozen=True, slots=True)
class Post:
    """Start these transfers at once, as one batch: sends of the last action, receives of the coming ones."""

    transfers: tuple[Transfer, ...]

    def __str__(self) -> str:
        return f"post {' and '.join(map(str, self.transfers))}"


@dataclass(frozen=True, slots=True)
class Wait:
    """Block until the transfer has ended; its target then holds the tensors, its source may free them."""

    transfer: Transfer

    def __str__(self) -> str:
        return f"wait for {self.transfer}"


@dataclass(frozen=True, slots=True)
class Run:
    """Compute the action."""

    action: Action

    def __str__(self) -> str:
        return f"run {self.action}"


Instruction = Post | Wait | Run
Program = tuple[Instruction, ...]


@dataclass(frozen=True)
class Transfers:
    """For each rank its program, lowered from ``schedule``."""

    schedule: Schedule
    programs: tuple[Program, ...]


def needs(part: Action, num_stages: int) -> tuple[Payload, int] | None:
    """The payload that a simple action waits for and the stage that produces it; None at the ends and for W."""
    if part.kind is Kind.F and part.stage > 0:
        return "activation", part.stage - 1
    if part.kind.sends_gradient and part.stage < num_stages - 1:
        return "gradient", part.stage + 1
    return None


def produces(part: Action) -> Payload | None:
    """What a simple action leaves for a neighbouring stage: F an activation, B and I a gradient."""
    if part.kind is Kind.F:
        return "activation"
    return "gradient" if part.kind.sends_gradient else None


def lower(schedule: Schedule) -> Transfers:
    """The programs of all ranks.

    Raises:
        ScheduleError: an action needs what no action of the schedule produces, or two produce the same.

    Example:
        >>> from counterflow import one_f_one_b
        >>> from counterflow.schedule import lower
        >>> for instruction in lower(one_f_one_b(2, 1)).programs[1]:
        ...     print(instruction)
        post the activation of 0F0 from rank 0 to 1
        wait for the activation of 0F0 from rank 0 to 1
        run 1F0
        run 1B0
        post the gradient of 1B0 from rank 1 to 0
        wait for the gradient of 1B0 from rank 1 to 0
    """
    moves = _moves(schedule)
    return Transfers(schedule, tuple(_program(rank, row, moves) for rank, row in enumerate(schedule.rows)))


class _Move(NamedTuple):
    """A transfer with its place in both rows: produced after action ``sent``, needed before ``used``."""

    transfer: Transfer
    sent: int
    used: int


def _moves(schedule: Schedule) -> dict[tuple[int, int], list[_Move]]:
    """For each ordered pair of ranks its moves, in the order in which they are sent."""
    made: dict[tuple[Payload, int, int], tuple[int, int]] = {}
    for rank, step, part in _parts(schedule):
        payload = produces(part)
        if payload is None:
            continue
        key = payload, part.stage, part.microbatch
        if key in made:
            raise ScheduleError(
                f"rank {rank}, step {step}: {part} makes {_name(*key)} a second time; remove one of the two"
            )
        made[key] = rank, step
    channels = defaultdict(list)
    for rank, step, part in _parts(schedule):
        need = needs(part, schedule.num_stages)
        if need is None:
            continue
        key = *need, part.microbatch
        if key not in made:
            raise ScheduleError(
                f"rank {rank}, step {step}: {part} needs {_name(*key)}, which no action makes; add that action"
            )
        source, sent = made[key]
        if source != rank:
            channels[source, rank].append(_Move(Transfer(*key, source, rank), sent, step))
    return {pair: sorted(moves, key=_sending_order) for pair, moves in channels.items()}


def _sending_order(move: _Move) -> tuple[int, bool]:
    """By action; of the two that an F&B may send over one channel, the forward's goes first."""
    return move.sent, move.transfer.payload == "gradient"


def _parts(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for rank, row in enumerate(schedule.rows):
        for step, action in enumerate(row):
            for part in action.parts:
                yield rank, step, part


def _name(payload: Payload, stage: int, microbatch: int) -> str:
    return f"the {payload} of {stage}{'F' if payload == 'activation' else 'B'}{microbatch}"


def _program(rank: int, row: tuple[Action, ...], moves: dict[tuple[int, int], list[_Move]]) -> Program:
    """Rules 1 to 4 for one rank; slot k stands before action k, the last one after all of them."""
    sends, receives, arrivals, releases = (defaultdict[int, list[Transfer]](list) for _ in range(4))
    for (source, target), channel in moves.items():
        if source == rank:
            answers = moves.get((target, source), [])
            for move, slot in zip(channel, _release_slots(channel, answers, end=len(row)), strict=True):
                sends[move.sent + 1].append(move.transfer)
                releases[slot].append(move.transfer)
        elif target == rank:
            for move, slot in zip(channel, _receive_slots(channel), strict=True):
                receives[slot].append(move.transfer)
                arrivals[move.used].append(move.transfer)
    program: list[Instruction] = []
    for slot in range(len(row) + 1):
        if batch := (*sends.get(slot, ()), *receives.get(slot, ())):
            program.append(Post(batch))
        program += map(Wait, (*arrivals.get(slot, ()), *releases.get(slot, ())))
        if slot < len(row):
            program.append(Run(row[slot]))
    return tuple(program)


def _receive_slots(channel: list[_Move]) -> list[int]:
    """Rules 2 and 3: one action ahead of its use, and of the use of all that is sent after it."""
    first_use = channel[-1].used
    slots = []
    for move in reversed(channel):
        first_use = min(first_use, move.used)
        slots.append(max(first_use - 1, 0))
    return slots[::-1]


def _release_slots(channel: list[_Move], answers: list[_Move], end: int) -> list[int]:
    """Rule 4: for each send the first slot in which an answer, sent after its use, is waited for."""
    pending = sorted(answers, key=lambda answer: answer.sent)
    slots = {}
    first = end
    for move in sorted(channel, key=lambda move: move.used, reverse=True):
        while pending and pending[-1].sent >= move.used:
            first = min(first, pending.pop().used)
        slots[move.transfer] = max(first, move.sent + 1)
    return [slots[move.transfer] for move in channel]
