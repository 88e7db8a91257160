"""`check` against interpreters that simply try: explicit message queues, ranks that go on until nothing moves."""

import random
import re
from collections import defaultdict, deque

import pytest
from hypothesis import given

from counterflow import Action, Schedule, check
from counterflow.errors import ScheduleError
from counterflow.schedule import (
    Kind,
    Post,
    Transfer,
    Transfers,
    Wait,
    check_transfers,
    from_text,
    generate,
    lower,
)
from strategies import generated_schedules, legal_sizes, random_runnable, runnable_schedules

# --- interpreters -------------------------------------------------------------------------------------------


def is_whole(schedule: Schedule) -> bool:
    """Every stage has F and B, or F, I and W, of every micro-batch once, on one rank."""
    legal = {"F"} if schedule.mode == "forward" else {"BF", "FIW"}
    found = defaultdict(list)
    for rank, row in enumerate(schedule.rows):
        for part in (part for action in row for part in action.parts):
            found[part.stage, part.microbatch].append((rank, part.kind.value))
    return all(
        "".join(sorted(kind for _, kind in found[stage, microbatch])) in legal
        and len({rank for rank, _ in found[stage, microbatch]}) == 1
        for stage in range(schedule.num_stages)
        for microbatch in range(schedule.num_microbatches)
    )


def runs(schedule: Schedule) -> bool:
    """Every rank does its next action once it has what that needs, and mails what it made; do all get through?"""
    if not is_whole(schedule):
        return False
    home = {
        (part.stage, part.microbatch): rank
        for rank, row in enumerate(schedule.rows)
        for action in row
        for part in action.parts
    }
    mail: list[deque[tuple[str, int, int]]] = [deque() for _ in schedule.rows]
    has: list[set[tuple[str, int, int]]] = [set() for _ in schedule.rows]
    rows = [deque(row) for row in schedule.rows]
    last = schedule.num_stages - 1

    def needs(part: Action) -> list[tuple[str, int, int]]:
        stage, microbatch = part.stage, part.microbatch
        if part.kind is Kind.F:
            return [("output", stage - 1, microbatch)] if stage > 0 else []
        if part.kind is Kind.W:
            return [("gradient", stage, microbatch)]
        return [("output", stage, microbatch)] + ([("gradient", stage + 1, microbatch)] if stage < last else [])

    def makes(part: Action) -> list[tuple[str, int, int]]:
        return [] if part.kind is Kind.W else [("output" if part.kind is Kind.F else "gradient", *cell(part))]

    def cell(part: Action) -> tuple[int, int]:
        return part.stage, part.microbatch

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while mail[rank]:
                has[rank].add(mail[rank].popleft())
            while row and all(has[rank].issuperset(needs(part)) for part in row[0].parts):
                for what, stage, microbatch in (made for part in row.popleft().parts for made in makes(part)):
                    has[rank].add((what, stage, microbatch))
                    neighbour = home.get((stage + 1 if what == "output" else stage - 1, microbatch))
                    if neighbour is not None:
                        mail[neighbour].append((what, stage, microbatch))
                moved = True
    return not any(rows)


