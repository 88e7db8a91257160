"""What becomes of rows and programs when they are simply tried: slow interpreters that owe nothing to `check`.

Tensors are tokens that say what they are. Channels carry them untagged, first-in first-out: a receiver finds out what
it got when it looks. Whatever could happen next is written down, one of it is done, and so on until nothing can.
The answer is a sentence that says why not, or "" where all goes well.
"""

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from counterflow import Action, Schedule
from counterflow.schedule import Kind, Post, Transfer, Wait
from counterflow.schedule.transfers import Program

MODELS = ("rendezvous", "buffered", "nccl", "nccl-pair")

Token = tuple[str, int, int]
"""What it is ("activation", "gradient", or "input gradient done"), the stage that made it, the micro-batch."""


class TroubleError(Exception):
    """It does not run, and this is why."""


# --- actions ------------------------------------------------------------------------------------------------


def needs_of_neighbours(part: Action, num_stages: int) -> list[Token]:
    """What a part takes from the stage before or behind it; it may come from another rank."""
    if part.kind is Kind.F and part.stage != 0:
        return [("activation", part.stage - 1, part.microbatch)]
    if part.kind in (Kind.B, Kind.I) and part.stage != num_stages - 1:
        return [("gradient", part.stage + 1, part.microbatch)]
    return []


def needs_of_itself(part: Action) -> list[Token]:
    """What an earlier part of the same stage must have left on this very rank."""
    if part.kind in (Kind.B, Kind.I):
        return [("activation", part.stage, part.microbatch)]
    if part.kind is Kind.W:
        return [("input gradient done", part.stage, part.microbatch)]
    return []


def made_by(part: Action) -> list[Token]:
    if part.kind is Kind.F:
        return [("activation", part.stage, part.microbatch)]
    if part.kind is Kind.B:
        return [("gradient", part.stage, part.microbatch)]
    if part.kind is Kind.I:
        return [("gradient", part.stage, part.microbatch), ("input gradient done", part.stage, part.microbatch)]
    return []


# --- rows ---------------------------------------------------------------------------------------------------


def why_rows_fail(schedule: Schedule) -> str:
    """Every rank takes its next action once all that it needs was made by anybody; mail is instant and free."""
    try:
        _is_complete_and_placed(schedule)
        _everybody_gets_through(schedule)
    except TroubleError as trouble:
        return str(trouble)
    return ""


def runs_as_rows(schedule: Schedule) -> bool:
    return not why_rows_fail(schedule)


def why_incomplete(schedule: Schedule) -> str:
    """Whether every stage does all that it has to do for a micro-batch once and on one rank, in whatever order."""
    try:
        _is_complete_and_placed(schedule)
    except TroubleError as trouble:
        return str(trouble)
    return ""


def _is_complete_and_placed(schedule: Schedule) -> None:
    allowed = [Counter("F")] if schedule.mode == "forward" else [Counter("FB"), Counter("FIW")]
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            kinds, ranks = Counter(), set()
            for rank, row in enumerate(schedule.rows):
                for action in row:
                    for part in action.parts:
                        if (part.stage, part.microbatch) == (stage, microbatch):
                            kinds[part.kind.value] += 1
                            ranks.add(rank)
            if kinds not in allowed:
                raise TroubleError(f"stage {stage}, micro-batch {microbatch} has {dict(kinds)}")
            if len(ranks) != 1:
                raise TroubleError(f"stage {stage}, micro-batch {microbatch} is on ranks {sorted(ranks)}")


def _everybody_gets_through(schedule: Schedule) -> None:
    left = [deque(row) for row in schedule.rows]
    made_anywhere: set[Token] = set()
    made_here: list[set[Token]] = [set() for _ in left]

    def can_go(rank: int) -> bool:
        return bool(left[rank]) and all(
            made_anywhere.issuperset(needs_of_neighbours(part, schedule.num_stages))
            and made_here[rank].issuperset(needs_of_itself(part))
            for part in left[rank][0].parts
        )

    while ready := [rank for rank in range(len(left)) if can_go(rank)]:
        for rank in ready:
            for part in left[rank].popleft().parts:
                made_here[rank].update(made_by(part))
                made_anywhere.update(made_by(part))
    stuck = {rank: str(row[0]) for rank, row in enumerate(left) if row}
    if stuck:
        raise TroubleError(f"nothing goes on; the next of each rank are {stuck}")


