"""Schedules and programs with a few random changes, some harmless and some not; a seed says which ones.

`mutant(seed)` is the same on every run of the same code. `str(mutant(seed))` shows it in full, for a generator or a
change that is added later shifts what a seed means.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

from counterflow import Action, Schedule
from counterflow.errors import ScheduleError
from counterflow.schedule import GENERATORS, Kind, Post, Run, Transfer, Transfers, Wait, lower
from counterflow.schedule.transfers import Instruction, Program
from schedule.channels import Token, made_by, needs_of_neighbours
from strategies import random_runnable

MOST_RANKS, MOST_MICROBATCHES = 4, 8

Choice = TypeVar("Choice")
Rows = list[list[Action]]
Programs = list[list[Instruction]]


@dataclass(frozen=True)
class Mutant:
    """A changed schedule; or with ``programs`` a schedule and programs of which one is changed, or both are."""

    seed: int
    origin: str
    changes: tuple[str, ...]
    schedule: Schedule
    programs: tuple[Program, ...] | None = None

    @property
    def transfers(self) -> Transfers:
        assert self.programs is not None
        return Transfers(self.schedule, self.programs)

    def __str__(self) -> str:
        lines = [
            f"mutant({self.seed}): {self.origin}",
            f"S={self.schedule.num_stages} M={self.schedule.num_microbatches} {self.schedule.mode}",
            *(f"* {change}" for change in self.changes),
            str(self.schedule),
        ]
        for rank, program in enumerate(self.programs or ()):
            lines += [f"rank {rank}:", *(f"  {at}: {instruction}" for at, instruction in enumerate(program))]
        return "\n".join(lines)


class NothingToChangeError(Exception):
    """This change cannot be made here."""


def mutant(seed: int) -> Mutant:
    """Of ten seeds four have changed rows, five changed programs, one both."""
    rng = random.Random(seed)
    change = [_with_both, _with_changed_programs, *[_with_changed_rows, _with_changed_programs] * 4][seed % 10]
    while True:
        try:
            return change(seed, rng, *_origin(rng))
        except NothingToChangeError:
            continue


def _one_of(choices: Sequence[Choice], rng: random.Random) -> Choice:
    if not choices:
        raise NothingToChangeError
    return rng.choice(choices)


# --- where they come from -----------------------------------------------------------------------------------


@cache
def schedules_of(name: str) -> tuple[tuple[str, Schedule], ...]:
    """All that the generator makes within the sizes, each with the call that makes it."""
    found = []
    for num_ranks in range(1, MOST_RANKS + 1):
        for num_microbatches in range(1, MOST_MICROBATCHES + 1):
            try:
                schedule = GENERATORS[name](num_ranks, num_microbatches)
            except ScheduleError:
                continue
            found.append((f"{name}({num_ranks}, {num_microbatches})", schedule))
    return tuple(found)


def _origin(rng: random.Random) -> tuple[str, Schedule]:
    if rng.random() < 0.25:
        sizes = rng.randrange(2**32), rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 5), rng.random() < 0.7
        origin, schedule = f"random_runnable{sizes}", random_runnable(*sizes)
    else:
        origin, schedule = rng.choice(schedules_of(rng.choice(list(GENERATORS))))
    if rng.random() < 0.5:
        return f"{origin}.forward_only()", schedule.forward_only()
    return origin, schedule


# --- rows ---------------------------------------------------------------------------------------------------


def _with_changed_rows(seed: int, rng: random.Random, origin: str, schedule: Schedule) -> Mutant:
    rows = [list(row) for row in schedule.rows]
    limits = schedule.num_stages, schedule.num_microbatches
    changes = [rng.choice(ROW_CHANGES)(rows, limits, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    if not any(rows):
        raise NothingToChangeError
    if rng.random() < 0.03:
        limits = rng.choice([(limits[0] + 1, limits[1]), (limits[0], limits[1] + 1)])
        changes.append(f"stated {limits} as the numbers of stages and micro-batches")
    return Mutant(seed, origin, tuple(changes), Schedule(tuple(map(tuple, rows)), *limits, schedule.mode))


Limits = tuple[int, int]
"""The numbers of stages and micro-batches."""


def _some_action(rows: Rows, rng: random.Random) -> tuple[int, int]:
    places = [(rank, step) for rank, row in enumerate(rows) for step in range(len(row))]
    return _one_of(places, rng)


def swap_near(rows: Rows, limits: Limits, rng: random.Random) -> str:
    places = [(rank, step) for rank, row in enumerate(rows) for step in range(len(row) - 1)]
    rank, step = _one_of(places, rng)
    row = rows[rank]
    row[step], row[step + 1] = row[step + 1], row[step]
    return f"rank {rank}: swapped steps {step} and {step + 1}"


def swap_far(rows: Rows, limits: Limits, rng: random.Random) -> str:
    (rank, step), (to, at) = _some_action(rows, rng), _some_action(rows, rng)
    rows[rank][step], rows[to][at] = rows[to][at], rows[rank][step]
    return f"swapped rank {rank}, step {step} and rank {to}, step {at}"


def drop(rows: Rows, limits: Limits, rng: random.Random) -> str:
    rank, step = _some_action(rows, rng)
    return f"rank {rank}, step {step}: dropped {rows[rank].pop(step)}"


def duplicate(rows: Rows, limits: Limits, rng: random.Random) -> str:
    rank, step = _some_action(rows, rng)
    to = rng.choice([rank, rng.randrange(len(rows))])
    at = rng.randint(0, len(rows[to]))
    rows[to].insert(at, rows[rank][step])
    return f"rank {to}, step {at}: put {rows[to][at]} of rank {rank} there once more"


def move_in_row(rows: Rows, limits: Limits, rng: random.Random) -> str:
    rank, step = _some_action(rows, rng)
    action = rows[rank].pop(step)
    at = rng.choice([rng.randint(0, len(rows[rank])), min(step + rng.choice([1, 2, 3]), len(rows[rank]))])
    rows[rank].insert(at, action)
    return f"rank {rank}: moved {action} from step {step} to {at}"


def move_to_rank(rows: Rows, limits: Limits, rng: random.Random) -> str:
    rank, step = _some_action(rows, rng)
    action = rows[rank].pop(step)
    to = rng.randrange(len(rows))
    at = min(step, len(rows[to]))
    rows[to].insert(at, action)
    return f"moved {action} from rank {rank}, step {step} to rank {to}, step {at}"


def move_stage(rows: Rows, limits: Limits, rng: random.Random) -> str:
    """All that one stage does for one micro-batch goes to another rank, at about the same steps."""
    cell, to = tuple(map(rng.randrange, limits)), rng.randrange(len(rows))
    for row in rows:
        for step in reversed(range(len(row))):
            if row is not rows[to] and (row[step].stage, row[step].microbatch) == cell and row[step].pair is None:
                rows[to].insert(min(step, len(rows[to])), row.pop(step))
    return f"moved stage {cell[0]}, micro-batch {cell[1]} to rank {to}"


def shuffle_window(rows: Rows, limits: Limits, rng: random.Random) -> str:
    rank, step = _some_action(rows, rng)
    window = rows[rank][step : step + rng.randint(3, 5)]
    rows[rank][step : step + len(window)] = rng.sample(window, len(window))
    return f"rank {rank}: shuffled steps {step} to {step + len(window) - 1}"


def add_idle_rank(rows: Rows, limits: Limits, rng: random.Random) -> str:
    """Harmless: nobody waits for it."""
    if len(rows) == MOST_RANKS:
        raise NothingToChangeError
    at = rng.randint(0, len(rows))
    rows.insert(at, [])
    return f"put rank {at} there, with nothing to do"


def swap_ranks(rows: Rows, limits: Limits, rng: random.Random) -> str:
    """Harmless: a rank has no other name than its place."""
    one, two = rng.randrange(len(rows)), rng.randrange(len(rows))
    rows[one], rows[two] = rows[two], rows[one]
    return f"swapped the rows of ranks {one} and {two}"


def split_pair(rows: Rows, limits: Limits, rng: random.Random) -> str:
    places = [(rank, step) for rank, row in enumerate(rows) for step, action in enumerate(row) if action.pair]
    rank, step = _one_of(places, rng)
    action = rows[rank][step]
    rows[rank][step : step + 1] = action.parts if rng.random() < 0.5 else action.parts[::-1]
    return f"rank {rank}, step {step}: split {action}"


def merge_neighbours(rows: Rows, limits: Limits, rng: random.Random) -> str:
    """A forward and a backward of another micro-batch, in whichever order they stand, become one."""
    found = []
    for rank, row in enumerate(rows):
        for step in range(len(row) - 1):
            for pair in (row[step : step + 2], row[step : step + 2][::-1]):
                try:
                    found.append((rank, step, Action.overlap(*pair)))
                except ScheduleError:
                    continue
    rank, step, action = _one_of(found, rng)
    rows[rank][step : step + 2] = [action]
    return f"rank {rank}, step {step}: merged two to {action}"


def split_backward(rows: Rows, limits: Limits, rng: random.Random) -> str:
    """B becomes I there and W somewhere behind it."""
    places = [(rank, step) for rank, row in enumerate(rows) for step, one in enumerate(row) if one.kind is Kind.B]
    rank, step = _one_of(places, rng)
    action = rows[rank][step]
    rows[rank][step] = Action(Kind.I, action.stage, action.microbatch)
    at = rng.randint(step + 1, len(rows[rank]))
    rows[rank].insert(at, Action(Kind.W, action.stage, action.microbatch))
    return f"rank {rank}, step {step}: split {action}, its W to step {at}"


def change_kind(rows: Rows, limits: Limits, rng: random.Random) -> str:
    places = [
        (rank, step)
        for rank, row in enumerate(rows)
        for step, one in enumerate(row)
        if one.kind in (Kind.B, Kind.I, Kind.W)
    ]
    rank, step = _one_of(places, rng)
    action = rows[rank][step]
    kind = rng.choice([kind for kind in (Kind.F, Kind.B, Kind.I, Kind.W) if kind is not action.kind])
    rows[rank][step] = Action(kind, action.stage, action.microbatch)
    return f"rank {rank}, step {step}: {action} became {rows[rank][step]}"


def change_id(rows: Rows, limits: Limits, rng: random.Random) -> str:
    """A stage or a micro-batch of one part."""
    rank, step = _some_action(rows, rng)
    action = rows[rank][step]
    parts = list(action.parts)
    which = rng.randrange(len(parts))
    stage, microbatch = parts[which].stage, parts[which].microbatch
    if rng.random() < 0.5:
        stage = rng.randrange(limits[0])
    else:
        microbatch = rng.randrange(limits[1])
    parts[which] = Action(parts[which].kind, stage, microbatch)
    try:
        rows[rank][step] = Action.overlap(*parts) if action.pair else parts[0]
    except ScheduleError:
        raise NothingToChangeError from None
    return f"rank {rank}, step {step}: {action} became {rows[rank][step]}"


def rename_microbatches(rows: Rows, limits: Limits, rng: random.Random) -> str:
    """Harmless where it is done on all ranks, and hardly ever where one is left out."""
    one, two = rng.randrange(limits[1]), rng.randrange(limits[1])
    names = {one: two, two: one}
    but = rng.choice([None, None, None, rng.randrange(len(rows))])

    def renamed(part: Action) -> Action:
        return Action(part.kind, part.stage, names.get(part.microbatch, part.microbatch))

    for rank, row in enumerate(rows):
        if rank != but:
            row[:] = [Action.overlap(*map(renamed, one.parts)) if one.pair else renamed(one) for one in row]
    return f"micro-batches {one} and {two} swapped names" + ("" if but is None else f" on all ranks but {but}")


ROW_CHANGES: list[Callable[[Rows, Limits, random.Random], str]] = [
    *[swap_near] * 10,
    swap_far,
    shuffle_window,
    add_idle_rank,
    drop,
    duplicate,
    *[move_in_row] * 4,
    move_to_rank,
    *[move_stage] * 2,
    *[swap_ranks] * 2,
    *[split_pair] * 4,
    *[merge_neighbours] * 5,
    *[split_backward] * 6,
    change_kind,
    change_id,
    *[rename_microbatches] * 4,
]


# --- programs -----------------------------------------------------------------------------------------------


def in_one_order(schedule: Schedule) -> tuple[Program, ...]:
    """Programs that run under every model: all ranks post in one common order, each transfer by itself."""
    wires = _wires(schedule)
    programs = []
    for rank, row in enumerate(schedule.rows):
        program: list[Instruction] = []
        to_post = [wire for wire in wires if rank in (wire.source, wire.target)]
        for action in row:
            arrivals, sends = _arrivals(rank, action, wires, schedule.num_stages), _sends(rank, action, wires)
            while any(wire in to_post for wire in arrivals):
                program.append(Post((to_post.pop(0),)))
            program += [*map(Wait, arrivals), Run(action)]
            while any(wire in to_post for wire in sends):
                program.append(Post((to_post.pop(0),)))
        programs.append((*program, *(Wait(wire) for wire in wires if wire.source == rank)))
    return tuple(programs)


def plain(schedule: Schedule) -> tuple[Program, ...]:
    """Programs as one writes them first: receive, compute, send; only the sends are waited for at the end.

    They run where sends are buffered and every rank takes what it gets in the order in which it was made.
    """
    wires = _wires(schedule)
    programs = []
    for rank, row in enumerate(schedule.rows):
        program: list[Instruction] = []
        for action in row:
            for wire in _arrivals(rank, action, wires, schedule.num_stages):
                program += [Post((wire,)), Wait(wire)]
            program.append(Run(action))
            program += [Post((wire,)) for wire in _sends(rank, action, wires)]
        programs.append((*program, *(Wait(wire) for wire in wires if wire.source == rank)))
    return tuple(programs)


def waiting_for_sends_at_once(rank: int, program: Sequence[Instruction]) -> Program:
    """Every send is waited for as soon as it is posted, as plain sends do."""
    changed: list[Instruction] = []
    for instruction in program:
        if not (isinstance(instruction, Wait) and instruction.transfer.source == rank):
            changed.append(instruction)
        if isinstance(instruction, Post):
            changed += [Wait(t) for t in instruction.transfers if t.source == rank]
    return tuple(changed)


def _wires(schedule: Schedule) -> list[Transfer]:
    """All transfers, in an order in which all could be made one after another."""
    needs = partial(needs_of_neighbours, num_stages=schedule.num_stages)
    left = [list(row) for row in schedule.rows]
    home: dict[Token, int] = {}  # in the order of making
    needed: dict[Token, list[int]] = defaultdict(list)
    while any(left):
        for rank, row in enumerate(left):
            if row and all(need in home for part in row[0].parts for need in needs(part)):
                for part in row.pop(0).parts:
                    home |= dict.fromkeys(made_by(part), rank)
                    for need in needs(part):
                        needed[need].append(rank)
    return [Transfer(*token, home[token], rank) for token in home for rank in needed[token] if rank != home[token]]


def _arrivals(rank: int, action: Action, wires: list[Transfer], num_stages: int) -> list[Transfer]:
    needed = [need for part in action.parts for need in needs_of_neighbours(part, num_stages)]
    return [wire for wire in wires if wire.target == rank and wire[:3] in needed]


def _sends(rank: int, action: Action, wires: list[Transfer]) -> list[Transfer]:
    made = [token for part in action.parts for token in made_by(part)]
    return [wire for wire in wires if wire.source == rank and wire[:3] in made]


LOWERINGS: dict[str, Callable[[Schedule], Sequence[Program]]] = {
    "lower": lambda schedule: lower(schedule).programs,
    "in_one_order": in_one_order,
    "plain": plain,
}


def _with_changed_programs(seed: int, rng: random.Random, origin: str, schedule: Schedule) -> Mutant:
    how = rng.choice([*["lower"] * 2, *["in_one_order"] * 5, *["plain"] * 3])
    programs = [list(program) for program in LOWERINGS[how](schedule)]
    if how == "plain" and rng.random() < 0.7:
        how = "at once " + how
        programs = [list(waiting_for_sends_at_once(rank, program)) for rank, program in enumerate(programs)]
    changes = [rng.choice(PROGRAM_CHANGES)(programs, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    return Mutant(seed, f"{how}({origin})", tuple(changes), schedule, tuple(map(tuple, programs)))


def _with_both(seed: int, rng: random.Random, origin: str, schedule: Schedule) -> Mutant:
    """Actions swapped, or one dropped, in a row and in its program alike; posts and waits are left where they are."""
    how = rng.choice(["lower", "in_one_order", "in_one_order", "plain"])
    programs = [list(program) for program in LOWERINGS[how](schedule)]
    rows = [list(row) for row in schedule.rows]
    changes = [swap_near(rows, (0, 0), rng) for _ in range(rng.choice([1, 1, 2]))]
    for program, row in zip(programs, rows, strict=True):
        computed = iter(row)
        program[:] = [Run(next(computed)) if isinstance(one, Run) else one for one in program]
    if rng.random() < 0.1:
        rank, step = _some_action(rows, rng)
        programs[rank].remove(Run(rows[rank][step]))
        changes.append(f"rank {rank}: dropped {rows[rank].pop(step)}, of the program as well")
        if not any(rows):
            raise NothingToChangeError
    limits = schedule.num_stages, schedule.num_microbatches
    different = Schedule(tuple(map(tuple, rows)), *limits, schedule.mode)
    return Mutant(seed, f"{how}({origin})", tuple(changes), different, tuple(map(tuple, programs)))


def _some_place(programs: Programs, rng: random.Random, sort: type | None = None) -> tuple[int, int]:
    """Rank and place of an instruction, of that sort or, without one, of those that are no Run."""
    places = [
        (rank, at)
        for rank, program in enumerate(programs)
        for at, instruction in enumerate(program)
        if (isinstance(instruction, sort) if sort else not isinstance(instruction, Run))
    ]
    return _one_of(places, rng)


def swap_instructions(programs: Programs, rng: random.Random) -> str:
    places = [(rank, at) for rank, program in enumerate(programs) for at in range(len(program) - 1)]
    rank, at = _one_of(places, rng)
    program = programs[rank]
    program[at], program[at + 1] = program[at + 1], program[at]
    return f"rank {rank}: swapped instructions {at} and {at + 1}"


def move_instruction(programs: Programs, rng: random.Random) -> str:
    """A Post or a Wait, some places earlier or later."""
    rank, at = _some_place(programs, rng)
    instruction = programs[rank].pop(at)
    to = at + rng.choice([-6, -3, -2, -1, 1, 2, 3, 6, 12])
    to = min(max(to, 0), len(programs[rank]))
    programs[rank].insert(to, instruction)
    return f"rank {rank}: moved instruction {at} ({instruction}) to {to}"


def wait_later(programs: Programs, rng: random.Random) -> str:
    """Harmless for a send; a receive may be waited for after its use."""
    rank, at = _some_place(programs, rng, Wait)
    wait = programs[rank].pop(at)
    to = rng.randint(at, len(programs[rank]))
    programs[rank].insert(to, wait)
    return f"rank {rank}: moved instruction {at} ({wait}) to {to}"


def wait_at_once(programs: Programs, rng: random.Random) -> str:
    """A wait comes right behind its post: what plain sends and receives do."""
    rank, at = _some_place(programs, rng, Wait)
    wait = programs[rank][at]
    posted = [
        index
        for index, post in enumerate(programs[rank][:at])
        if isinstance(post, Post) and wait.transfer in post.transfers
    ]
    if not posted:
        raise NothingToChangeError
    programs[rank].insert(posted[0] + 1, programs[rank].pop(at))
    return f"rank {rank}: moved instruction {at} ({wait}) to {posted[0] + 1}"


def wait_for_sends_at_once(programs: Programs, rng: random.Random) -> str:
    """One rank, or all of them."""
    ranks = rng.choice([range(len(programs)), [rng.randrange(len(programs))]])
    for rank in ranks:
        programs[rank] = list(waiting_for_sends_at_once(rank, programs[rank]))
    return f"ranks {list(ranks)}: wait for each send at once"


def post_receive_early(programs: Programs, rng: random.Random) -> str:
    """A receive is posted by itself and earlier: ahead of others of its channel, of its pair of ranks, or neither."""
    rank = rng.randrange(len(programs))
    program = programs[rank]
    receives = [t for t in _posted(program) if t.target == rank]
    early = _one_of(receives, rng)
    at = next(at for at, post in enumerate(program) if isinstance(post, Post) and early in post.transfers)
    ends = rng.choice([[], [(early.source, rank)], [(early.source, rank), (rank, early.source)]])
    first = max(
        (to + 1 for to, post in enumerate(program[:at]) if any((t.source, t.target) in ends for t in _posted([post]))),
        default=0,
    )
    rest = tuple(t for t in program[at].transfers if t != early)
    program[at : at + 1] = [Post(rest)] if rest else []
    to = rng.randint(first, at)
    program.insert(to, Post((early,)))
    return f"rank {rank}: {early} is posted at {to}"


def post_all_of_a_peer_early(programs: Programs, rng: random.Random) -> str:
    """What comes from one peer is posted right behind the rank's last post with that peer: only others have to wait."""
    rank, peer = rng.randrange(len(programs)), rng.randrange(len(programs))
    changed: list[Instruction] = []
    for instruction in programs[rank]:
        to = len(changed)
        if isinstance(instruction, Post) and all(t.source == peer for t in instruction.transfers):
            with_peer = [at for at, one in enumerate(changed) if any(peer in t[3:] for t in _posted([one]))]
            to = with_peer[-1] + 1 if with_peer else 0
        changed.insert(to, instruction)
    if changed == programs[rank]:
        raise NothingToChangeError
    programs[rank] = changed
    return f"rank {rank}: all receives from rank {peer} are posted right behind the last post with it"