def programs_run(transfers: Transfers, ranks: list[int]) -> bool:
    """Posts join their channel's queue of sends or of receives; the n-th of both are one message, or all is lost."""
    sends, receives = defaultdict(list), defaultdict(list)
    waited: list[list[Transfer]] = [[] for _ in transfers.programs]
    left = [deque(program) for program in transfers.programs]

    def queue(rank: int, transfer: Transfer) -> list[Transfer]:
        return (sends if rank == transfer.source else receives)[transfer.source, transfer.target]

    def ended(rank: int, transfer: Transfer) -> bool:
        both = sends[transfer.source, transfer.target], receives[transfer.source, transfer.target]
        return transfer in queue(rank, transfer) and all(
            len(side) > queue(rank, transfer).index(transfer) for side in both
        )

    moved = True
    while moved:
        moved = False
        for rank in ranks:
            program = left[rank]
            while program and not (isinstance(program[0], Wait) and not ended(rank, program[0].transfer)):
                instruction = program.popleft()
                moved = True
                if isinstance(instruction, Post):
                    for transfer in instruction.transfers:
                        if rank not in (transfer.source, transfer.target) or transfer in queue(rank, transfer):
                            return False
                        queue(rank, transfer).append(transfer)
                elif isinstance(instruction, Wait):
                    waited[rank].append(instruction.transfer)
    posted = [
        sorted(
            transfer
            for queues in (sends, receives)
            for channel in queues.values()
            for transfer in channel
            if rank == (transfer.source if queues is sends else transfer.target)
        )
        for rank in range(len(left))
    ]
    channels = sends.keys() | receives.keys()
    return (
        not any(left)
        and all(sends[channel] == receives[channel] for channel in channels)
        and posted == [sorted(transfers) for transfers in waited]
    )


def passes(schedule: Schedule) -> bool:
    try:
        check(schedule)
    except ScheduleError:
        return False
    return True


def transfers_pass(transfers: Transfers) -> bool:
    try:
        check_transfers(transfers)
    except ScheduleError:
        return False
    return True


# --- schedules ----------------------------------------------------------------------------------------------


@given(runnable_schedules)
def test_schedules_that_run_pass(schedule: Schedule) -> None:
    assert runs(schedule)
    check(schedule)


def swap_neighbours(rows: list[list[Action]], rng: random.Random) -> None:
    row = rng.choice([row for row in rows if len(row) > 1])
    at = rng.randrange(len(row) - 1)
    row[at], row[at + 1] = row[at + 1], row[at]


def move_within_its_row(rows: list[list[Action]], rng: random.Random) -> None:
    row = rng.choice([row for row in rows if row])
    action = row.pop(rng.randrange(len(row)))
    row.insert(rng.randrange(len(row) + 1), action)


def move_to_another_row(rows: list[list[Action]], rng: random.Random) -> None:
    row = rng.choice([row for row in rows if row])
    other = rng.choice(rows)
    other.insert(rng.randrange(len(other) + 1), row.pop(rng.randrange(len(row))))


def drop(rows: list[list[Action]], rng: random.Random) -> None:
    row = rng.choice([row for row in rows if row])
    del row[rng.randrange(len(row))]


def duplicate(rows: list[list[Action]], rng: random.Random) -> None:
    row = rng.choice([row for row in rows if row])
    other = rng.choice(rows)
    other.insert(rng.randrange(len(other) + 1), rng.choice(row))


def fuse_neighbours(rows: list[list[Action]], rng: random.Random) -> None:
    row = rng.choice(rows)
    for at in rng.sample(range(len(row)), len(row)):
        try:
            row[at : at + 2] = [Action.overlap(*row[at : at + 2])]
        except (ScheduleError, TypeError):
            continue
        return


def split_an_overlapped_one(rows: list[list[Action]], rng: random.Random) -> None:
    row = rng.choice(rows)
    for at in [at for at, action in enumerate(row) if action.pair][:1]:
        row[at : at + 1] = row[at].parts


def swap_rows(rows: list[list[Action]], rng: random.Random) -> None:
    one, other = rng.randrange(len(rows)), rng.randrange(len(rows))
    rows[one], rows[other] = rows[other], rows[one]


CHANGES = [
    *[swap_neighbours] * 6,
    *[move_within_its_row] * 3,
    move_to_another_row,
    drop,
    duplicate,
    *[fuse_neighbours] * 3,
    split_an_overlapped_one,
    swap_rows,
]


