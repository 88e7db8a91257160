"""Would this schedule run? Complete, placed, ordered, its transfers paired, and no deadlock."""

from __future__ import annotations

from collections import defaultdict

from counterflow.errors import ScheduleError
from counterflow.schedule.action import Action, Kind
from counterflow.schedule.schedule import Schedule
from counterflow.schedule.transfers import Post, Run, Transfer, Transfers, Wait, lower, needs, produces

Place = tuple[int, int]
"""Rank and step; both count from 0."""


def check(schedule: Schedule) -> Transfers:
    """Prove that ``schedule`` runs to its end, and return the transfers for which it is proven.

    Every stage has one forward of every micro-batch and, in mode ``train``, one B or one I and one W, all on
    one rank and in this order; whatever an action needs is made, sent and received; and no ranks wait
    for each other in a circle when posts do not block and a wait ends once both sides have posted.

    Raises:
        ScheduleError: the first rule broken, with rank, step and action; for a deadlock with the wait cycle.

    Example:
        >>> from counterflow import Schedule, check, dualpipe
        >>> transfers = check(dualpipe(8, 20))
        >>> from counterflow.schedule import from_text
        >>> check(from_text("0F0 0B0\\n1B0 1F0"))
        Traceback (most recent call last):
        ...
        counterflow.errors.ScheduleError: rank 1, step 0: 1B0 stands before its forward 1F0; move it behind
    """
    _require_whole(schedule)
    transfers = lower(schedule)
    check_transfers(transfers)
    return transfers


def check_transfers(transfers: Transfers) -> None:
    """Prove that the programs pair every send with a receive in the same order, and do not deadlock.

    That the programs compute the schedule's rows and wait before they use is ``lower``'s own doing, and not looked at.

    Raises:
        ScheduleError: naming the channel and the first transfer out of order, or the wait cycle.
    """
    _require_paired(transfers)
    _require_progress(transfers)


def _require_whole(schedule: Schedule) -> None:
    """Complete, on one rank, in order."""
    places = _places(schedule)
    chains = defaultdict[tuple[int, int], list[Action]](list)
    for part in places:
        chains[part.stage, part.microbatch].append(part)
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            chain = _chain(schedule, chains[stage, microbatch], stage, microbatch)
            for earlier, later in zip(chain, chain[1:], strict=False):
                _require_order(places, earlier, later)
    for part, (rank, _) in places.items():
        need = needs(part, schedule.num_stages)
        if need is None:
            continue
        payload, stage = need
        made = next(action for action in chains[stage, part.microbatch] if produces(action) == payload)
        # Across ranks the wait enforces the order; on one rank only the row can.
        if places[made][0] == rank:
            _require_order(places, made, part)


def _places(schedule: Schedule) -> dict[Action, Place]:
    places: dict[Action, Place] = {}
    for rank, row in enumerate(schedule.rows):
        for step, action in enumerate(row):
            for part in action.parts:
                if part in places:
                    before, at = places[part]
                    raise ScheduleError(
                        f"rank {rank}, step {step}: {part} already stands at rank {before}, step {at}; remove one"
                    )
                places[part] = rank, step
    return places


def _chain(schedule: Schedule, found: list[Action], stage: int, microbatch: int) -> list[Action]:
    """The actions of one stage and micro-batch in the order they need: F; then B, or I and W."""
    found = sorted(found, key=lambda action: "FBIW".index(action.kind))
    kinds = "".join(action.kind for action in found)
    legal = ("F",) if schedule.mode == "forward" else ("FB", "FIW")
    if kinds not in legal:
        raise ScheduleError(
            f"stage {stage}, micro-batch {microbatch} has {', '.join(map(str, found)) or 'no action'}; it needs "
            + ("one F" if schedule.mode == "forward" else "one F, and one B or one I and one W")
        )
    return found


def _require_order(places: dict[Action, Place], earlier: Action, later: Action) -> None:
    rank, step = places[later]
    before, at = places[earlier]
    if before != rank:
        raise ScheduleError(
            f"rank {rank}, step {step}: {later} stands on another rank than {_as_seen_from(later, earlier)} "
            f"(rank {before}); a stage does all its work for a micro-batch on one rank"
        )
    if at >= step:
        raise ScheduleError(
            f"rank {rank}, step {step}: {later} stands before {_as_seen_from(later, earlier)}; move it behind"
        )


_WORDS = {Kind.F: "forward", Kind.I: "backward for input"}


