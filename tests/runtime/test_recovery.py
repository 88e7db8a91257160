"""Within one process a step may break anywhere: twins keep the gradients of before, and the next step is exact."""

import pytest
import torch

from counterflow import dualpipev
from counterflow.errors import PipelineError
from counterflow.runtime import Pipeline
from counterflow.runtime.clock import WallClock
from counterflow.schedule import Action
from runtime.cases import Case, assert_bitwise, expected_gradients, gradients_by_rank, ordinary_case
from runtime.chunks import FEATURES, LateExchange, stage_of_blocks


class Breaking(WallClock):
    """Raises when ``rank`` has run ``action``, once."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.action = -1, ""

    def set_to(self, rank: int, action: Action) -> None:
        self.rank, self.action = rank, str(action)

    def ran(self, rank: int, action: Action) -> None:
        if (rank, str(action)) == (self.rank, self.action):
            self.rank = -1
            raise ZeroDivisionError("as asked")


def stepped_once(name: str, num_ranks: int, num_microbatches: int) -> tuple[Case, Pipeline, Breaking]:
    case, clock = ordinary_case(name, num_ranks, num_microbatches, num_steps=2), Breaking()
    pipeline = case.in_process(clock=clock)
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    return case, pipeline, clock


# On eight ranks some twins have long exchanged their gradients when rank 0 does its last W.
@pytest.mark.parametrize(("num_ranks", "num_microbatches", "last"), [(2, 4, 99), (4, 8, 99), (8, 16, 2)])
def test_wherever_a_step_breaks_twins_have_the_gradients_of_before(
    num_ranks: int, num_microbatches: int, last: int
) -> None:
    case, pipeline, clock = stepped_once("dualpipe", num_ranks, num_microbatches)
    data = case.steps[1]
    before = [parameter.grad.clone() for parameter in pipeline.parameters()]
    for rank, row in enumerate(case.schedule.rows):
        for action in row[-last:]:
            clock.set_to(rank, action)
            with pytest.raises(ZeroDivisionError):
                pipeline.step(data.inputs, data.targets)
            for parameter, gradient in zip(pipeline.parameters(), before, strict=True):
                assert torch.equal(parameter.grad, gradient), f"rank {rank}, after {action}"
    pipeline.step(data.inputs, data.targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


@pytest.mark.parametrize(
    "size", [("gpipe", 3, 4), ("1f1b", 3, 4), ("zb1p", 3, 4), ("dualpipe", 4, 8), ("dualpipev", 2, 5)]
)
def test_wherever_an_evaluation_breaks_nothing_is_different(size: tuple[str, int, int]) -> None:
    case, pipeline, clock = stepped_once(*size)
    data = case.steps[1]
    for rank, row in enumerate(case.schedule.forward_only().rows):
        for action in row:
            clock.set_to(rank, action)
            with pytest.raises(ZeroDivisionError):
                pipeline.evaluate(data.inputs, data.targets)
    assert all(module.training for module in pipeline.modules())
    pipeline.step(data.inputs, data.targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


@pytest.mark.parametrize(
    "size", [("gpipe", 3, 4), ("1f1b", 3, 4), ("zb1p", 3, 4), ("dualpipe", 4, 8), ("dualpipev", 2, 5)]
)
def test_wherever_a_first_step_breaks_the_next_one_starts_afresh(size: tuple[str, int, int]) -> None:
    case, clock = ordinary_case(*size), Breaking()
    pipeline = case.in_process(clock=clock)
    data, expected = case.steps[0], expected_gradients(case)
    for rank, row in enumerate(case.schedule.rows):
        for action in row[:: 1 + len(row) // 6]:
            clock.set_to(rank, action)
            with pytest.raises(ZeroDivisionError):
                pipeline.step(data.inputs, data.targets)
            for parameter in pipeline.parameters():
                parameter.grad = None
            pipeline.step(data.inputs, data.targets)
            assert_bitwise(gradients_by_rank(pipeline), expected)
            for parameter in pipeline.parameters():
                parameter.grad = None


class WithAnother(LateExchange):
    """With a rank that is not here."""

    num_ranks = 2


def test_a_pipeline_in_one_process_that_shares_experts_with_others_does_not_go_on() -> None:
    """They wait within the broken step, and would take the rows of the next one for its."""
    stages = {stage: stage_of_blocks(stage, WithAnother()) for stage in range(2)}
    pipeline = Pipeline.in_process(dualpipev(1, 2), [stages], torch.nn.functional.mse_loss)
    x = [torch.ones(3, FEATURES, dtype=torch.float64)] * 2
    with pytest.raises(PipelineError, match="did not say how many rows go to each of 2 ranks"):
        pipeline.step(x, x)
    with pytest.raises(PipelineError, match=r"broke in an earlier step .*; build a new one"):
        pipeline.step(x, x)
