"""An action is written as torch pipelining writes it, and read back from exactly that."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Action
from counterflow.errors import ScheduleError
from counterflow.schedule import Kind
from strategies import actions, simple_actions

NO_ACTION = (
    "{!r} is not an action; write stage, one of F B I W, micro-batch, as in 3F12, or (0F4;7B1)OVERLAP_F_B, "
    "with numbers below a million"
)


@given(actions)
def test_an_action_is_read_back_from_its_text(action: Action) -> None:
    assert Action.parse(str(action)) == action


@given(st.text(alphabet="0123456789FBIWX();OVERLAP_ \t\n\0\u0661\u00b2") | st.text())
def test_nothing_but_the_text_of_an_action_is_read(text: str) -> None:
    try:
        action = Action.parse(text)
    except ScheduleError:
        return
    assert str(action) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "F0",
        "0F",
        "0X0",
        "0f0",
        "-1F0",
        "+1F0",
        "1_0F0",
        "00F1",
        "0F01",
        "0F0junk",
        "0F0 ",
        "0F0\n",
        "0F0\0",
        "0SEND_F1",
        "0REDUCE_GRAD",
        "(0F1;7B0)",
        "(0F1;7B0)OVERLAP_F_B2",
        "(0F1;7B0)OVERLAP",
        "(0F1)OVERLAP_F_B",
        "(0F1;7B0;7W0)OVERLAP_F_B",
        "((0F1;7B0)OVERLAP_F_B;1B2)OVERLAP_F_B",
        "1000000F0",
        pytest.param("1" * 5000 + "F0", id="5000 digits"),
        pytest.param("\u0661F0", id="Arabic digit"),
        pytest.param("\u00b2F0", id="superscript digit"),
        pytest.param("(" * 5000, id="5000 parentheses"),
    ],
)
def test_any_other_text_is_refused_with_the_text_and_what_to_write(text: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Action.parse(text)
    assert str(caught.value) == NO_ACTION.format(text)


def test_a_bad_half_of_an_overlapped_action_is_named() -> None:
    with pytest.raises(ScheduleError) as caught:
        Action.parse("(0F1;7C0)OVERLAP_F_B")
    assert str(caught.value) == NO_ACTION.format("7C0")


@pytest.mark.parametrize(("forward", "backward"), [("0B1", "7F0"), ("0F1", "7W0"), ("0F1", "7F0"), ("0F1", "7B1")])
def test_only_a_forward_and_a_backward_of_two_microbatches_overlap(forward: str, backward: str) -> None:
    message = (
        f"an overlapped action got {forward} and {backward}; it needs a forward, then a backward (B or I) "
        "of another micro-batch"
    )
    pair = Action.parse(forward), Action.parse(backward)
    for build in (
        lambda: Action.overlap(*pair),
        lambda: Action(Kind.F_B, pair[0].stage, pair[0].microbatch, pair),
        lambda: Action.parse(f"({forward};{backward})OVERLAP_F_B"),
    ):
        with pytest.raises(ScheduleError) as caught:
            build()
        assert str(caught.value) == message


def test_a_pair_belongs_to_overlapped_actions_alone() -> None:
    pair = Action.parse("0F1"), Action.parse("7B0")
    with pytest.raises(ScheduleError, match=r"kind OVERLAP_F_B got None as its pair; .* Action.overlap\(forward, "):
        Action(Kind.F_B, 0, 1)
    with pytest.raises(ScheduleError, match=r"kind F got .* as its pair; only OVERLAP_F_B has one"):
        Action(Kind.F, 0, 1, pair)


def test_stages_and_microbatches_count_from_zero() -> None:
    with pytest.raises(ScheduleError) as caught:
        Action(Kind.F, -1, 2)
    assert str(caught.value) == "an action got stage -1 and micro-batch 2; both count from 0 and stay below 1,000,000"


@given(simple_actions)
def test_a_simple_action_is_its_own_only_part(action: Action) -> None:
    assert action.parts == (action,)


@given(actions, actions)
def test_actions_are_frozen_and_equal_by_what_they_say(one: Action, other: Action) -> None:
    assert (one == other) == (str(one) == str(other))
    assert len({one, Action.parse(str(one))}) == 1
    with pytest.raises(FrozenInstanceError):
        one.stage = 3  # type: ignore[misc]