def reorder_post(programs: Programs, rng: random.Random) -> str:
    rank, at = _some_post(programs, rng, at_least=2)
    before = programs[rank][at]
    programs[rank][at] = Post(tuple(rng.sample(before.transfers, len(before.transfers))))
    return f"rank {rank}: instruction {at} ({before}) became {programs[rank][at]}"


def _some_post(programs: Programs, rng: random.Random, at_least: int = 1) -> tuple[int, int]:
    places = [
        (rank, at)
        for rank, program in enumerate(programs)
        for at, instruction in enumerate(program)
        if isinstance(instruction, Post) and len(instruction.transfers) >= at_least
    ]
    return _one_of(places, rng)


def exchange_transfers(programs: Programs, rng: random.Random) -> str:
    """Two transfers of one rank, in whichever Posts, change places."""
    rank = rng.randrange(len(programs))
    posted = _posted(programs[rank])
    if len(posted) < 2:
        raise NothingToChangeError
    first = rng.randrange(len(posted) - 1)
    one, two = posted[first], posted[rng.choice([first + 1, rng.randrange(len(posted))])]
    _rename(programs[rank], {one: two, two: one})
    return f"rank {rank}: exchanged the posts of {one} and {two}"


def exchange_on_both_sides(programs: Programs, rng: random.Random) -> str:
    """As that, for two of one channel and at both of its ends, so that the order is kept."""
    ranks = range(len(programs))
    posted = {(t.source, t.target) for program in programs for t in _posted(program)}
    channels = sorted(channel for channel in posted if channel[0] in ranks and channel[1] in ranks)
    channel = _one_of(channels, rng)
    posted = [t for t in _posted(programs[channel[0]]) if (t.source, t.target) == channel]
    if len(posted) < 2:
        raise NothingToChangeError
    first = rng.randrange(len(posted) - 1)
    one, two = posted[first : first + 2]
    for rank in channel:
        _rename(programs[rank], {one: two, two: one})
    return f"exchanged the posts of {one} and {two} on both ranks"


