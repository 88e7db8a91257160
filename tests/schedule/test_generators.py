"""What defines each schedule, over all small sizes; which sizes it exists for."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from counterflow import (
    Action,
    Costs,
    Schedule,
    check,
    dualpipe,
    dualpipev,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    simulate,
    zb1p,
    zbv,
)
from counterflow.errors import ScheduleError
from counterflow.schedule import GENERATORS, STAGES_PER_RANK, Kind, generate, v_half, v_min, zb2p
from counterflow.simulator import peak_activations
from strategies import legal_sizes

STRAIGHT = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb1p": zb1p, "zb2p": zb2p}
EQUALLY_LONG = Costs(forward_us=1, input_us=1, weight_us=1, backward_us=2)
SIZES = [(num_ranks, num_microbatches) for num_ranks in range(1, 9) for num_microbatches in (1, 2, 3, 7, 8, 20)]
DUALPIPE_SIZES = [(num_ranks, 2 * num_ranks + more) for num_ranks in (2, 4, 6, 8) for more in (0, 2, 4, 14)]
DUALPIPEV_SIZES = [(num_ranks, 2 * num_ranks + more) for num_ranks in range(1, 9) for more in (0, 1, 2, 7)]


def parts(schedule: Schedule) -> list[Action]:
    return [part for row in schedule.rows for action in row for part in action.parts]


def renamed(row: tuple[Action, ...], microbatch: Callable[[int], int]) -> list[Action]:
    """The row with every micro-batch called otherwise."""

    def rename(action: Action) -> Action:
        if action.pair is not None:
            return Action.overlap(*map(rename, action.pair))
        return Action(action.kind, action.stage, microbatch(action.microbatch))

    return list(map(rename, row))


# --- all of them --------------------------------------------------------------------------------------------


def sizes_of(name: str) -> list[tuple[int, int]]:
    return [size for generator, *size in legal_sizes(most_ranks=8, most_microbatches=18) if generator == name]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generated_schedule_is_complete_and_runs(name: str) -> None:
    for num_ranks, num_microbatches in sizes_of(name):
        schedule = generate(name, num_ranks, num_microbatches)
        assert (schedule.name, schedule.mode) == (name, "train")
        assert (schedule.num_ranks, schedule.num_microbatches) == (num_ranks, num_microbatches)
        assert schedule.num_stages == STAGES_PER_RANK[name] * num_ranks
        assert len(set(parts(schedule))) == len(parts(schedule))
        of_kind = Counter(part.kind for part in parts(schedule))
        assert of_kind[Kind.F] == schedule.num_stages * num_microbatches
        assert of_kind[Kind.F] == of_kind[Kind.B] + of_kind[Kind.I]
        assert of_kind[Kind.I] == of_kind[Kind.W]
        check(schedule)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generated_schedule_runs_forward_only(name: str) -> None:
    for size in sizes_of(name):
        whole = generate(name, *size)
        forward = whole.forward_only()
        assert parts(forward) == [part for part in parts(whole) if part.kind is Kind.F]
        check(forward)


@pytest.mark.parametrize("name", GENERATORS)
def test_microbatches_of_one_direction_go_through_a_stage_in_order(name: str) -> None:
    for size in sizes_of(name):
        for row in generate(name, *size).rows:
            order: dict[tuple[int, bool, bool], list[int]] = {}
            for part in (part for action in row for part in action.parts):
                way = part.stage, part.kind.sends_gradient, part.kind is Kind.W
                order.setdefault(way, []).append(part.microbatch)
            assert all(microbatches == sorted(microbatches) for microbatches in order.values())


# --- straight pipelines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRAIGHT)
def test_in_a_straight_pipeline_a_rank_holds_the_stage_of_its_number(name: str) -> None:
    for size in SIZES:
        schedule = STRAIGHT[name](*size)
        assert [schedule.stages_of(rank) for rank in range(schedule.num_ranks)] == [
            (rank,) for rank in range(schedule.num_ranks)
        ]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_gpipe_runs_all_forwards_first(num_ranks: int, num_microbatches: int) -> None:
    for row in gpipe(num_ranks, num_microbatches).rows:
        assert "".join(action.kind for action in row) == "F" * num_microbatches + "B" * num_microbatches


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_1f1b_alternates_and_holds_no_more_than_the_ranks_below_need(num_ranks: int, num_microbatches: int) -> None:
    schedule = one_f_one_b(num_ranks, num_microbatches)
    assert peak_activations(schedule) == [min(num_ranks - rank, num_microbatches) for rank in range(num_ranks)]
    for rank, row in enumerate(schedule.rows):
        kinds = "".join(action.kind for action in row)
        assert re.fullmatch("F*(FB)*B*", kinds)
        assert kinds.index("B") == min(num_ranks - rank, num_microbatches)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_zb1p_is_1f1b_with_its_backwards_cut_and_delayed(num_ranks: int, num_microbatches: int) -> None:
    cut, whole = zb1p(num_ranks, num_microbatches), one_f_one_b(num_ranks, num_microbatches)
    for rank in range(num_ranks):
        without_weights = [action for action in cut.rows[rank] if action.kind is not Kind.W]
        assert [str(action).replace("I", "B") for action in without_weights] == list(map(str, whole.rows[rank]))
        inputs_done = 0
        for action in cut.rows[rank]:
            inputs_done += action.kind is Kind.I
            if action.kind is Kind.W:
                assert inputs_done == min(action.microbatch + rank + 1, num_microbatches)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_zb1p_holds_as_much_on_every_rank_as_1f1b_on_its_first(num_ranks: int, num_microbatches: int) -> None:
    assert peak_activations(zb1p(num_ranks, num_microbatches)) == [min(num_ranks, num_microbatches)] * num_ranks


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_zb2p_is_zb1p_with_twice_the_forwards_and_twice_the_delay(num_ranks: int, num_microbatches: int) -> None:
    for rank, row in enumerate(zb2p(num_ranks, num_microbatches).rows):
        kinds = "".join(action.kind for action in row)
        assert re.fullmatch("F*(IF)*I*", kinds.replace("W", ""))
        assert kinds.index("I") == min(2 * (num_ranks - rank) - 1, num_microbatches)
        inputs_done = 0
        for action in row:
            inputs_done += action.kind is Kind.I
            if action.kind is Kind.W:
                assert inputs_done == min(action.microbatch + 2 * rank + 1, num_microbatches)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_zb2p_holds_one_activation_less_than_twice_its_ranks(num_ranks: int, num_microbatches: int) -> None:
    assert peak_activations(zb2p(num_ranks, num_microbatches)) == [min(2 * num_ranks - 1, num_microbatches)] * num_ranks


# --- bubbles, with F, I and W equally long ------------------------------------------------------------------


def waits(schedule: Schedule) -> list[int]:
    """For each rank how long it waits between the start of its first action and the end of its last."""
    timeline = simulate(schedule, EQUALLY_LONG)
    spans = [[span for span in timeline if span.rank == rank] for rank in range(schedule.num_ranks)]
    return [
        (max(span.end_ns for span in row) - min(span.start_ns for span in row) - sum(span.duration_ns for span in row))
        // 1000
        for row in spans
    ]


def bubble(schedule: Schedule) -> int:
    """How much longer the step is than a rank's work."""
    work = 3 * schedule.num_microbatches * schedule.num_stages // schedule.num_ranks
    return simulate(schedule, EQUALLY_LONG).makespan_ns // 1000 - work