def most_activations_held(row: tuple[Action, ...]) -> int:
    """Count them: F stores one, B or W lets it go; an F&B has stored before it lets go."""
    held: set[tuple[int, int]] = set()
    most = 0
    for action in row:
        for part in action.parts:
            if part.kind is Kind.F:
                held.add((part.stage, part.microbatch))
                most = max(most, len(held))
        for part in action.parts:
            if part.kind in (Kind.B, Kind.W):
                held.discard((part.stage, part.microbatch))
    return most


# --- programs -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Operation:
    """One side of one message: what this rank calls it, and what went on the wire if it is the sender."""

    rank: int
    called: Transfer
    token: Token | None
    kernel: "Kernel"
    moved: bool = False
    waited: bool = False

    @property
    def channel(self) -> tuple[int, int]:
        return self.called.source, self.called.target


@dataclass(eq=False)
class Kernel:
    """Operations of one rank that start and end together."""

    operations: list[Operation] = field(default_factory=list)
    started: bool = False
    ended: bool = False


class World:
    """Ranks with their programs, and everything that is under way between them."""

    def __init__(self, schedule: Schedule, programs: tuple[Program, ...], channels: str) -> None:
        assert channels in MODELS
        self.channels = channels
        self.schedule = schedule
        if len(programs) != len(schedule.rows):
            raise TroubleError(f"{len(programs)} programs for {len(schedule.rows)} rows")
        self.rows_left = [deque(row) for row in schedule.rows]
        self.left = [deque(program) for program in programs]
        self.made: list[set[Token]] = [set() for _ in programs]
        self.hands: list[set[Token]] = [set() for _ in programs]
        self.sends: dict[tuple[int, int], list[Operation]] = defaultdict(list)
        self.receives: dict[tuple[int, int], list[Operation]] = defaultdict(list)
        self.operations: list[list[Operation]] = [[] for _ in programs]
        self.queues: dict[tuple[object, ...], deque[Kernel]] = defaultdict(deque)

    # What can happen next

    def moves(self) -> list[Callable[[], None]]:
        """Everything that could be the next thing to happen."""
        found: list[Callable[[], None]] = []
        for rank, program in enumerate(self.left):
            if program and self.is_free(rank):
                found.append(lambda rank=rank: self.step(rank))
        for queue in self.queues.values():
            if not queue:
                continue
            first = queue[0]
            if not first.started:
                found.append(lambda kernel=first: self.start(kernel))
            elif all(operation.moved for operation in first.operations):
                found.append(lambda queue=queue: self.end(queue))
            for operation in first.operations:
                if first.started and not operation.moved and self.partner_is_there(operation):
                    found.append(lambda operation=operation: self.move(operation))
        return found

    def is_free(self, rank: int) -> bool:
        """Whether the rank's next instruction does not block."""
        instruction = self.left[rank][0]
        if not isinstance(instruction, Wait):
            return True
        operation = self.posted(rank, instruction.transfer)
        return operation.kernel.ended

    def partner(self, operation: Operation) -> Operation | None:
        """The n-th that was sent meets the n-th that is to be received, whatever either side calls it."""
        sends, receives = self.sends[operation.channel], self.receives[operation.channel]
        mine, others = (sends, receives) if operation in sends else (receives, sends)
        place = mine.index(operation)
        return others[place] if place < len(others) else None

    def partner_is_there(self, operation: Operation) -> bool:
        if self.channels == "buffered" and operation.token is not None:
            return True
        partner = self.partner(operation)
        return partner is not None and partner.kernel.started

    # What happens

    def start(self, kernel: Kernel) -> None:
        kernel.started = True

    def move(self, operation: Operation) -> None:
        operation.moved = True

    def end(self, queue: deque[Kernel]) -> None:
        queue.popleft().ended = True

    def step(self, rank: int) -> None:
        instruction = self.left[rank].popleft()
        if isinstance(instruction, Post):
            self.post(rank, instruction)
        elif isinstance(instruction, Wait):
            self.wait(rank, instruction.transfer)
        else:
            self.run(rank, instruction.action)

    def post(self, rank: int, post: Post) -> None:
        kernels: dict[object, Kernel] = {}
        for transfer in post.transfers:
            if transfer.source == transfer.target or rank not in (transfer.source, transfer.target):
                raise TroubleError(f"rank {rank} posts {transfer}")
            if any(operation.called == transfer for operation in self.operations[rank]):
                raise TroubleError(f"rank {rank} posts {transfer} twice")
            token = None
            if rank == transfer.source:
                token = (transfer.payload, transfer.stage, transfer.microbatch)
                if token not in self.made[rank]:
                    raise TroubleError(f"rank {rank} posts {transfer} and has not made it")
            queue = self.queue_for(rank, transfer)
            kernel = kernels.setdefault(queue, Kernel())
            operation = Operation(rank, transfer, token, kernel)
            kernel.operations.append(operation)
            self.operations[rank].append(operation)
            (self.sends if token is not None else self.receives)[operation.channel].append(operation)
        for queue, kernel in kernels.items():
            self.queues[queue].append(kernel)

    def queue_for(self, rank: int, transfer: Transfer) -> tuple[object, ...]:
        """What has to be in order: all of a rank, all of a rank with one other, or nothing."""
        if self.channels == "nccl":
            return (rank,)
        if self.channels == "nccl-pair":
            return (rank, transfer.target if rank == transfer.source else transfer.source)
        return (rank, transfer)

    def posted(self, rank: int, transfer: Transfer) -> Operation:
        for operation in self.operations[rank]:
            if operation.called == transfer:
                return operation
        raise TroubleError(f"rank {rank} waits for {transfer} and has not posted it")

    def wait(self, rank: int, transfer: Transfer) -> None:
        operation = self.posted(rank, transfer)
        if operation.waited:
            raise TroubleError(f"rank {rank} waits for {transfer} twice")
        operation.waited = True
        if operation.token is None:
            partner = self.partner(operation)
            assert partner is not None
            wanted = (transfer.payload, transfer.stage, transfer.microbatch)
            if partner.token != wanted:
                raise TroubleError(f"rank {rank} waited for {transfer} and finds {partner.token} in its hands")
            self.hands[rank].add(wanted)

    def run(self, rank: int, action: Action) -> None:
        if not self.rows_left[rank] or self.rows_left[rank].popleft() != action:
            raise TroubleError(f"rank {rank} runs {action}, which is not the next of its row")
        for part in action.parts:
            for token in needs_of_neighbours(part, self.schedule.num_stages):
                if token not in self.hands[rank] | self.made[rank]:
                    raise TroubleError(f"rank {rank} runs {action} and has no {token}")
            for token in needs_of_itself(part):
                if token not in self.made[rank]:
                    raise TroubleError(f"rank {rank} runs {action} and has no {token}")
        for part in action.parts:
            self.made[rank].update(made_by(part))

    # How it ends

    def finish(self) -> None:
        """Nothing goes on: raise unless all is done and nothing is left lying about."""
        stuck = {rank: str(program[0]) for rank, program in enumerate(self.left) if program}
        if stuck:
            raise TroubleError(f"deadlock; the next of each rank are {stuck}")
        for rank, row in enumerate(self.rows_left):
            if row:
                raise TroubleError(f"rank {rank} never ran {row[0]}")
        for rank, operations in enumerate(self.operations):
            for operation in operations:
                if not operation.waited:
                    raise TroubleError(f"rank {rank} never waited for {operation.called}")
        for channel in self.sends.keys() | self.receives.keys():
            if len(self.sends[channel]) != len(self.receives[channel]):
                raise TroubleError(f"channel {channel} has {len(self.sends[channel])} sends and other receives")


def left_alone(schedule: Schedule, programs: tuple[Program, ...], channels: str, rng: random.Random | None) -> World:
    """The world when nothing can happen any more: the first that can is done each time, or with ``rng`` any of it."""
    world = World(schedule, programs, channels)
    while moves := world.moves():
        (rng.choice(moves) if rng else moves[0])()
    return world


def why_programs_fail(
    schedule: Schedule, programs: tuple[Program, ...], channels: str, rng: random.Random | None = None
) -> str:
    """Do what can be done until nothing can, and look at what is left."""
    try:
        left_alone(schedule, programs, channels, rng).finish()
    except TroubleError as trouble:
        return str(trouble)
    return ""


def runs_as_programs(
    schedule: Schedule, programs: tuple[Program, ...], channels: str, rng: random.Random | None = None
) -> bool:
    return not why_programs_fail(schedule, programs, channels, rng)
