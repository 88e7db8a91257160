"""The invariant: the executor under a virtual clock produces exactly the simulator's timeline."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from counterflow import Costs, Schedule, simulate
from counterflow.runtime import Pipeline, VirtualClock
from counterflow.schedule import GENERATORS, generate
from strategies import costs_of, generated_schedules, random_schedules

UNEVEN = {"latency_us": 0.7, "bandwidth_gb_per_s": 2, "transfer_bytes": 1300}


def tiny_pipeline(schedule: Schedule, costs: Costs) -> tuple[Pipeline, Sequence[Any]]:
    """What is computed does not matter here, and takes little time."""
    ranks = [{stage: nn.Linear(1, 1) for stage in schedule.stages_of(rank)} for rank in range(schedule.num_ranks)]
    pipeline = Pipeline.in_process(schedule, ranks, nn.functional.mse_loss, clock=VirtualClock(costs))
    return pipeline, [torch.ones(2, 1)] * schedule.num_microbatches


@st.composite
def schedules_and_costs(draw: st.DrawFn, schedules: st.SearchStrategy[Schedule]) -> tuple[Schedule, Costs]:
    schedule = draw(schedules)
    return schedule, draw(costs_of(schedule.num_stages))


@given(schedules_and_costs(generated_schedules(most_ranks=5, most_microbatches=12)))
@settings(max_examples=150)
def test_every_generated_schedule_runs_as_it_was_simulated(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    pipeline, data = tiny_pipeline(schedule, costs)
    pipeline.step(data, data)
    assert pipeline.timeline == simulate(schedule, costs)


@given(schedules_and_costs(random_schedules()))
@settings(max_examples=150)
def test_any_runnable_schedule_runs_as_it_was_simulated(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    pipeline, data = tiny_pipeline(schedule, costs)
    pipeline.step(data, data)
    assert pipeline.timeline == simulate(schedule, costs)


@given(schedules_and_costs(generated_schedules(most_ranks=4, most_microbatches=8) | random_schedules()))
@settings(max_examples=100)
def test_so_does_evaluation(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    pipeline, data = tiny_pipeline(schedule, costs)
    pipeline.evaluate(data, data)
    assert pipeline.timeline == simulate(schedule.forward_only(), costs)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(8, 20), (8, 16), (6, 14)])
def test_so_do_the_larger_ones_with_unequal_stages(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule = generate(name, num_ranks, num_microbatches)
    stages = range(schedule.num_stages)
    costs = Costs(
        forward_us=tuple(1 + 0.1 * stage for stage in stages),
        backward_us=tuple(2 + 0.3 * stage for stage in stages),
        weight_us=tuple(1 + 0.05 * stage for stage in stages),
        twins_us=tuple(0.5 + 0.1 * stage for stage in stages),
        **UNEVEN,
    )
    pipeline, data = tiny_pipeline(schedule, costs)
    pipeline.step(data, data)
    assert pipeline.timeline == simulate(schedule, costs)


def test_every_step_is_that_of_the_first_one_and_a_broken_one_leaves_no_trace() -> None:
    schedule, costs = generate("zb1p", 3, 5), Costs(**UNEVEN)
    pipeline, data = tiny_pipeline(schedule, costs)
    for _ in range(2):
        pipeline.step(data, data)
        assert pipeline.timeline == simulate(schedule, costs)
        pipeline.evaluate(data, data)
        assert pipeline.timeline == simulate(schedule.forward_only(), costs)
        with pytest.raises(RuntimeError):
            pipeline.step([*data[:3], torch.ones(2, 7), data[4]], data)