@pytest.mark.parametrize("generator", [zb2p, zbv])
def test_with_enough_microbatches_no_rank_of_zb2p_and_zbv_ever_waits(generator: Callable[[int, int], Schedule]) -> None:
    for num_ranks in range(1, 9):
        for more in (0, 1, 2, 9):
            schedule = generator(num_ranks, 2 * num_ranks - 1 + more)
            assert waits(schedule) == [0] * num_ranks
            assert bubble(schedule) == num_ranks - 1


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_zb1p_has_a_third_of_the_bubble_of_1f1b(num_ranks: int) -> None:
    for num_microbatches in (num_ranks, num_ranks + 1, 3 * num_ranks):
        assert bubble(one_f_one_b(num_ranks, num_microbatches)) == 3 * (num_ranks - 1)
        assert bubble(zb1p(num_ranks, num_microbatches)) == num_ranks - 1


@pytest.mark.parametrize("num_ranks", range(1, 12))
def test_the_bubbles_of_the_v_schedules_are_no_longer_than_stated(num_ranks: int) -> None:
    for num_microbatches in range(1, 3 * num_ranks + 2):
        if num_microbatches >= num_ranks:
            assert bubble(zbv(num_ranks, num_microbatches)) == num_ranks - 1
        if 2 * num_microbatches >= num_ranks:
            assert bubble(v_half(num_ranks, num_microbatches)) <= 3 * (num_ranks - 1)
        assert bubble(v_min(num_ranks, num_microbatches)) <= 4 * (num_ranks - 1)


