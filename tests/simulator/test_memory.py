"""Peak activations, by counting what is held after each half of each action."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, Schedule, gpipe
from counterflow.errors import SimulatorError
from counterflow.schedule import Kind, from_text
from counterflow.simulator import peak_activation_bytes, peak_activations
from strategies import costs_of, runnable_schedules


def held_after_each_part(schedule: Schedule, rank: int) -> list[tuple[set[tuple[int, int]], set[tuple[int, int]]]]:
    """After each part the (stage, micro-batch) whose bytes until I, and whose bytes until W, are held."""
    until_input: set[tuple[int, int]] = set()
    until_weight: set[tuple[int, int]] = set()
    states = []
    for part in (part for action in schedule.rows[rank] for part in action.parts):
        cell = part.stage, part.microbatch
        if part.kind is Kind.F:
            until_input, until_weight = until_input | {cell}, until_weight | {cell}
        if part.kind in (Kind.B, Kind.I):
            until_input = until_input - {cell}
        if part.kind in (Kind.B, Kind.W):
            until_weight = until_weight - {cell}
        states.append((until_input, until_weight))
    return states


@given(runnable_schedules)
def test_an_activation_is_held_from_f_until_its_weights_are_done(schedule: Schedule) -> None:
    assert peak_activations(schedule) == [
        max((len(weight) for _, weight in held_after_each_part(schedule, rank)), default=0)
        for rank in range(schedule.num_ranks)
    ]


@given(runnable_schedules, st.data())
def test_bytes_go_in_two_portions_at_i_and_at_w(schedule: Schedule, data: st.DataObject) -> None:
    costs = data.draw(costs_of(schedule.num_stages))

    def total(until_input: set[tuple[int, int]], until_weight: set[tuple[int, int]]) -> float:
        first = sum(costs.stored_bytes(stage)[0] for stage, _ in until_input)
        return first + sum(costs.stored_bytes(stage)[1] for stage, _ in until_weight)

    assert peak_activation_bytes(schedule, costs) == [
        max((total(*held) for held in held_after_each_part(schedule, rank)), default=0)
        for rank in range(schedule.num_ranks)
    ]


@given(runnable_schedules)
def test_all_is_free_at_the_end_of_a_training_step_and_nothing_without_backwards(schedule: Schedule) -> None:
    for rank in range(schedule.num_ranks):
        states = held_after_each_part(schedule, rank)
        if schedule.mode == "train":
            assert not states or states[-1] == (set(), set())
        else:
            assert peak_activations(schedule)[rank] == len(states)


def test_inside_an_overlapped_action_both_are_held() -> None:
    assert peak_activations(from_text("0F0 (0F1;0B0)OVERLAP_F_B 0B1")) == [2]
    assert peak_activations(from_text("0F0 0B0 0F1 0B1")) == [1]


def test_what_waits_for_w_is_the_part_stated_for_w() -> None:
    schedule = from_text("0F0 0I0 0F1 0I1 0W0 0W1")
    assert peak_activation_bytes(schedule, Costs(freed_at_input_bytes=100, freed_at_weight_bytes=1)) == [102]
    assert peak_activation_bytes(schedule, Costs(freed_at_input_bytes=1, freed_at_weight_bytes=100)) == [201]


def test_costs_of_too_few_stages_are_refused() -> None:
    with pytest.raises(SimulatorError, match="the costs name 1 stages and the schedule has a stage 1"):
        peak_activation_bytes(gpipe(2, 2), Costs(freed_at_input_bytes=(5,)))
