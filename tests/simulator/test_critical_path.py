"""Slack is exactly by how much an action may be late; the path is what holds the step up."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Costs, Schedule, one_f_one_b
from counterflow.schedule import from_text, generate
from counterflow.simulator import critical_path, engine
from strategies import costs_of, runnable_schedules


@st.composite
def schedules_with_costs(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    schedule = draw(runnable_schedules)
    return schedule, draw(costs_of(schedule.num_stages))


def last_end(step: engine.Step) -> int:
    return int((step.start_ns + step.duration_ns).max())


@settings(max_examples=60, deadline=None)
@given(schedules_with_costs(), st.integers(0, 2**32))
def test_an_action_may_take_longer_by_its_slack_and_no_more(case: tuple[Schedule, Costs], seed: int) -> None:
    schedule, costs = case
    slack = [ns for row in critical_path(schedule, costs).slack_ns for ns in row]
    before = last_end(engine.play(schedule, costs))
    price = engine.durations_ns
    for action in random.Random(seed).sample(range(len(slack)), min(len(slack), 5)):
        for more in (slack[action], slack[action] + 7):

            def dearer(costs, rows, action=action, more=more):
                durations = price(costs, rows)
                durations[action] += more
                return durations

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine, "durations_ns", dearer)
                assert last_end(engine.play(schedule, costs)) == before + max(more - slack[action], 0)


@settings(max_examples=100)
@given(schedules_with_costs())
def test_the_path_leads_without_slack_from_the_start_to_the_end(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    found = critical_path(schedule, costs)
    slack = {
        (rank, str(action)): ns
        for rank, row in enumerate(schedule.rows)
        for action, ns in zip(row, found.slack_ns[rank], strict=True)
    }
    assert all(slack[span.rank, span.name] == 0 for span in found.spans)
    assert found.spans[0].start_ns == 0
    assert found.spans[-1].end_ns == last_end(engine.play(schedule, costs))
    for one, following in zip(found.spans, found.spans[1:], strict=False):
        assert one.end_ns <= following.start_ns
        if costs.latency_ns == 0 and costs.bandwidth_gb_per_s is None:
            assert one.end_ns == following.start_ns


def test_of_1f1b_the_last_rank_is_critical_throughout() -> None:
    found = critical_path(one_f_one_b(3, 4), Costs())
    assert found.slack_ns[2] == [0] * 8
    names = [span.name for span in found.spans]
    assert names == ["0F0", "1F0", "2F0", "2B0", "2F1", "2B1", "2F2", "2B2", "2F3", "2B3", "1B3", "0B3"]


def test_a_receive_posted_late_is_on_the_path() -> None:
    # Rank 1 is busy with 1F1 when rank 0 would send what 1F2 needs: it posts that receive one action ahead only.
    schedule = from_text("0F0 0F1 0F2\n1F0 1F1 1F2")
    costs = Costs((1, 5), latency_us=10)
    assert [span.name for span in critical_path(schedule, costs).spans] == ["0F0", "1F0", "1F2"]


def test_of_actions_that_end_together_the_one_that_holds_up_is_on_the_path() -> None:
    # W takes no time here, so it ends with the I ahead of it, behind which the receive was posted.
    schedule, costs = generate("v-half", 3, 6), Costs(1, 2, None, 0, latency_us=0.1)
    found = critical_path(schedule, costs)
    slack = {
        str(action): ns
        for row, slacks in zip(schedule.rows, found.slack_ns, strict=True)
        for action, ns in zip(row, slacks, strict=True)
    }
    assert [slack[span.name] for span in found.spans] == [0] * len(found.spans)
