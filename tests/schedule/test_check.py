"""What `check` says, and what it lets through; test_mutants.py holds its verdicts against brute force."""

import pytest
from hypothesis import given

from counterflow import Action, Schedule, check, one_f_one_b
from counterflow.errors import ScheduleError
from counterflow.schedule import Post, Run, Transfer, Transfers, Wait, check_transfers, from_text, lower
from counterflow.schedule.transfers import Instruction
from strategies import runnable_schedules


@given(runnable_schedules)
def test_schedules_that_run_pass(schedule: Schedule) -> None:
    check(schedule)


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
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    assert str(caught.value) == message


# --- programs -----------------------------------------------------------------------------------------------


# --- programs -----------------------------------------------------------------------------------------------

FIRST = Transfer("activation", 0, 0, source=0, target=1)
SECOND = Transfer("activation", 0, 1, source=0, target=1)
ANSWER = Transfer("gradient", 1, 0, source=1, target=0)
ELSEWHERE = Transfer("activation", 0, 0, source=0, target=2)
RUN, NEXT = Run(Action.parse("0F0")), Run(Action.parse("1F0"))


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
            ([Post((FIRST,)), Wait(FIRST)], [Wait(FIRST), Post((FIRST,))]),
            "rank 1 waits for the activation of 0F0 from rank 0 to 1 without posting it before; post it ahead",
        ),
        (
            ([Post((FIRST,)), Wait(FIRST)], [Post((FIRST, ELSEWHERE)), Wait(FIRST), Wait(ELSEWHERE)]),
            "rank 1 posts the activation of 0F0 from rank 0 to 2 without being one of its two ends; remove that post",
        ),
        (
            ([], [], []),
            "the schedule has 2 ranks and got 3 programs; give one for each",
        ),
        (
            ([RUN, Post((FIRST,)), Wait(FIRST)], [Post((FIRST,)), Wait(FIRST)]),
            "rank 1, step 0: the program runs nothing where the row has 1F0; run the row in its order",
        ),
        (
            ([RUN, RUN], [NEXT]),
            "rank 0, step 1: the program runs 0F0 where the row has nothing; run the row in its order",
        ),
        (
            ([Post((FIRST,)), RUN, Wait(FIRST)], [Post((FIRST,)), Wait(FIRST), NEXT]),
            "rank 0, step 0: the activation of 0F0 from rank 0 to 1 is sent before step 0 makes it; send it behind",
        ),
        (
            ([RUN, Post((FIRST,)), Wait(FIRST)], [Post((FIRST,)), NEXT, Wait(FIRST)]),
            "rank 1, step 0: 1F0 does not wait for the activation of 0F0 from rank 0 to 1; wait for it ahead of that "
            "action",
        ),
        (
            ([RUN], [NEXT]),
            "rank 1, step 0: 1F0 does not wait for the activation of 0F0 from rank 0 to 1; wait for it ahead of that "
            "action",
        ),
        (
            ([RUN, Post((ANSWER,)), Wait(ANSWER)], [NEXT, Post((ANSWER,)), Wait(ANSWER)]),
            "rank 0 posts the gradient of 1B0 from rank 1 to 0, which nobody needs; remove it",
        ),
    ],
)
def test_programs_that_do_not_fit_are_told_apart(programs: tuple[list[Instruction], ...], message: str) -> None:
    transfers = Transfers(from_text("0F0\n1F0"), tuple(map(tuple, programs)))
    with pytest.raises(ScheduleError) as caught:
        check_transfers(transfers)
    assert str(caught.value) == message


def test_programs_in_a_circle_are_told_with_the_actions_that_they_have_come_to() -> None:
    transfers = lower(one_f_one_b(2, 1))
    row, other = ([Run(action) for action in row] for row in transfers.schedule.rows)
    programs = (
        (row[0], Post((ANSWER,)), Wait(ANSWER), Post((FIRST,)), Wait(FIRST), row[1]),
        (Post((FIRST,)), Wait(FIRST), *other, Post((ANSWER,)), Wait(ANSWER)),
    )
    with pytest.raises(ScheduleError) as caught:
        check_transfers(Transfers(transfers.schedule, programs))
    assert str(caught.value) == (
        "deadlock: rank 0 at step 1 (0B0) waits for the gradient of 1B0 from rank 1 to 0; "
        "rank 1 at step 0 (1F0) waits for the activation of 0F0 from rank 0 to 1; "
        "these wait for each other in a circle: reorder one of their rows"
    )
    assert caught.value.__notes__ == ["  rank 0, steps 0 to 1: 0F0 >0B0<\n  rank 1, steps 0 to 1:>1F0< 1B0"]
