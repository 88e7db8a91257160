"""A schedule is frozen rows; which rank holds what is read off them."""

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given

from counterflow import Action, Schedule, check
from counterflow.errors import ScheduleError
from counterflow.schedule import Kind, dualpipe, dualpipev, from_text, gpipe
from strategies import any_schedules, runnable_schedules


def rows(text: str) -> tuple[tuple[Action, ...], ...]:
    return from_text(text).rows


@given(any_schedules())
def test_schedules_are_frozen_hashable_and_equal_whatever_their_name(schedule: Schedule) -> None:
    renamed = replace(schedule, name=schedule.name + "!")
    assert schedule == renamed
    assert len({schedule, renamed}) == 1
    with pytest.raises(FrozenInstanceError):
        schedule.num_stages = 1  # type: ignore[misc]


@given(any_schedules())
def test_holders_of_a_stage_are_the_ranks_whose_rows_name_it(schedule: Schedule) -> None:
    names = [(rank, part.stage) for rank, row in enumerate(schedule.rows) for action in row for part in action.parts]
    for rank in range(schedule.num_ranks):
        assert schedule.stages_of(rank) == tuple(sorted({stage for at, stage in names if at == rank}))
    for stage in {stage for _, stage in names}:
        assert schedule.ranks_of(stage) == tuple(sorted({at for at, named in names if named == stage}))
        assert schedule.twins.get(stage, ()) in ((), schedule.ranks_of(stage))
        assert (stage in schedule.twins) == (len(schedule.ranks_of(stage)) > 1)


def test_dualpipe_holds_every_stage_twice_and_dualpipev_once() -> None:
    assert dualpipe(6, 12).twins == {stage: tuple(sorted((stage, 5 - stage))) for stage in range(6)}
    assert dualpipev(3, 6).twins == {}


@given(runnable_schedules)
def test_forward_only_keeps_the_forwards_in_their_order_and_runs(schedule: Schedule) -> None:
    forwards = schedule.forward_only()
    assert forwards.mode == "forward"
    assert forwards.name == schedule.name
    for row, whole in zip(forwards.rows, schedule.rows, strict=True):
        assert list(row) == [part for action in whole for part in action.parts if part.kind is Kind.F]
    check(forwards)
    assert forwards.forward_only() == forwards


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule((), 1, 1), "a schedule got no actions; it needs a row of actions for each rank"),
        (lambda: Schedule(((), ()), 1, 1), "a schedule got no actions; it needs a row of actions for each rank"),
        (lambda: Schedule.from_rows([]), "a schedule got no actions; it needs a row of actions for each rank"),
        (
            lambda: Schedule(rows("0F0\n0F1 1F0"), 1, 2),
            "rank 1, step 1: 1F0 is outside the schedule's 1 stages and 2 micro-batches; "
            "correct the action or the stated numbers",
        ),
        (
            lambda: Schedule(rows("(0F0;0B3)OVERLAP_F_B"), 1, 3),
            "rank 0, step 0: (0F0;0B3)OVERLAP_F_B is outside the schedule's 1 stages and 3 micro-batches; "
            "correct the action or the stated numbers",
        ),
        (
            lambda: Schedule(rows("0F0 0B0"), 1, 1, "forward"),
            "rank 0, step 1: 0B0 is a backward in a schedule of mode 'forward'; drop it or state mode 'train'",
        ),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(build, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        build()
    assert str(caught.value) == message


def test_rows_tell_numbers_and_mode() -> None:
    assert Schedule.from_rows(gpipe(3, 5).rows) == gpipe(3, 5)
    assert Schedule.from_rows(gpipe(3, 5).forward_only().rows).mode == "forward"


def test_stated_numbers_far_beyond_the_rows_cost_nothing() -> None:
    schedule = Schedule(rows("0F0 0B0\n0F1 0B1"), num_stages=10**12, num_microbatches=10**12)
    assert schedule.twins == {0: (0, 1)}
    with pytest.raises(ScheduleError, match=r"^stage 0, micro-batch 2 has no action; it needs one F, and one B or "):
        check(schedule)