@pytest.mark.parametrize(("chunks", "num_ranks"), [(1, 4), (2, 1), (2, 3), (3, 4), (4, 8)])
def test_chunks_divide_the_bubble_of_1f1b(chunks: int, num_ranks: int) -> None:
    for rounds in (1, 2, 5):
        schedule = interleaved_1f1b(num_ranks, rounds * num_ranks, chunks)
        stage = Costs(forward_us=1 / chunks, backward_us=2 / chunks)
        bubble_us = simulate(schedule, stage).makespan_ns / 1000 - 3 * rounds * num_ranks
        assert bubble_us == pytest.approx(3 * (num_ranks - 1) / chunks, abs=1e-3 * len(schedule.rows[0]))


@pytest.mark.parametrize(
    ("overlapped_us", "interleaved_us", "dualpipe_us"), [(2.4, 47.4, 48), (3, 53.25, 54)], ids=["gain", "no gain"]
)
def test_at_equal_devices_dualpipe_is_not_the_shortest(
    overlapped_us: float, interleaved_us: float, dualpipe_us: float
) -> None:
    def step_us(schedule: Schedule, stages_per_rank: int) -> float:
        forward_us, backward_us, weight_us, both_us = (cost / stages_per_rank for cost in (1, 2, 1, overlapped_us))
        return simulate(schedule, Costs(forward_us, backward_us, None, weight_us, both_us)).makespan_ns / 1000

    assert step_us(interleaved_1f1b(8, 16, chunks=4, overlap=True), 4) == interleaved_us
    assert step_us(dualpipe(8, 16), 1) == dualpipe_us
    assert step_us(zbv(8, 16), 2) == 51.5


def test_v_min_pays_for_its_memory_where_f_i_and_w_differ() -> None:
    uneven = Costs(forward_us=1, input_us=1.5, weight_us=1)
    for generator, grows in ((v_min, True), (v_half, False), (zbv, False)):
        few, many = (simulate(generator(8, m), uneven).makespan_ns / 1000 - 7 * m for m in (32, 64))
        assert (many > 1.5 * few) is grows


# --- interleaved --------------------------------------------------------------------------------------------

INTERLEAVED_SIZES = [
    (num_ranks, num_microbatches, chunks)
    for num_ranks in (1, 2, 4, 5)
    for num_microbatches in (1, 3, 4, 5, 8, 10, 20)
    for chunks in (1, 2, 3)
    if num_microbatches % max(1, num_microbatches // num_ranks) == 0
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("num_ranks", "num_microbatches", "chunks"), INTERLEAVED_SIZES)
def test_interleaved_1f1b_runs_with_any_number_of_chunks(
    num_ranks: int, num_microbatches: int, chunks: int, overlap: bool
) -> None:
    schedule = interleaved_1f1b(num_ranks, num_microbatches, chunks, overlap)
    check(schedule)
    check(schedule.forward_only())
    for rank in range(num_ranks):
        assert schedule.stages_of(rank) == tuple(range(rank, chunks * num_ranks, num_ranks))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("num_ranks", "num_microbatches", "chunks"), INTERLEAVED_SIZES)
