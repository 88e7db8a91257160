import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, Schedule, Timeline, dualpipev, simulate
from counterflow.report.gaps import explain, gaps
from counterflow.report.step import Step
from counterflow.schedule import from_text
from counterflow.timeline import Span
from strategies import durations_us, runnable_schedules

# --- simulated time -----------------------------------------------------------------------------------------


@given(runnable_schedules, st.data())
def test_without_latency_a_gap_ends_when_the_named_action_ends(schedule: Schedule, data: st.DataObject) -> None:
    of_stages = st.lists(durations_us, min_size=schedule.num_stages, max_size=schedule.num_stages).map(tuple)
    forward, backward, half, weight = (data.draw(of_stages) for _ in range(4))
    step = Step(schedule, simulate(schedule, Costs(forward, backward, half, weight)))
    for gap in gaps(step):
        if gap.before is None:
            assert gap.end_ns == step.last_action_ns
        else:
            assert gap.waits_for[0].end_ns == gap.end_ns


@given(runnable_schedules)
def test_gaps_and_actions_fill_the_step_of_every_rank(schedule: Schedule) -> None:
    step = Step(schedule, simulate(schedule, Costs(latency_us=0.3)))
    found = list(gaps(step))
    assert all(gap.start_ns < gap.end_ns for gap in found)
    for rank in step.ranks:
        idle_ns = sum(gap.end_ns - gap.start_ns for gap in found if gap.rank == rank)
        assert idle_ns == step.bubble_ns(rank)


def told(schedule: Schedule, timeline: Timeline) -> list[str]:
    step = Step(schedule, timeline)
    return [explain(gap, step).split(": ", maxsplit=1)[1] for gap in gaps(step)]


def test_of_the_two_inputs_of_a_pair_the_later_one_is_named() -> None:
    schedule = from_text("0F0 0F1 0B0 0B1\n1F0 (1F1;1B0)OVERLAP_F_B 1B1\n2F0 2B0 2F1 2B1")
    waits = [reason for reason in told(schedule, simulate(schedule, Costs())) if reason.startswith("(")]
    assert waits == ["(1F1;1B0)OVERLAP_F_B waits for the gradient of 2B0, which rank 2 ends at 5 µs"]


def test_latency_is_told_apart_from_waiting() -> None:
    schedule = from_text("0F0 0B0\n1F0 1B0")
    assert told(schedule, simulate(schedule, Costs(latency_us=0.5)))[1] == (
        "1F0 waits for the activation of 0F0, which rank 0 ends at 1 µs; "
        "the other 0.5 µs are the transfer, and what ranks do between actions"
    )


def test_where_either_of_two_messages_may_have_come_last_both_are_named() -> None:
    schedule = dualpipev(4, 8)
    costs = Costs(1, 2, None, 1, 2.4, bandwidth_gb_per_s=1, transfer_bytes=500)
    reasons = [reason for reason in told(schedule, simulate(schedule, costs)) if reason.startswith("(")]
    assert any(
        re.search(r"the activation of \S+, which rank .* and for the gradient of \S+, which", r) for r in reasons
    )


def test_what_the_rank_makes_itself_needs_no_transfer() -> None:
    schedule = dualpipev(1, 2)
    late = [Span(0, span.name, 2 * span.start_ns, span.start_ns + span.end_ns) for span in simulate(schedule, Costs())]
    reasons = told(schedule, Timeline.from_spans(late))
    assert any("which this rank had ended by then" in reason and "the transfer" not in reason for reason in reasons)


# --- measured time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start_us", "reason"),
    [
        (10, "1F0 waits for the activation of 0F0, which rank 0 ends at 10 µs"),
        (
            12,
            "1F0 waits for the activation of 0F0, which rank 0 ends at 10 µs; "
            "the other 2 µs are the transfer, and what ranks do between actions",
        ),
        (
            9,
            "1F0 waits for the activation of 0F0, which rank 0 ends only at 10 µs by its clock: "
            "the clocks of the two ranks differ",
        ),
    ],
)
def test_a_measured_start_is_set_against_the_end_of_what_it_needs(start_us: int, reason: str) -> None:
    spans = [Span(0, "0F0", 0, 10_000), Span(1, "1F0", 1000 * start_us, 20_000)]
    assert told(from_text("0F0\n1F0"), Timeline.from_spans(spans))[1] == reason


def test_an_input_that_was_there_before_the_gap_is_not_blamed() -> None:
    spans = [
        Span(0, "0F0", 0, 1000),
        Span(0, "0F1", 1000, 2000),
        Span(1, "1F0", 1000, 5000),
        Span(1, "1F1", 8000, 9000),
    ]
    assert told(from_text("0F0 0F1\n1F0 1F1"), Timeline.from_spans(spans))[-1] == (
        "1F1 needs the activation of 0F1, which rank 0 had ended by then, at 2 µs: "
        "this is the transfer, and what ranks do between actions"
    )


def test_an_action_that_needs_no_other_one_is_said_to_wait_for_none() -> None:
    spans = [
        Span(0, "0F0", 5000, 6000),
        Span(0, "0F1", 8000, 9000),
        Span(1, "1F0", 0, 1000),
        Span(1, "1F1", 9000, 9500),
    ]
    reasons = told(from_text("0F0 0F1\n1F0 1F1"), Timeline.from_spans(spans))
    assert reasons[:3] == [
        "before its first action, 0F0",
        "0F1 waits for no other rank: this is what the rank did between actions",
        "nothing left to compute",
    ]


def test_a_rank_without_actions_has_nothing_to_compute() -> None:
    schedule = from_text("0F0 0B0\n\n")
    assert told(schedule, simulate(schedule, Costs())) == ["nothing left to compute"]