def _as_seen_from(later: Action, earlier: Action) -> str:
    if earlier.stage == later.stage:
        return f"its {_WORDS[earlier.kind]} {earlier}"
    return f"{earlier}, whose {produces(earlier)} it needs"


def _require_paired(transfers: Transfers) -> None:
    """On each channel the receives are posted in the order of the sends, and each is waited for on both sides."""
    sent, received = defaultdict[Place, list[Transfer]](list), defaultdict[Place, list[Transfer]](list)
    for rank, program in enumerate(transfers.programs):
        posted: set[Transfer] = set()
        waited: set[Transfer] = set()
        for instruction in program:
            if isinstance(instruction, Post):
                for transfer in instruction.transfers:
                    if transfer in posted or rank not in (transfer.source, transfer.target):
                        again = "a second time" if transfer in posted else "without being one of its two ends"
                        raise ScheduleError(f"rank {rank} posts {transfer} {again}; remove that post")
                    side = sent if transfer.source == rank else received
                    side[transfer.source, transfer.target].append(transfer)
                    posted.add(transfer)
            elif isinstance(instruction, Wait):
                transfer = instruction.transfer
                if transfer not in posted:
                    raise ScheduleError(f"rank {rank} waits for {transfer} without posting it before; post it ahead")
                if transfer in waited:
                    raise ScheduleError(f"rank {rank} waits for {transfer} a second time; remove that wait")
                waited.add(transfer)
        for transfer in sorted(posted - waited, key=str):
            raise ScheduleError(f"rank {rank} posts {transfer} and never waits for it; add a wait")
    for channel in sorted(sent | received):
        ours, theirs = sent[channel], received[channel]
        for index in range(max(len(ours), len(theirs))):
            send, receive = (side[index] if index < len(side) else None for side in (ours, theirs))
            if send != receive:
                raise ScheduleError(
                    f"ranks {channel[0]} to {channel[1]}: message {index} is sent as {send or 'nothing'} and received "
                    f"as {receive or 'nothing'}; channels are first-in first-out, so post both in the same order"
                )


class _Walk:
    """How far one rank has come through its program."""

    def __init__(self, program: tuple[Post | Wait | Run, ...]) -> None:
        self.program = program
        self.at = 0

    @property
    def blocked_on(self) -> Transfer | None:
        """The transfer that it waits for; None at the end."""
        if self.at == len(self.program):
            return None
        instruction = self.program[self.at]
        assert isinstance(instruction, Wait)
        return instruction.transfer

    @property
    def next_action(self) -> str:
        """Step and action that it has come to."""
        step = sum(isinstance(instruction, Run) for instruction in self.program[: self.at])
        coming = next((i.action for i in self.program[self.at :] if isinstance(i, Run)), None)
        return f"at step {step} ({coming})" if coming else "at the end"


def _require_progress(transfers: Transfers) -> None:
    """Walk all programs as far as they go; what is left then is a deadlock."""
    walks = [_Walk(program) for program in transfers.programs]
    posts: dict[Transfer, int] = defaultdict(int)
    waiting: dict[Transfer, set[int]] = defaultdict(set)
    ready = list(range(len(walks)))
    while ready:
        rank = ready.pop()
        walk = walks[rank]
        while walk.at < len(walk.program):
            instruction = walk.program[walk.at]
            if isinstance(instruction, Post):
                for transfer in instruction.transfers:
                    posts[transfer] += 1
                    if posts[transfer] == 2:
                        ready += waiting.pop(transfer, ())
            elif isinstance(instruction, Wait) and posts[instruction.transfer] < 2:
                waiting[instruction.transfer].add(rank)
                break
            walk.at += 1
    stuck = {rank: blocked for rank, walk in enumerate(walks) if (blocked := walk.blocked_on)}
    if stuck:
        raise ScheduleError(_describe_cycle(walks, stuck))


def _describe_cycle(walks: list[_Walk], stuck: dict[int, Transfer]) -> str:
    rank = min(stuck)
    path: list[int] = []
    while rank not in path:
        path.append(rank)
        transfer = stuck[rank]
        # The other end has not posted it yet, so it is stuck as well.
        rank = transfer.source if transfer.target == rank else transfer.target
    cycle = path[path.index(rank) :]
    links = [f"rank {member} {walks[member].next_action} waits for {stuck[member]}" for member in cycle]
    return f"deadlock: {'; '.join(links)}; these wait for each other in a circle: reorder one of their rows"