def mutant(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """The schedule with one to three random changes; None where nothing is left of it."""
    rows = [list(row) for row in schedule.rows]
    for _ in range(rng.choice([1, 1, 2, 3])):
        if any(len(row) > 1 for row in rows):
            rng.choice(CHANGES)(rows, rng)
    if not any(rows):
        return None
    return Schedule(tuple(map(tuple, rows)), schedule.num_stages, schedule.num_microbatches, schedule.mode)


def originals() -> list[Schedule]:
    generated = [generate(*size) for size in legal_sizes(most_ranks=4, most_microbatches=6) if size[2] != 5]
    return [*generated, generate("dualpipe", 4, 8), *(random_runnable(seed, 3, 3, 3) for seed in range(20))]


def test_check_says_of_mutants_what_trying_them_says() -> None:
    rng = random.Random(20)
    verdicts: list[bool] = []
    for schedule in originals():
        for original in (schedule, schedule, schedule.forward_only()):
            for _ in range(8):
                changed = mutant(original, rng)
                if changed is None:
                    continue
                verdict = runs(changed)
                assert passes(changed) == verdict, f"{changed}\n(the interpreter says {verdict})"
                verdicts.append(verdict)
    assert len(verdicts) > 1000
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8


def deadlock_of(schedule: Schedule) -> str | None:
    try:
        check(schedule)
    except ScheduleError as error:
        return str(error) if str(error).startswith("deadlock") else None
    return None


LINK = re.compile(r"rank (\d+) at (step \d+ \(\S+\)|the end) waits for the \w+ of \w+ from rank (\d+) to (\d+)")


def test_the_cycle_told_is_a_cycle() -> None:
    rng = random.Random(2)
    lengths = set()
    for seed in range(150):
        schedule = random_runnable(seed, num_ranks=4, num_stages=4, num_microbatches=3)
        for _ in range(3):
            rows = [list(row) for row in schedule.rows]
            move_within_its_row(rows, rng)
            message = deadlock_of(Schedule(tuple(map(tuple, rows)), schedule.num_stages, schedule.num_microbatches))
            if message is None:
                continue
            links = LINK.findall(message)
            lengths.add(len(links))
            for (rank, coming, source, target), (following, *_) in zip(links, links[1:] + links[:1], strict=True):
                assert {rank, following} == {source, target}
                if match := re.search(r"step (\d+) \((\S+)\)", coming):
                    assert str(rows[int(rank)][int(match[1])]) == match[2]
    assert {2, 3} <= lengths, "the random schedules no longer show what this test is for"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0\n0F0", "rank 1, step 0: 0F0 already stands at rank 0, step 0; remove one"),
        (
            "0F0 (0F1;0B0)OVERLAP_F_B (0F2;0B0)OVERLAP_F_B",
            "rank 0, step 2: 0B0 already stands at rank 0, step 1; remove one",
        ),
        (
            "0F1 0B1",
            "stage 0, micro-batch 0 has no action; it needs one F, and one B or one I and one W",
        ),
        (
            "0F0 0I0",
            "stage 0, micro-batch 0 has 0F0, 0I0; it needs one F, and one B or one I and one W",
        ),
        (
            "0F0 0W0 0B0 0I0",
            "stage 0, micro-batch 0 has 0F0, 0B0, 0I0, 0W0; it needs one F, and one B or one I and one W",
        ),
        ("0F0 0F1\n1F0", "stage 1, micro-batch 1 has no action; it needs one F"),
        (
            "0F0\n0B0",
            "rank 1, step 0: 0B0 stands on another rank than its forward 0F0 (rank 0); "
            "a stage does all its work for a micro-batch on one rank",
        ),
        (
            "0F0 0I0\n0W0",
            "rank 1, step 0: 0W0 stands on another rank than its backward for input 0I0 (rank 0); "
            "a stage does all its work for a micro-batch on one rank",
        ),
        ("0B0 0F0", "rank 0, step 0: 0B0 stands before its forward 0F0; move it behind"),
        ("0F0 0W0 0I0", "rank 0, step 1: 0W0 stands before its backward for input 0I0; move it behind"),
        (
            "1F0 0F0 1B0 0B0",
            "rank 0, step 0: 1F0 stands before 0F0, whose activation it needs; move it behind",
        ),
        (
            "0F0 1F0 0I0 1B0 0W0",
            "rank 0, step 2: 0I0 stands before 1B0, whose gradient it needs; move it behind",
        ),
        (
            "0F0 0B0 0F1 0B1\n1F1 1B1 1F0 1B0",
            "deadlock: rank 0 at step 1 (0B0) waits for the gradient of 1B0 from rank 1 to 0; "
            "rank 1 at step 0 (1F1) waits for the activation of 0F1 from rank 0 to 1; "
            "these wait for each other in a circle: reorder one of their rows",
        ),
        (
            # Rank 3 only waits for the circle, so it is left out.
            "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1\n2F1 2B1 2F0 2B0\n3F0 3B0 3F1 3B1",
            "deadlock: rank 0 at step 1 (0B0) waits for the gradient of 1B0 from rank 1 to 0; "
            "rank 1 at step 1 (1F1) waits for the activation of 0F1 from rank 0 to 1; "
            "these wait for each other in a circle: reorder one of their rows",
        ),
        (
            "0F0 (0F1;0B0)OVERLAP_F_B 0B1\n1F0 1F1 1B0 1B1",
            "deadlock: rank 0 at step 1 ((0F1;0B0)OVERLAP_F_B) waits for the gradient of 1B0 from rank 1 to 0; "
            "rank 1 at step 1 (1F1) waits for the activation of 0F1 from rank 0 to 1; "
            "these wait for each other in a circle: reorder one of their rows",
        ),
    ],
)
def test_each_broken_rule_is_told_with_its_place(text: str, message: str) -> None:
    schedule = from_text(text)
    assert not runs(schedule)
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    assert str(caught.value) == message