def _posted(program: list[Instruction]) -> list[Transfer]:
    return [t for post in program if isinstance(post, Post) for t in post.transfers]


def _rename(program: list[Instruction], names: dict[Transfer, Transfer]) -> None:
    """In the posts alone; the waits stay as they are."""
    for at, post in enumerate(program):
        if isinstance(post, Post):
            program[at] = Post(tuple(names.get(t, t) for t in post.transfers))


def split_post(programs: Programs, rng: random.Random) -> str:
    rank, at = _some_post(programs, rng, at_least=2)
    post = programs[rank][at]
    cut = rng.randrange(1, len(post.transfers))
    programs[rank][at : at + 1] = [Post(post.transfers[:cut]), Post(post.transfers[cut:])]
    return f"rank {rank}: split instruction {at} ({post}) behind its transfer {cut - 1}"


def split_all_posts(programs: Programs, rng: random.Random) -> str:
    """Every transfer of one rank is a Post of its own."""
    rank = rng.randrange(len(programs))
    if not any(isinstance(one, Post) and len(one.transfers) > 1 for one in programs[rank]):
        raise NothingToChangeError
    programs[rank] = [
        part for one in programs[rank] for part in (map(Post, zip(one.transfers)) if isinstance(one, Post) else [one])
    ]
    return f"rank {rank}: split every Post"


