"""A schedule's communication made explicit: what check, simulator and executor share.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, overload

from counterflow.schedule.action import Action, Kind
from counterflow.schedule.rows import F, Ints, Rows
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
        made = f"{self.stage}{'F' if self.payload == 'activation' else 'B'}{self.microbatch}"
        return f"the {self.payload} of {made} from rank {self.source} to {self.target}"


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


RUN, POST, JOIN, WAIT = range(4)
"""The tags of an instruction's integer, ``4 * index + tag``: index of an action or a transfer; JOIN posts one more in
the batch that a POST opened."""


@dataclass(frozen=True, eq=False)
class Programs(Sequence[Program]):
    """The programs of all ranks: ``programs[rank]`` is a tuple of instructions, made when it is asked for.

    Beneath are int64 columns. ``ops`` has the instructions of all ranks behind one another, rank r's from
    ``first[r]`` up to ``first[r + 1]``. Transfers are numbered in the order of their senders' rows: shape [transfers]
    have ``made_by`` and ``used_by``, the parts of ``rows`` at their two ends (part 2a or 2a + 1 of action a), and
    ``before`` and ``after``, their neighbours on the same channel, or -1.
    """

    rows: Rows
    first: Ints
    ops: Ints
    made_by: Ints
    used_by: Ints
    before: Ints
    after: Ints

    @property
    def num_transfers(self) -> int:
        """The messages of a step."""
        return len(self.made_by)

    @property
    def source(self) -> Ints:
        """For each transfer the rank that sends it, shape [transfers]."""
        return self.rows.rank[self.made_by // 2]

    @property
    def target(self) -> Ints:
        """For each transfer the rank that receives it, shape [transfers]."""
        return self.rows.rank[self.used_by // 2]

    def transfers(self) -> list[Transfer]:
        """Every transfer, in the order of their numbers."""
        kind, stage, microbatch = (column.reshape(-1)[self.made_by].tolist() for column in self.rows.parts)
        return [
            Transfer("activation" if code == F else "gradient", *rest)
            for code, *rest in zip(kind, stage, microbatch, self.source.tolist(), self.target.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, rank: int) -> Program: ...

    @overload
    def __getitem__(self, rank: slice) -> tuple[Program, ...]: ...

    def __getitem__(self, rank: int | slice) -> Program | tuple[Program, ...]:
        if isinstance(rank, slice):
            return tuple(self)[rank]
        return self._decoded[rank]

    def __iter__(self) -> Iterator[Program]:
        return iter(self._decoded)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _decoded(self) -> tuple[Program, ...]:
        transfers = self.transfers()
        first = self.first.tolist()
        return tuple(
            self._decode(self.ops[start:end].tolist(), iter(row), transfers)
            for start, end, row in zip(first, first[1:], self.rows, strict=False)
        )

    def _decode(self, ops: list[int], row: Iterator[Action], transfers: list[Transfer]) -> Program:
        program: list[Instruction] = []
        batch: list[Transfer] = []
        for op in ops:
            index, tag = divmod(op, 4)
            if tag != JOIN and batch:
                program.append(Post(tuple(batch)))
                batch = []
            if tag == RUN:
                program.append(Run(next(row)))
            elif tag == WAIT:
                program.append(Wait(transfers[index]))
            else:
                batch.append(transfers[index])
        return (*program, Post(tuple(batch))) if batch else tuple(program)


@dataclass(frozen=True)
class Transfers:
    """For each rank its program, lowered from ``schedule``."""

    schedule: Schedule
    programs: Sequence[Program]

    @property
    def columns(self) -> Programs:
        """The programs as integers, which those that ``lower`` wrote are beneath."""
        assert isinstance(self.programs, Programs), "only what lower wrote has columns"
        return self.programs


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
