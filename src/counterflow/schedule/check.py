"""Would this schedule run? Whole, its transfers paired, within memory, and no deadlock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, repeat, zip_longest
from typing import NoReturn

import numpy as np

from counterflow.errors import ScheduleError
from counterflow.schedule.activations import held_activations
from counterflow.schedule.grid import Place, marked
from counterflow.schedule.lowering import lower
from counterflow.schedule.progress import MOVED, Channels, Progress, walk
from counterflow.schedule.rows import Ints
from counterflow.schedule.schedule import Schedule
from counterflow.schedule.transfers import (
    JOIN,
    POST,
    RUN,
    WAIT,
    Instruction,
    Post,
    Program,
    Programs,
    Run,
    Transfer,
    Transfers,
    Wait,
)


def check(schedule: Schedule, channels: Channels = "rendezvous", most_activations: int | None = None) -> Transfers:
    """Prove that ``schedule`` runs to its end, and return the transfers for which it is proven.

    Every stage has one forward of every micro-batch and, in mode ``train``, one B or one I and one W, all on
    one rank and in this order; whatever an action needs is made, sent and received; no ranks wait for each other
    in a circle over ``channels`` (see ``Channels`` for the models; the runtime's are ``rendezvous``); and no rank
    holds more than ``most_activations`` at once, where that is given.

    Raises:
        ScheduleError: the first rule broken, with rank, step and action; for a deadlock with the wait cycle. Its note
            shows the cells in question in their rows.

    Example:
        >>> from counterflow import check, dualpipe
        >>> transfers = check(dualpipe(8, 20), most_activations=9)
        >>> from counterflow.schedule import from_text
        >>> check(from_text("0F0 0B0\\n1B0 1F0"))
        Traceback (most recent call last):
        ...
        counterflow.errors.ScheduleError: rank 1, step 0: 1B0 stands before its forward 1F0; move it behind
          rank 1, steps 0 to 1:>1B0<>1F0<
    """
    transfers = lower(schedule)
    programs = transfers.columns
    _require_progress(schedule, programs.first, programs.ops, programs, channels)
    if most_activations is not None:
        _require_memory(schedule, most_activations)
    return transfers


def check_transfers(transfers: Transfers, channels: Channels = "rendezvous") -> None:
    """Prove of programs, from wherever they come, that they compute their schedule and do not deadlock.

    Each rank runs its row in order; before an action it waits for what the action needs; after one it sends what
    others need of it; sends and receives of a channel are posted in the same order, each is waited for once.

    Raises:
        ScheduleError: the schedule is not whole; or the rank, step or channel of the first rule that the programs
            break; or the wait cycle.

    Example:
        >>> from counterflow import one_f_one_b
        >>> from counterflow.schedule import Transfers, check_transfers, lower
        >>> transfers = lower(one_f_one_b(2, 1))
        >>> check_transfers(transfers)
        >>> first, second = transfers.programs
        >>> check_transfers(Transfers(transfers.schedule, (first, second[1:])))
        Traceback (most recent call last):
        ...
        counterflow.errors.ScheduleError: rank 1 waits for the activation of 0F0 from rank 0 to 1 without posting it \
before; post it ahead
          rank 1, steps 0 to 1:>1F0< 1B0
    """
    schedule = transfers.schedule
    whole = lower(schedule).columns
    if len(transfers.programs) != schedule.num_ranks:
        raise ScheduleError(
            f"the schedule has {schedule.num_ranks} ranks and got {len(transfers.programs)} programs; give one for each"
        )
    known = whole.transfers()
    for rank, program in enumerate(transfers.programs):
        _require_posts(schedule, rank, program)
    _require_paired(schedule, transfers.programs)
    made_by, used_by = (column // 2 for column in (whole.made_by, whole.used_by))
    ends = dict(zip(known, zip(made_by.tolist(), used_by.tolist(), strict=True), strict=True))
    for rank, program in enumerate(transfers.programs):
        _require_row(schedule, rank, program)
        _require_flow(schedule, rank, program, ends)
    first, ops = _encode(schedule, transfers.programs, known)
    _require_progress(schedule, first, ops, whole, channels)


def _refuse(schedule: Schedule, sentence: str, *places: Place) -> NoReturn:
    raise marked(ScheduleError(sentence), schedule, places)


def _stepped(program: Program) -> Iterator[tuple[int, Instruction]]:
    """The instructions, each with the step that its rank has come to."""
    step = 0
    for instruction in program:
        yield step, instruction
        step += isinstance(instruction, Run)


def _require_posts(schedule: Schedule, rank: int, program: Program) -> None:
    """Each transfer that the rank posts is its own, posted once, and waited for once and behind its post."""
    posted: dict[Transfer, int] = {}
    waited: set[Transfer] = set()
    for step, instruction in _stepped(program):
        if isinstance(instruction, Post):
            for transfer in instruction.transfers:
                if transfer in posted or rank not in (transfer.source, transfer.target):
                    again = "a second time" if transfer in posted else "without being one of its two ends"
                    _refuse(schedule, f"rank {rank} posts {transfer} {again}; remove that post", (rank, step))
                posted[transfer] = step
        elif isinstance(instruction, Wait):
            transfer = instruction.transfer
            if transfer not in posted:
                _refuse(
                    schedule,
                    f"rank {rank} waits for {transfer} without posting it before; post it ahead",
                    (rank, step),
                )
            if transfer in waited:
                _refuse(schedule, f"rank {rank} waits for {transfer} a second time; remove that wait", (rank, step))
            waited.add(transfer)
    for transfer, step in posted.items():
        if transfer not in waited:
            _refuse(schedule, f"rank {rank} posts {transfer} and never waits for it; add a wait", (rank, step))


def _require_paired(schedule: Schedule, programs: Sequence[Program]) -> None:
    """On each channel the receives are posted in the order of the sends."""
    sent, received = (defaultdict[tuple[int, int], list[tuple[Transfer, Place]]](list) for _ in range(2))
    for rank, program in enumerate(programs):
        for step, instruction in _stepped(program):
            for transfer in instruction.transfers if isinstance(instruction, Post) else ():
                side = sent if transfer.source == rank else received
                side[transfer.source, transfer.target].append((transfer, (rank, step)))
    for channel in sorted(sent | received):
        for index, (ours, theirs) in enumerate(zip_longest(sent[channel], received[channel], fillvalue=None)):
            send, receive = (side and side[0] for side in (ours, theirs))
            if send != receive:
                _refuse(
                    schedule,
                    f"ranks {channel[0]} to {channel[1]}: message {index} is sent as {send or 'nothing'} and received "
                    f"as {receive or 'nothing'}; channels are first-in first-out, so post both in the same order",
                    *(side[1] for side in (ours, theirs) if side),
                )


def _require_row(schedule: Schedule, rank: int, program: Program) -> None:
    """The rank computes its row."""
    row = schedule.rows[rank]
    runs = [instruction.action for instruction in program if isinstance(instruction, Run)]
    for step, (computed, wanted) in enumerate(zip_longest(runs, row)):
        if computed != wanted:
            _refuse(
                schedule,
                f"rank {rank}, step {step}: the program runs {computed or 'nothing'} where the row has "
                f"{wanted or 'nothing'}; run the row in its order",
                (rank, step),
            )


def _require_flow(schedule: Schedule, rank: int, program: Program, ends: dict[Transfer, tuple[int, int]]) -> None:
    """What an action needs has been waited for; what it makes for others is sent, and not before."""
    base = int(schedule.rows.first[rank])
    waited: dict[Transfer, int] = {}
    for step, instruction in _stepped(program):
        if isinstance(instruction, Wait):
            waited[instruction.transfer] = step
        elif isinstance(instruction, Post):
            for transfer in instruction.transfers:
                if transfer not in ends:
                    _refuse(schedule, f"rank {rank} posts {transfer}, which nobody needs; remove it", (rank, step))
                made = ends[transfer][0] - base
                if transfer.source == rank and made >= step:
                    _refuse(
                        schedule,
                        f"rank {rank}, step {step}: {transfer} is sent before step {made} makes it; send it behind",
                        (rank, step),
                        (rank, made),
                    )
    for transfer, (_, used_by) in ends.items():
        used = used_by - base
        if transfer.target == rank and waited.get(transfer, used + 1) > used:
            _refuse(
                schedule,
                f"rank {rank}, step {used}: {schedule.rows.action(used_by)} does not wait for {transfer}; "
                "wait for it ahead of that action",
                (rank, used),
            )


def _encode(schedule: Schedule, programs: Sequence[Program], known: list[Transfer]) -> tuple[Ints, Ints]:
    """The programs as integers: see ``Programs``."""
    numbers = {transfer: number for number, transfer in enumerate(known)}
    first, ops = [0], list[int]()
    actions = iter(range(schedule.rows.num_actions))
    for program in programs:
        for instruction in program:
            if isinstance(instruction, Run):
                ops.append(4 * next(actions) + RUN)
            elif isinstance(instruction, Wait):
                ops.append(4 * numbers[instruction.transfer] + WAIT)
            else:
                tags = chain([POST], repeat(JOIN))
                ops += [4 * numbers[transfer] + tag for transfer, tag in zip(instruction.transfers, tags, strict=False)]
        first.append(len(ops))
    return np.array(first, dtype=np.int64), np.array(ops, dtype=np.int64)


def _require_progress(schedule: Schedule, first: Ints, ops: Ints, whole: Programs, channels: Channels) -> None:
    """All ranks come to the end of their programs."""
    source, target = whole.source, whole.target
    reached = walk(first, ops, source, target, channels)
    stuck = np.flatnonzero(reached.at < first[1:])
    if not len(stuck):
        return
    known = whole.transfers()
    links: dict[int, tuple[int, str]] = {}
    places: dict[int, Place] = {}
    rank = int(stuck[0])
    while rank not in links:
        waited = int(ops[reached.at[rank]]) // 4
        ahead = _head(2 * waited + int(target[waited] == rank), reached)
        done = ops[first[rank] : reached.at[rank]]
        step = int((done % 4 == RUN).sum())
        places[rank] = rank, step
        row = schedule.rows[rank]
        coming = f"at step {step} ({row[step]})" if step < len(row) else "at the end"
        queue = "" if waited == ahead else f", behind {known[ahead]} in its queue"
        # The other end has not posted what is ahead, or has it in a queue that does not move, so it is stuck as well.
        other = int(source[ahead] if target[ahead] == rank else target[ahead])
        its_side = 2 * ahead + int(target[ahead] == other)
        its_head = _head(its_side, reached) if reached.posted[its_side] else ahead
        if its_head != ahead:
            queue += f", which rank {other} has behind {known[its_head]}"
        links[rank] = other, f"rank {rank} {coming} waits for {known[waited]}{queue}"
        rank = other
    cycle = list(links)[list(links).index(rank) :]
    _refuse(
        schedule,
        f"deadlock: {'; '.join(links[member][1] for member in cycle)}; these wait for each other in a circle: "
        "reorder one of their rows",
        *(places[member] for member in cycle),
    )


def _head(side: int, reached: Progress) -> int:
    """The transfer that holds up the queue in which ``side`` stands; its own where that is at the head."""
    kernel = int(reached.kernel_of[side])
    while (ahead := int(reached.previous[kernel])) >= 0 and reached.open_[ahead] > 0:
        kernel = ahead
    members = np.flatnonzero(reached.kernel_of == kernel)
    still = members[reached.posted[members] != MOVED]
    return side // 2 if side in still or not len(still) else int(still[0]) // 2


def _require_memory(schedule: Schedule, most_activations: int) -> None:
    if most_activations < 0:
        raise ScheduleError(f"most_activations got {most_activations}; give a number from 0")
    held = held_activations(schedule.rows)
    over = np.flatnonzero(held > most_activations)
    if len(over):
        rank, step = schedule.rows.place(int(over[0]))
        _refuse(
            schedule,
            f"rank {rank}, step {step}: {schedule.rows.action(int(over[0]))} would be activation {held[over[0]]} on "
            f"its rank and {most_activations} are allowed; let a backward come first, or allow {held.max()}",
            (rank, step),
        )