def merge_on_both_sides(programs: Programs, rng: random.Random) -> str:
    """Two ranks batch the same transfers: wherever both have the two of them in Posts with nothing between."""
    found = []
    for one in range(len(programs)):
        for other in range(one):
            for pair in _neighbouring_posts(programs[one]) & _neighbouring_posts(programs[other]):
                found.append((one, other, pair))
    *ranks, pair = _one_of(sorted(found), rng)
    for rank in ranks:
        at = next(at for at, post in enumerate(programs[rank]) if isinstance(post, Post) and pair[0] in post.transfers)
        programs[rank][at : at + 2] = [Post((*programs[rank][at].transfers, *programs[rank][at + 1].transfers))]
    return f"ranks {ranks[0]} and {ranks[1]}: merged the posts of {pair[0]} and {pair[1]}"


def _neighbouring_posts(program: list[Instruction]) -> set[tuple[Transfer, Transfer]]:
    """The last transfer of a Post and the first of the next one, where that follows at once."""
    return {
        (one.transfers[-1], two.transfers[0])
        for one, two in zip(program, program[1:], strict=False)
        if isinstance(one, Post) and isinstance(two, Post)
    }


def merge_posts(programs: Programs, rng: random.Random) -> str:
    """A Post joins the one before it or the one behind it, mostly."""
    rank, at = _some_place(programs, rng, Post)
    others = [to for to, one in enumerate(programs[rank]) if isinstance(one, Post) and to != at]
    if not others:
        raise NothingToChangeError
    to = rng.choice([min(others, key=lambda other: (abs(other - at), other)), rng.choice(others)])
    early, late = sorted((at, to))
    both = Post((*programs[rank][early].transfers, *programs[rank][late].transfers))
    programs[rank][to] = both
    del programs[rank][at]
    return f"rank {rank}: merged instruction {at} with {to}, where {both} is now"