# --- programs -----------------------------------------------------------------------------------------------


@given(generated_schedules(most_ranks=4, most_microbatches=6))
def test_lowered_programs_pass_in_whatever_order_ranks_go(schedule: Schedule) -> None:
    transfers = lower(schedule)
    check_transfers(transfers)
    for ranks in (list(range(schedule.num_ranks)), list(range(schedule.num_ranks))[::-1]):
        assert programs_run(transfers, ranks)


def program_mutant(transfers: Transfers, rng: random.Random) -> Transfers:
    """One rank's program with instructions moved, lost or doubled, or its posts split, joined or reordered."""
    programs = [list(program) for program in transfers.programs]
    program = rng.choice([program for program in programs if len(program) > 1])
    at, to = rng.randrange(len(program)), rng.randrange(len(program))
    posts = [index for index, instruction in enumerate(program) if isinstance(instruction, Post)]
    match rng.choice(["near", "near", "near", "far", "drop", "double", "shuffle", "shuffle", "split", "split", "join"]):
        case "near":
            to = max(at - rng.choice([1, 1, 1, 2, 3]), 0)
            program.insert(to, program.pop(at))
        case "far":
            program.insert(to, program.pop(at))
        case "drop":
            del program[at]
        case "double":
            program.insert(to, program[at])
        case "shuffle" if posts:
            at = rng.choice(posts)
            program[at] = Post(tuple(rng.sample(program[at].transfers, len(program[at].transfers))))
        case "split" if posts:
            at = rng.choice(posts)
            cut = rng.randrange(len(program[at].transfers) + 1)
            halves = program[at].transfers[:cut], program[at].transfers[cut:]
            program[at : at + 1] = [Post(half) for half in halves if half]
        case "join" if len(posts) > 1:
            first, second = sorted(rng.sample(posts, 2))
            program[first] = Post(program[first].transfers + program.pop(second).transfers)
    return Transfers(transfers.schedule, tuple(map(tuple, programs)))


