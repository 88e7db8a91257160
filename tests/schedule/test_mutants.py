"""`check` against brute force on schedules and programs that were spoilt at random, under every channel model.

A disagreement is printed with its seed: `mutant(seed)` makes it again.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable

import pytest

from counterflow import Action, Schedule, check
from counterflow.errors import ScheduleError
from counterflow.schedule import (
    CHANNELS,
    GENERATORS,
    Kind,
    Post,
    Run,
    Transfer,
    Transfers,
    Wait,
    check_transfers,
    lower,
)
from counterflow.schedule.transfers import Program
from schedule.channels import (
    MODELS,
    Kernel,
    World,
    left_alone,
    most_activations_held,
    runs_as_programs,
    why_incomplete,
    why_programs_fail,
    why_rows_fail,
)
from schedule.mutants import Mutant, in_one_order, mutant, schedules_of
from strategies import random_runnable


def tried(spoilt: Mutant, channels: str) -> str:
    """Why it does not run, found by running it; "" where it does."""
    if spoilt.programs is not None:
        return why_incomplete(spoilt.schedule) or why_programs_fail(spoilt.schedule, spoilt.programs, channels)
    if why := why_rows_fail(spoilt.schedule):
        return why
    return why_programs_fail(spoilt.schedule, lower(spoilt.schedule).programs, channels)


def refused(spoilt: Mutant, channels: str) -> ScheduleError | None:
    """What `check` has against it."""
    try:
        if spoilt.programs is None:
            check(spoilt.schedule, channels=channels)
        else:
            check_transfers(spoilt.transfers, channels=channels)
    except ScheduleError as error:
        return error
    return None


def judge(seeds: Iterable[int]) -> list[dict[str, bool]]:
    """Whether each mutant runs under each model, as both judges say; raise where they do not say the same."""
    verdicts = []
    for seed in seeds:
        spoilt = mutant(seed)
        verdict = {}
        for channels in MODELS:
            why, error = tried(spoilt, channels), refused(spoilt, channels)
            if bool(why) != bool(error):
                pytest.fail(
                    f"{channels}: trying it says {why or 'it runs'!r}, check says {error or 'it runs'}\n{spoilt}"
                )
            verdict[channels] = not why
        verdicts.append(verdict)
    return verdicts


def require_a_fifth_of_each(verdicts: list[dict[str, bool]]) -> None:
    """Of both answers under every model, or agreeing would be cheap."""
    for channels in MODELS:
        runs = sum(verdict[channels] for verdict in verdicts) / len(verdicts)
        assert 0.2 <= runs <= 0.8, f"{channels}: {runs:.0%} of the mutants run"


def test_the_models_are_those_of_check() -> None:
    assert set(CHANNELS) == set(MODELS)


def test_check_agrees_with_brute_force_on_300_mutants() -> None:
    require_a_fifth_of_each(judge(range(300)))


@pytest.mark.slow
def test_check_agrees_with_brute_force_on_10_000_mutants() -> None:
    verdicts = judge(range(10_000))
    require_a_fifth_of_each(verdicts)
    told_apart = Counter(tuple(verdict.values()) for verdict in verdicts)
    assert len(told_apart) >= 5, "the mutants no longer tell all four models apart"


# --- brute force itself -------------------------------------------------------------------------------------


def around(num_ranks: int) -> Schedule:
    """Rank r begins micro-batch r and ends that of the rank before: everybody sends to the next rank in a ring."""
    return Schedule(
        tuple((Action(Kind.F, 0, rank), Action(Kind.F, 1, (rank - 1) % num_ranks)) for rank in range(num_ranks)),
        num_stages=2,
        num_microbatches=num_ranks,
        mode="forward",
    )


def in_a_ring(num_ranks: int, order: str) -> tuple[Program, ...]:
    """Of each rank, what it does with S(end), R(eceive) or SR in one batch, s and r the waits for them, 0 and 1."""
    programs = []
    for rank, row in enumerate(around(num_ranks).rows):
        before, following = (rank - 1) % num_ranks, (rank + 1) % num_ranks
        send, receive = (
            Transfer("activation", 0, rank, rank, following),
            Transfer("activation", 0, before, before, rank),
        )
        meaning = {
            "S": [Post((send,))],
            "R": [Post((receive,))],
            "SR": [Post((send, receive))],
            "s": [Wait(send)],
            "r": [Wait(receive)],
            "0": [Run(row[0])],
            "1": [Run(row[1])],
        }
        programs.append(tuple(one for word in order.split() for one in meaning[word]))
    return tuple(programs)


@pytest.mark.parametrize(
    ("num_ranks", "order", "runs_under"),
    [
        pytest.param(2, "0 SR r 1 s", "rendezvous buffered nccl nccl-pair", id="one batch"),
        pytest.param(2, "0 S R r 1 s", "rendezvous buffered", id="two kernels for one peer, each behind the other's"),
        pytest.param(3, "0 S R r 1 s", "rendezvous buffered nccl-pair", id="two kernels for two peers"),
        pytest.param(3, "0 SR r 1 s", "rendezvous buffered nccl nccl-pair", id="one batch for two peers"),
        pytest.param(2, "0 S s R r 1", "buffered", id="nobody receives before his send is through"),
        pytest.param(3, "0 S s R r 1", "buffered", id="nobody receives, in a ring"),
        pytest.param(2, "R 0 S r 1 s", "rendezvous buffered", id="the receive heads the queue"),
        pytest.param(2, "0 R r S 1 s", "", id="nobody sends before he has received"),
        pytest.param(2, "0 S R 1 r s", "", id="a receive waited for behind its use"),
        pytest.param(2, "S R 0 r 1 s", "", id="sent before it is made"),
        pytest.param(2, "0 SR r 1", "", id="a send that is never waited for"),
        pytest.param(2, "0 SR r r 1 s", "", id="waited for twice"),
        pytest.param(2, "0 SR r s", "", id="an action of the row is missing"),
    ],
)
def test_both_judges_see_what_each_model_means(num_ranks: int, order: str, runs_under: str) -> None:
    transfers = Transfers(around(num_ranks), in_a_ring(num_ranks, order))
    spoilt = Mutant(0, "by hand", (), transfers.schedule, transfers.programs)
    for judged in (tried, refused):
        assert [channels for channels in MODELS if not judged(spoilt, channels)] == runs_under.split()


def test_brute_force_does_not_depend_on_who_goes_first() -> None:
    for seed in range(60):
        spoilt = mutant(seed)
        programs = spoilt.programs
        if programs is None:
            if why_rows_fail(spoilt.schedule):
                continue
            programs = lower(spoilt.schedule).programs
        for channels in MODELS:
            verdict = runs_as_programs(spoilt.schedule, programs, channels)
            for order in range(3):
                again = runs_as_programs(spoilt.schedule, programs, channels, random.Random(order))
                assert again == verdict, f"{channels}, order {order}\n{spoilt}"


def test_a_model_that_orders_less_lets_more_run() -> None:
    for seed in range(100):
        spoilt = mutant(seed)
        runs = [not tried(spoilt, channels) for channels in ("nccl", "nccl-pair", "rendezvous", "buffered")]
        assert runs == sorted(runs), f"{runs}\n{spoilt}"


@pytest.mark.parametrize("name", GENERATORS)
def test_one_common_order_of_posts_runs_under_every_model(name: str) -> None:
    for origin, schedule in schedules_of(name)[::3]:
        for channels in MODELS:
            assert not why_programs_fail(schedule, in_one_order(schedule), channels), (origin, channels)


# --- what an error says -------------------------------------------------------------------------------------

PLACE = re.compile(r"rank (\d+)(?:, step| at step) (\d+)")
OTHER_PLACE = re.compile(r"stage \d+, micro-batch \d+|ranks \d+ to \d+: message \d+|from rank \d+|got \d+ programs")
LINE = re.compile(r" *rank (\d+), steps (\d+) to \d+:(.*)")


def marked_cells(note: str) -> set[tuple[int, int]]:
    """Rank and step of what stands between > and <; what follows a gap in its line is left out."""
    found = set()
    for rank, first, cells in LINE.findall(note):
        for step, cell in enumerate(re.findall(r">[^<>]*<|[^\s<>]+", cells.split(" ... ")[0]), start=int(first)):
            if cell.startswith(">"):
                found.add((int(rank), step))
    return found


def cells_after_a_gap(note: str) -> set[tuple[int, str]]:
    return {(int(rank), cell) for rank, _, cells in LINE.findall(note) for cell in re.findall(r">([^<>]*)<", cells)}


@pytest.mark.parametrize("channels", MODELS)
def test_an_error_names_the_place_and_its_note_marks_it(channels: str) -> None:
    named = 0
    for seed in range(300 * MODELS.index(channels), 300 * MODELS.index(channels) + 300):
        spoilt = mutant(seed)
        error = refused(spoilt, channels)
        if error is None:
            continue
        sentence, notes = str(error), "\n".join(getattr(error, "__notes__", []))
        places = {(int(rank), int(step)) for rank, step in PLACE.findall(sentence)}
        assert places or OTHER_PLACE.search(sentence), f"no place in: {sentence}\n{spoilt}"
        for rank, step in places:
            row = spoilt.schedule.rows[rank]
            if step == len(row):  # the program goes on behind the row's last action, where there is no cell
                continue
            named += 1
            action = str(row[step])
            assert (rank, step) in marked_cells(notes) or (rank, action) in cells_after_a_gap(notes), (
                f"rank {rank}, step {step} ({action}) is not marked in\n{notes}\nof: {sentence}\n{spoilt}"
            )
    assert named > 50


A_TRANSFER = r"the \w+ of \w+ from rank \d+ to \d+"
LINK = re.compile(
    rf"rank (\d+) at (?:step (\d+) \(\S+\)|the end) waits for ({A_TRANSFER})(?:, behind ({A_TRANSFER}) in its queue)?"
    rf"(?:, which rank \d+ has behind ({A_TRANSFER}))?(?:;|$)"
)


@pytest.mark.parametrize("channels", MODELS)
def test_the_circle_told_is_the_one_that_brute_force_ends_in(channels: str) -> None:
    circles = 0
    for seed in range(250):
        spoilt = mutant(seed)
        error = refused(spoilt, channels)
        if error is None or not str(error).startswith("deadlock"):
            continue
        programs = spoilt.programs or lower(spoilt.schedule).programs
        world = left_alone(spoilt.schedule, programs, channels, None)
        links = LINK.findall(str(error))
        assert len(links) > 1, error
        for link, (following, *_) in zip(links, links[1:] + links[:1], strict=True):
            require_true(world, link, int(following), f"{channels}: {link} of {error}\n{spoilt}")
        circles += 1
    assert circles > 0


def require_true(world: World, link: tuple[str, ...], following: int, told: str) -> None:
    """The rank waits there; what it waits for, or what is ahead of that, needs the next rank, which is not there."""
    rank, step, waited, ahead, ahead_there = int(link[0]), *link[1:]
    row = world.schedule.rows[rank]
    assert len(row) - len(world.rows_left[rank]) == (int(step) if step else len(row)), told
    wait = world.left[rank][0]
    assert str(wait) == f"wait for {waited}", told
    head = head_of_queue(world, rank, waited)
    missing = ahead or waited
    assert missing in names_still(head), told
    assert (missing == waited) == (waited in names_still(head)), told
    assert {str(rank), str(following)} == set(re.findall(r"\d+", missing.partition(" from ")[2])), told
    posted_there = [operation for operation in world.operations[following] if str(operation.called) == missing]
    assert bool(posted_there) == bool(ahead_there), told
    if ahead_there:
        there = head_of_queue(world, following, missing)
        assert missing not in names_still(there), told
        assert ahead_there in names_still(there), told


def head_of_queue(world: World, rank: int, name: str) -> Kernel:
    """The first kernel of the queue in which that rank's side of the transfer stands."""
    kernel = next(operation.kernel for operation in world.operations[rank] if str(operation.called) == name)
    return next(queue[0] for queue in world.queues.values() if kernel in queue)