def test_interleaved_1f1b_alternates_after_its_first_forwards(
    num_ranks: int, num_microbatches: int, chunks: int, overlap: bool
) -> None:
    schedule = interleaved_1f1b(num_ranks, num_microbatches, chunks, overlap)
    round_size = num_microbatches // max(1, num_microbatches // num_ranks)
    for rank, row in enumerate(schedule.rows):
        first = (chunks - 1) * round_size + 2 * (num_ranks - 1 - rank) + overlap
        first = min(first, chunks * num_microbatches)
        pairs = chunks * num_microbatches - first
        kinds = "".join("&" if action.pair else action.kind for action in row)
        assert kinds == "F" * first + ("&" if overlap else "FB") * pairs + "B" * first
        # Inside a pair the forward has stored and the backward has not yet freed.
        assert peak_activations(schedule)[rank] == first + (pairs > 0)


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "chunks"), INTERLEAVED_SIZES)
def test_overlap_changes_nothing_but_how_early_the_backwards_begin(
    num_ranks: int, num_microbatches: int, chunks: int
) -> None:
    plain, overlapped = (interleaved_1f1b(num_ranks, num_microbatches, chunks, overlap) for overlap in (False, True))

    def order(row: tuple[Action, ...], forward: bool) -> list[Action]:
        return [part for action in row for part in action.parts if (part.kind is Kind.F) is forward]

    for row, other in zip(plain.rows, overlapped.rows, strict=True):
        assert order(row, True) == order(other, True)
        assert order(row, False) == order(other, False)


# --- in the shape of a V ------------------------------------------------------------------------------------

ROOM = {
    "zbv": lambda num_ranks: 2 * num_ranks,
    "v-half": lambda num_ranks: 2 * ((num_ranks + 2) // 2),
    "v-min": lambda num_ranks: 2 * ((num_ranks + 4) // 3),
}


@pytest.mark.parametrize("name", ROOM)
def test_a_rank_of_a_v_holds_a_stage_of_each_way_and_no_more_activations_than_stated(name: str) -> None:
    for num_ranks in range(1, 13):
        for num_microbatches in (1, 2, num_ranks, 2 * num_ranks + 1, 40):
            schedule = generate(name, num_ranks, num_microbatches)
            assert max(peak_activations(schedule)) <= ROOM[name](num_ranks)
            for rank in range(num_ranks):
                assert schedule.stages_of(rank) == (rank, 2 * num_ranks - 1 - rank)


@pytest.mark.parametrize(("name", "part"), [("zbv", 1), ("v-half", 2), ("v-min", 3)])
def test_a_v_needs_its_part_of_the_memory_of_1f1b_and_less_than_three_activations_more(name: str, part: int) -> None:
    for num_ranks in range(1, 40):
        assert part * (ROOM[name](num_ranks) - 3) < 2 * num_ranks


# --- DualPipe -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), DUALPIPE_SIZES)
def test_dualpipe_is_its_own_mirror_image(num_ranks: int, num_microbatches: int) -> None:
    schedule, half = dualpipe(num_ranks, num_microbatches), num_microbatches // 2
    for rank, row in enumerate(schedule.rows):
        mirrored = renamed(row, lambda microbatch: (microbatch + half) % num_microbatches)
        assert list(schedule.rows[num_ranks - 1 - rank]) == mirrored


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), DUALPIPE_SIZES)
def test_half_of_the_microbatches_enter_at_each_end(num_ranks: int, num_microbatches: int) -> None:
    schedule = dualpipe(num_ranks, num_microbatches)
    for rank, row in enumerate(schedule.rows):
        for part in (part for action in row for part in action.parts):
            assert part.stage == (rank if part.microbatch < num_microbatches // 2 else num_ranks - 1 - rank)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), DUALPIPEV_SIZES)
def test_dualpipev_is_the_first_half_of_a_dualpipe_twice_as_large(num_ranks: int, num_microbatches: int) -> None:
    folded, whole = dualpipev(num_ranks, num_microbatches), dualpipe(2 * num_ranks, 2 * num_microbatches)
    for rank in range(num_ranks):
        assert list(folded.rows[rank]) == renamed(whole.rows[rank], lambda microbatch: microbatch % num_microbatches)


def cut_backwards(row: tuple[Action, ...]) -> tuple[int, int]:
    """How many backwards a row cuts in two, and how many W stand behind its last I."""
    kinds = "".join(action.kind if action.pair is None else "&" for action in row)
    assert kinds.count("I") == kinds.count("W")
    return kinds.count("I"), kinds[kinds.rindex("I") :].count("W")


@pytest.mark.parametrize("num_microbatches", [16, 20, 40])
def test_how_often_dualpipe_cuts_its_backwards(num_microbatches: int) -> None:
    cuts, left_over = zip(*map(cut_backwards, dualpipe(8, num_microbatches).rows), strict=True)
    assert cuts == (7, 6, 5, 4, 4, 5, 6, 7)
    assert left_over == (1, 2, 3, 4, 4, 3, 2, 1)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), DUALPIPE_SIZES)
