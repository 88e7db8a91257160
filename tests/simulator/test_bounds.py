"""Lower bounds: nothing beats them, some schedules meet them, and they know what a pair saves."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, Schedule, dualpipe, dualpipev, one_f_one_b, simulate, zb1p
from counterflow.errors import SimulatorError
from counterflow.simulator import least_step_ns, least_step_of_ns
from strategies import costs_of, runnable_schedules


@st.composite
def schedules_with_costs(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    schedule = draw(runnable_schedules)
    return schedule, draw(costs_of(schedule.num_stages))


def least_ns(schedule: Schedule, costs: Costs) -> int:
    sizes = (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
    return least_step_ns(*sizes, costs, schedule.mode)


@given(schedules_with_costs())
def test_no_simulated_step_is_shorter_than_either_bound(case: tuple[Schedule, Costs]) -> None:
    step_ns = simulate(*case).makespan_ns
    assert least_ns(*case) <= step_ns
    assert least_step_of_ns(*case) <= step_ns


@given(schedules_with_costs(), st.integers(1, 3))
def test_more_ranks_never_raise_the_bound_of_the_costs(case: tuple[Schedule, Costs], more: int) -> None:
    schedule, costs = case
    sizes = (schedule.num_stages, schedule.num_microbatches, costs, schedule.mode)
    assert least_step_ns(schedule.num_ranks + more, *sizes) <= least_step_ns(schedule.num_ranks, *sizes)


@given(schedules_with_costs())
def test_the_order_of_a_rank_does_not_matter_to_the_bound_of_its_actions(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    turned = Schedule.from_rows(row[::-1] for row in schedule.rows)
    assert least_step_of_ns(turned, costs) == least_step_of_ns(schedule, costs)


@pytest.mark.parametrize("schedule", [one_f_one_b(8, 20), zb1p(8, 20)], ids=lambda schedule: schedule.name)
def test_no_order_of_their_own_actions_beats_1f1b_and_zb1p(schedule: Schedule) -> None:
    assert least_step_of_ns(schedule, Costs()) == simulate(schedule, Costs()).makespan_ns


def test_one_rank_meets_both_bounds() -> None:
    schedule = one_f_one_b(1, 3)
    assert least_ns(schedule, Costs()) == least_step_of_ns(schedule, Costs()) == 9_000


def test_one_micro_batch_goes_down_and_comes_back_whoever_holds_what() -> None:
    costs = Costs(forward_us=(1, 5), backward_us=(2, 7), weight_us=1)
    assert least_step_ns(64, 2, 1, costs) == 6_000 + 7_000


def test_without_overlap_the_work_is_shared_out_evenly() -> None:
    assert least_step_ns(8, 8, 20, Costs(1, 2, None, 1)) == 20 * 3_000


def test_pairs_save_only_where_there_is_something_to_pair() -> None:
    # In 8 µs of first forwards each of 8 ranks runs 8 that are not paired; so 8 backwards are not either.
    assert least_step_ns(8, 8, 20, Costs(1, 2, None, 1, 2.4)) == 12 * 2_400 + 8 * 3_000
    assert least_step_ns(8, 8, 1, Costs(1, 2, None, 1, 2.4)) == 16_000
    # A pair that takes longer than its parts is left out.
    assert least_step_ns(8, 8, 20, Costs(1, 2, None, 1, 9)) == 20 * 3_000


def test_latency_counts_only_where_a_rank_has_to_wait_for_another() -> None:
    late: dict[str, Any] = {"latency_us": 0.5}
    assert least_step_ns(2, 2, 1, Costs(1, 2, **late)) == least_step_ns(2, 2, 1, Costs(1, 2))
    assert least_step_of_ns(one_f_one_b(2, 1), Costs(1, 2, **late)) == 7_000
    assert least_step_of_ns(dualpipev(1, 2), Costs(**late)) == least_step_of_ns(dualpipev(1, 2), Costs())


def test_forwards_alone_have_no_way_back() -> None:
    schedule = dualpipe(4, 8).forward_only()
    assert least_ns(schedule, Costs(forward_us=1)) == 8_000
    assert least_step_ns(4, 4, 1, Costs(forward_us=1), "forward") == 4_000


def test_what_no_schedule_runs_need_not_be_stated_but_the_backward_must() -> None:
    assert least_step_ns(2, 2, 2, Costs(forward_us=1, backward_us=2)) == 6_000
    assert least_step_ns(2, 2, 2, Costs(forward_us=1, input_us=1, weight_us=1)) == 6_000
    with pytest.raises(SimulatorError, match="the costs do not say how long 0B0 takes"):
        least_step_ns(2, 2, 2, Costs(forward_us=1))
    with pytest.raises(SimulatorError, match="the costs name 2 stages"):
        least_step_ns(4, 4, 8, Costs(forward_us=1, backward_us=(2, 2)))