def names_still(kernel: Kernel) -> set[str]:
    """What in it has not moved."""
    return {str(operation.called) for operation in kernel.operations if not operation.moved}


# --- the memory cap -----------------------------------------------------------------------------------------


def within(schedule: Schedule, most: int) -> bool:
    try:
        check(schedule, most_activations=most)
    except ScheduleError:
        return False
    return True


def test_the_memory_cap_is_the_most_that_counting_finds() -> None:
    schedules = [schedule for name in GENERATORS for _, schedule in schedules_of(name)[::3]]
    for schedule in [*schedules, *(random_runnable(seed, 3, 4, 4) for seed in range(30))]:
        most = max(map(most_activations_held, schedule.rows))
        assert within(schedule, most), schedule
        with pytest.raises(ScheduleError, match=rf"rank \d+, step \d+.*\b{most - 1}\b"):
            check(schedule, most_activations=most - 1)


def test_the_memory_cap_on_mutants_is_what_counting_says() -> None:
    for seed in range(0, 300, 2):
        spoilt = mutant(seed).schedule
        if spoilt.mode == "train" and not why_rows_fail(spoilt):
            most = max(map(most_activations_held, spoilt.rows))
            assert [within(spoilt, cap) for cap in (most - 1, most, most + 1)] == [False, True, True], spoilt