def drop_transfer(programs: Programs, rng: random.Random) -> str:
    """One transfer of a Post, and sometimes its wait as well."""
    rank, at = _some_post(programs, rng)
    post = programs[rank][at]
    dropped = rng.choice(post.transfers)
    left = tuple(t for t in post.transfers if t != dropped)
    programs[rank][at : at + 1] = [Post(left)] if left else []
    if rng.random() < 0.5:
        programs[rank][:] = [one for one in programs[rank] if one != Wait(dropped)]
        return f"rank {rank}: dropped {dropped} of instruction {at}, and its wait"
    return f"rank {rank}: dropped {dropped} of instruction {at}"


def drop_instruction(programs: Programs, rng: random.Random) -> str:
    rank, at = _some_place(programs, rng, rng.choice([Post, Wait, Wait, Run]))
    return f"rank {rank}: dropped instruction {at} ({programs[rank].pop(at)})"


def duplicate_instruction(programs: Programs, rng: random.Random) -> str:
    rank, at = _some_place(programs, rng, rng.choice([Post, Wait, Run]))
    to = rng.randint(0, len(programs[rank]))
    programs[rank].insert(to, programs[rank][at])
    return f"rank {rank}: put instruction {at} ({programs[rank][to]}) at {to} once more"


def retarget(programs: Programs, rng: random.Random) -> str:
    """One side of a transfer, with or without its wait, gets another source, target, stage or micro-batch."""
    rank, at = _some_post(programs, rng)
    before = rng.choice(programs[rank][at].transfers)
    field = rng.choice(["source", "target", "stage", "microbatch", "payload"])
    if field == "payload":
        after = before._replace(payload="gradient" if before.payload == "activation" else "activation")
    else:
        after = before._replace(**{field: rng.randrange(len(programs))})
    programs[rank][at] = Post(tuple(after if t == before else t for t in programs[rank][at].transfers))
    if rng.random() < 0.7:
        programs[rank][:] = [Wait(after) if one == Wait(before) else one for one in programs[rank]]
    return f"rank {rank}: {before} became {after}"


