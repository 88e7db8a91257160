"""A chunk plan issues every step once and none before what it reads; the published orders are three such plans."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import ScheduleError
from counterflow.schedule.chunk_plans import (
    COMMUNICATION,
    DECODE,
    PREFILL,
    TRAINING,
    ChunkPlan,
    Step,
    Steps,
    backward_steps,
    forward_steps,
    in_a_row,
    lay_out,
    one_after_the_other,
)

blocks = st.lists(st.booleans(), min_size=1, max_size=4)


def pair(pattern: str, one: list[bool], other: list[bool]) -> tuple[Steps, Steps]:
    if pattern == TRAINING:
        return forward_steps(one), backward_steps(other)
    halves = pattern == DECODE
    return (
        forward_steps(one, "0", halves=halves, receives=halves),
        forward_steps(other, "1", halves=halves, receives=halves),
    )


@given(pattern=st.sampled_from([TRAINING, PREFILL, DECODE]), one=blocks, other=blocks)
def test_the_published_orders_are_legal_for_any_two_chunks(pattern: str, one: list[bool], other: list[bool]) -> None:
    programs = pair(pattern, one, other)
    plan = lay_out(pattern, *programs)
    assert sorted(plan.order) == sorted(one_after_the_other(*programs).order)


def test_training_in_two_layers() -> None:
    plan = lay_out(TRAINING, forward_steps([False] * 2), backward_steps([False] * 2))
    layer = "attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) attn(W)"
    assert " ".join(plan.names) == f"tail(B) combine(B) tail(W) {layer} combine(B) {layer} tail(F)"


def test_prefill_in_two_layers() -> None:
    plan = lay_out(PREFILL, forward_steps([True] * 2, "0"), forward_steps([True] * 2, "1"))
    first = "attn0 dispatch0 attn1 dispatch1 mlp0 combine0 mlp1 combine1 shared0"
    later = "attn0 dispatch0 shared1 attn1 dispatch1 mlp0 combine0 mlp1 combine1 shared0"
    assert " ".join(plan.names) == f"{first} {later} tail0 shared1 tail1"


def test_in_decode_the_other_half_computes_between_a_send_and_its_receive() -> None:
    names = lay_out(DECODE, *pair(DECODE, [True] * 3, [True] * 3)).names
    for sent, name in enumerate(names):
        if name[:-1] in ("dispatch", "combine"):
            received = names.index(f"{name[:-1]}-recv{name[-1]}", sent)
            between = {step for step in names[sent + 1 : received] if step.startswith(("attn", "mlp"))}
            last = name[-1] == "1" and "tail0" in names[:received]  # nothing is left to hide the last rows under
            assert last or any(not step.endswith(name[-1]) for step in between)


@given(one=blocks, other=blocks)
def test_every_transfer_of_training_but_the_ends_has_compute_of_the_other_to_hide_under(
    one: list[bool], other: list[bool]
) -> None:
    layers = min(len(one), len(other))
    plan = lay_out(TRAINING, *pair(TRAINING, one[:layers], other[:layers]))
    for place, (program, step) in enumerate(plan.order):
        if plan.programs[program][step].lane != COMMUNICATION:
            continue
        reader = next(
            later
            for later, (whose, what) in enumerate(plan.order)
            if whose == program and step in plan.programs[program][what].needs
        )
        # The first pieces of a program have no other half yet, the last ones none any more.
        inner = {whose for whose, _ in plan.order[:place]} == {whose for whose, _ in plan.order[reader:]} == {0, 1}
        assert not inner or any(whose != program for whose, _ in plan.order[place:reader])


@given(chunks=st.lists(st.tuples(blocks, blocks), min_size=1, max_size=3), pattern=st.sampled_from([TRAINING, PREFILL]))
def test_plans_in_a_row_leave_no_break_between_them(chunks: list[tuple[list[bool], list[bool]]], pattern: str) -> None:
    plans = [lay_out(pattern, *pair(pattern, *chunk)) for chunk in chunks]
    whole = in_a_row(*plans)
    assert len(whole.order) == sum(len(plan.order) for plan in plans)
    for number in range(len(plans)):
        own = [(p - 2 * number, s) for p, s in whole.order if p // 2 == number]
        assert own == list(plans[number].order)
    last_transfers = [
        whole.order.index((2 * n + p, s)) for n, plan in enumerate(plans) for p, s in [last_transfer(plan)]
    ]
    for number, sent in enumerate(last_transfers[:-1]):
        program, _ = whole.order[sent + 1]
        assert program // 2 == number + 1


def last_transfer(plan: ChunkPlan) -> tuple[int, int]:
    return [(p, s) for p, s in plan.order if plan.programs[p][s].lane == COMMUNICATION][-1]


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_step_before_what_it_reads_is_refused_by_name() -> None:
    steps = forward_steps([False, False])
    early = [0, 1, 3, 2, *range(4, len(steps))]
    with pytest.raises(ScheduleError) as refused:
        ChunkPlan((steps,), tuple((0, place) for place in early))
    assert str(refused.value) == (
        "a plan issues combine(F) of layer 0 before mlp(F) of layer 0, whose result it reads; issue that one first"
    )


def test_a_step_of_a_backward_is_named_with_its_block_which_is_the_last_one_first() -> None:
    steps = backward_steps([False, True], weights=False)
    with pytest.raises(ScheduleError, match=r"issues shared\(B\) of layer 1 before tail\(B\) of layer 1, whose result"):
        ChunkPlan((steps,), ((0, 2), (0, 0)))
    assert [str(step) for step in steps][-4:] == [
        "combine(B) of layer 0",
        "mlp(B) of layer 0",
        "dispatch(B) of layer 0",
        "attn(B) of layer 0",
    ]


def test_a_step_twice_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"issues attn\(F\) of layer 0 twice; issue each step once"):
        ChunkPlan((forward_steps([False]),), ((0, 0), (0, 0)))


def test_a_step_that_is_left_out_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"leaves out tail\(F\) of layer 0; issue every step once"):
        ChunkPlan((forward_steps([False]),), tuple((0, place) for place in range(4)))


def test_a_step_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"step 9 of program 0, which do not exist; number from 0"):
        ChunkPlan((forward_steps([False]),), ((0, 9),))


def test_two_programs_with_steps_of_one_name_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"two programs of a plan have the step .*; give them different marks"):
        lay_out(PREFILL, forward_steps([True], "0"), forward_steps([True], "0"))


def test_steps_that_need_each_other_are_refused() -> None:
    program = (Step("a", COMMUNICATION, (1,)), Step("a", COMMUNICATION, ()))
    with pytest.raises(ScheduleError, match="the steps a need each other or a later one of their name"):
        lay_out("a", program)


@given(one=blocks, other=blocks, seed=st.integers(0, 2**32))
def test_any_order_with_one_step_moved_before_its_need_is_refused(
    one: list[bool], other: list[bool], seed: int
) -> None:
    plan = lay_out(TRAINING, *pair(TRAINING, one, other))
    rng = random.Random(seed)
    order = list(plan.order)
    program, step = rng.choice([(p, s) for p, s in order if plan.programs[p][s].needs])
    needed = rng.choice(plan.programs[program][step].needs)
    order.remove((program, step))
    order.insert(rng.randint(0, order.index((program, needed))), (program, step))
    with pytest.raises(ScheduleError, match="issue that one first"):
        ChunkPlan(plan.programs, tuple(order))