def test_only_the_middle_ranks_run_their_first_pair_apart(num_ranks: int, num_microbatches: int) -> None:
    middle = {num_ranks // 2 - 1, num_ranks // 2}
    for rank, row in enumerate(dualpipe(num_ranks, num_microbatches).rows):
        backwards = [action for action in row if any(part.kind is Kind.B for part in action.parts)]
        assert (backwards[0].kind is Kind.B) == (rank in middle)
        if rank in middle:
            before = row[row.index(backwards[0]) - 1]
            assert before.kind is Kind.F
            assert before.stage != backwards[0].stage


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), DUALPIPE_SIZES)
def test_dualpipe_holds_one_activation_more_than_it_has_ranks(num_ranks: int, num_microbatches: int) -> None:
    assert peak_activations(dualpipe(num_ranks, num_microbatches)) == [num_ranks + 1] * num_ranks


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), DUALPIPEV_SIZES)
def test_dualpipev_holds_one_activation_more_than_it_has_stages(num_ranks: int, num_microbatches: int) -> None:
    assert peak_activations(dualpipev(num_ranks, num_microbatches)) == [2 * num_ranks + 1] * num_ranks


@pytest.mark.parametrize("schedule", [dualpipe(8, 20), dualpipev(4, 10)], ids=["dualpipe", "dualpipev"])
def test_weights_wait_first_in_first_out(schedule: Schedule) -> None:
    for row in schedule.rows:
        inputs, weights = (
            [(action.stage, action.microbatch) for action in row if action.kind is kind] for kind in (Kind.I, Kind.W)
        )
        assert inputs == weights