def test_check_says_of_changed_programs_what_running_them_says() -> None:
    rng = random.Random(5)
    verdicts: list[bool] = []
    for schedule in originals():
        if schedule.num_ranks == 1:
            continue
        for _ in range(15):
            changed = lower(schedule)
            for _ in range(rng.choice([1, 2])):
                changed = program_mutant(changed, rng)
            ranks = list(range(schedule.num_ranks))
            verdict = programs_run(changed, ranks)
            assert programs_run(changed, ranks[::-1]) == verdict
            assert transfers_pass(changed) == verdict, changed.programs
            verdicts.append(verdict)
    assert len(verdicts) > 500
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8


FIRST = Transfer("activation", 0, 0, source=0, target=1)
SECOND = Transfer("activation", 0, 1, source=0, target=1)
ANSWER = Transfer("gradient", 1, 0, source=1, target=0)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (
            ([Post((FIRST,)), Wait(FIRST)], [Post((FIRST,))]),
            "rank 1 posts the activation of 0F0 from rank 0 to 1 and never waits for it; add a wait",
        ),
        (
            ([Post((FIRST,)), Wait(FIRST)], [Wait(FIRST)]),
            "rank 1 waits for the activation of 0F0 from rank 0 to 1 without posting it before; post it ahead",
        ),
        (
            ([Post((FIRST,)), Wait(FIRST)], []),
            "ranks 0 to 1: message 0 is sent as the activation of 0F0 from rank 0 to 1 and received as nothing; "
            "channels are first-in first-out, so post both in the same order",
        ),
        (
            (
                [Post((FIRST, SECOND)), Wait(FIRST), Wait(SECOND)],
                [Post((SECOND,)), Post((FIRST,)), Wait(FIRST), Wait(SECOND)],
            ),
            "ranks 0 to 1: message 0 is sent as the activation of 0F0 from rank 0 to 1 and received as the activation "
            "of 0F1 from rank 0 to 1; channels are first-in first-out, so post both in the same order",
        ),
        (
            ([Post((FIRST, FIRST)), Wait(FIRST)], [Post((FIRST, FIRST)), Wait(FIRST)]),
            "rank 0 posts the activation of 0F0 from rank 0 to 1 a second time; remove that post",
        ),
        (
            ([Post((FIRST,)), Wait(FIRST), Wait(FIRST)], [Post((FIRST,)), Wait(FIRST)]),
            "rank 0 waits for the activation of 0F0 from rank 0 to 1 a second time; remove that wait",
        ),
        (
            ([Post((FIRST,)), Wait(FIRST)], [], [Post((FIRST,)), Wait(FIRST)]),
            "rank 2 posts the activation of 0F0 from rank 0 to 1 without being one of its two ends; remove that post",
        ),
        (
            ([Post((FIRST,)), Wait(FIRST)], [Wait(FIRST), Post((FIRST,))]),
            "rank 1 waits for the activation of 0F0 from rank 0 to 1 without posting it before; post it ahead",
        ),
        (
            (
                [Post((ANSWER,)), Wait(ANSWER), Post((FIRST,)), Wait(FIRST)],
                [Post((FIRST,)), Wait(FIRST), Post((ANSWER,)), Wait(ANSWER)],
            ),
            "deadlock: rank 0 at the end waits for the gradient of 1B0 from rank 1 to 0; "
            "rank 1 at the end waits for the activation of 0F0 from rank 0 to 1; "
            "these wait for each other in a circle: reorder one of their rows",
        ),
    ],
)
def test_programs_that_do_not_fit_are_told_apart(programs: tuple[list[Post | Wait], ...], message: str) -> None:
    transfers = Transfers(from_text("0F0\n1F0"), tuple(map(tuple, programs)))
    assert not programs_run(transfers, list(range(len(programs))))
    with pytest.raises(ScheduleError) as caught:
        check_transfers(transfers)
    assert str(caught.value) == message