def move_to_other_program(programs: Programs, rng: random.Random) -> str:
    rank, at = _some_place(programs, rng)
    to = rng.randrange(len(programs))
    instruction = programs[rank].pop(at)
    where = min(at, len(programs[to]))
    programs[to].insert(where, instruction)
    return f"moved instruction {at} ({instruction}) of rank {rank} to rank {to}, place {where}"


def exchange_waits(programs: Programs, rng: random.Random) -> str:
    """Harmless where neither comes behind its use."""
    rank = rng.randrange(len(programs))
    places = [at for at, one in enumerate(programs[rank]) if isinstance(one, Wait)]
    if len(places) < 2:
        raise NothingToChangeError
    first = rng.randrange(len(places) - 1)
    one, two = places[first : first + 2]
    program = programs[rank]
    program[one], program[two] = program[two], program[one]
    return f"rank {rank}: exchanged the waits at {one} and {two}"


def end_early(programs: Programs, rng: random.Random) -> str:
    """A rank stops before its end, or is no longer there."""
    rank = rng.randrange(len(programs))
    if len(programs) > 1 and rng.random() < 0.5:
        programs.pop(rank)
        return f"rank {rank} has no program"
    at = rng.randint(0, len(programs[rank]))
    del programs[rank][at:]
    return f"rank {rank} ends at instruction {at}"


PROGRAM_CHANGES: list[Callable[[Programs, random.Random], str]] = [
    *[swap_instructions] * 4,
    *[move_instruction] * 3,
    *[wait_later] * 4,
    *[wait_at_once] * 4,
    *[wait_for_sends_at_once] * 3,
    *[post_receive_early] * 3,
    *[post_all_of_a_peer_early] * 8,
    *[reorder_post] * 3,
    exchange_transfers,
    *[exchange_on_both_sides] * 4,
    *[split_post] * 5,
    *[split_all_posts] * 2,
    *[merge_posts] * 3,
    *[merge_on_both_sides] * 8,
    *[exchange_waits] * 4,
    move_to_other_program,
    end_early,
    drop_transfer,
    *[drop_instruction] * 2,
    *[duplicate_instruction] * 2,
    retarget,
]