# --- which sizes exist --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "message"),
    [
        ("gpipe", 0, 4, "gpipe got 0 ranks; it needs at least 1: the nearest legal value is 1"),
        ("gpipe", 4, 0, "gpipe got 0 micro-batches on 4 ranks; it needs at least 1: the nearest legal value is 1"),
        ("1f1b", -3, 4, "1f1b got -3 ranks; it needs at least 1: the nearest legal value is 1"),
        ("1f1b", 4, -1, "1f1b got -1 micro-batches on 4 ranks; it needs at least 1: the nearest legal value is 1"),
        ("zb1p", 0, 0, "zb1p got 0 ranks; it needs at least 1: the nearest legal value is 1"),
        ("zb1p", 2, 0, "zb1p got 0 micro-batches on 2 ranks; it needs at least 1: the nearest legal value is 1"),
        (
            "dualpipe",
            7,
            20,
            "dualpipe got 7 ranks; it needs an even number of at least 2: the nearest legal values are 6 and 8",
        ),
        (
            "dualpipe",
            1,
            20,
            "dualpipe got 1 rank; it needs an even number of at least 2: the nearest legal value is 2",
        ),
        (
            "dualpipe",
            0,
            20,
            "dualpipe got 0 ranks; it needs an even number of at least 2: the nearest legal value is 2",
        ),
        (
            "dualpipe",
            8,
            21,
            "dualpipe got 21 micro-batches on 8 ranks; it needs an even number of at least 16: "
            "the nearest legal values are 20 and 22",
        ),
        (
            "dualpipe",
            8,
            15,
            "dualpipe got 15 micro-batches on 8 ranks; it needs an even number of at least 16: "
            "the nearest legal value is 16",
        ),
        ("dualpipev", 0, 4, "dualpipev got 0 ranks; it needs at least 1: the nearest legal value is 1"),
        (
            "dualpipev",
            4,
            7,
            "dualpipev got 7 micro-batches on 4 ranks; it needs at least 8: the nearest legal value is 8",
        ),
    ],
)
def test_an_illegal_size_is_told_with_the_nearest_legal_ones(
    name: str, num_ranks: int, num_microbatches: int, message: str
) -> None:
    with pytest.raises(ScheduleError) as caught:
        generate(name, num_ranks, num_microbatches)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_refuses_exactly_the_illegal_sizes_and_names_legal_ones(name: str) -> None:
    legal = set(legal_sizes(most_ranks=9, most_microbatches=19))
    for num_ranks in range(-2, 10):
        for num_microbatches in range(-2, 20):
            try:
                generate(name, num_ranks, num_microbatches)
            except ScheduleError as error:
                assert (name, num_ranks, num_microbatches) not in legal
                told, nearest = str(error).split(": the nearest legal value")
                for value in map(int, re.findall(r"\d+", nearest)):
                    size = (num_ranks, value) if "micro-batches" in told else (value, 40)
                    generate(name, *size)
            else:
                assert (name, num_ranks, num_microbatches) in legal


def test_rounds_of_unequal_length_are_told_with_the_nearest_equal_ones() -> None:
    with pytest.raises(ScheduleError) as caught:
        interleaved_1f1b(4, 9)
    assert str(caught.value) == (
        "interleaved-1f1b got 9 micro-batches on 4 ranks; it needs as many in each of its 2 rounds of at least 4: "
        "the nearest legal values are 8 and 10"
    )


def test_chunks_are_for_the_interleaved_alone() -> None:
    assert generate("interleaved-1f1b-overlap", 2, 4, chunks=3) == interleaved_1f1b(2, 4, 3, overlap=True)
    with pytest.raises(ScheduleError, match=r"^interleaved-1f1b got 0 chunks on each rank; it needs at least 1: "):
        generate("interleaved-1f1b", 2, 4, chunks=0)
    for name in GENERATORS:
        if not name.startswith("interleaved"):
            with pytest.raises(ScheduleError, match=f"^{name} got 2 chunks on each rank; only interleaved"):
                generate(name, 4, 8, chunks=2)


def test_an_unknown_schedule_is_told_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError) as caught:
        generate("dualpype", 4, 8)
    known = ", ".join(GENERATORS)
    assert str(caught.value) == f"'dualpype' is no schedule; the known ones are {known}"


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches"), [(2, 10**20), (10**20, 10**21), (2, 2_000_000), (10**6, 2 * 10**6)]
)
def test_sizes_that_no_machine_has_room_for_are_refused_at_once(
    name: str, num_ranks: int, num_microbatches: int
) -> None:
    with pytest.raises(ScheduleError, match="fewer than 1,000,000 micro-batches, and at most 20,000,000 forwards"):
        generate(name, num_ranks, num_microbatches)


@pytest.mark.parametrize("size", [4.0, "4", None, True])
def test_a_size_that_is_no_whole_number_is_told(size: object) -> None:
    with pytest.raises(ScheduleError, match="for its ranks; it needs a whole number"):
        generate("dualpipe", size, 8)


def test_chunks_without_end_are_refused() -> None:
    with pytest.raises(ScheduleError, match="1000000000000 stages each"):
        generate("interleaved-1f1b", 2, 4, chunks=10**12)
