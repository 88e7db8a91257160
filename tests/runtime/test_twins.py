"""Twins: their gradients are summed inside the step, so that optimisers keep them equal bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from counterflow.errors import PipelineError
from counterflow.runtime import Pipeline
from counterflow.schedule import generate
from runtime.cases import (
    Case,
    assert_bitwise,
    block,
    expected_gradients,
    gradients_by_rank,
    ordinary_case,
    ordinary_step,
)
from runtime.flows import FLOWS
from runtime.processes import run_ranks
from strategies import random_runnable


def are_equal(pipeline: Pipeline) -> bool:
    """Every copy of every parameter and buffer, bit for bit."""
    for stage, (first, *others) in pipeline.schedule.twins.items():
        one = pipeline.stages[first][stage].state_dict()
        for rank in others:
            other = pipeline.stages[rank][stage].state_dict()
            if not all(torch.equal(one[name], other[name]) for name in one):
                return False
    return True


def test_they_stay_equal_over_a_hundred_steps() -> None:
    case = ordinary_case("dualpipe", 4, 8, num_steps=3)
    pipeline = case.in_process()
    optimisers = [
        torch.optim.AdamW([p for module in modules.values() for p in module.parameters()], lr=1e-2)
        for modules in pipeline.stages.values()
    ]
    losses = []
    for index in range(100):
        data = case.steps[index % 3]
        losses.append(sum(pipeline.step(data.inputs, data.targets).losses.values()))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert are_equal(pipeline)
    assert losses[99] < 0.8 * losses[0]  # of the same data


def test_they_stay_equal_between_processes(tmp_path: Path) -> None:
    run_ranks("train_twins", 2, tmp_path, 20)
    states = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for stage, (one, other) in generate("dualpipe", 2, 4).twins.items():
        for name, tensor in states[one][stage].items():
            assert torch.equal(tensor, states[other][stage][name])
            assert not torch.equal(tensor, block(stage).state_dict()[name])


@pytest.mark.parametrize("weight_split", ["linear", "graph"])
def test_gradients_add_up_over_steps(weight_split: str) -> None:
    case = ordinary_case("dualpipe", 4, 8, num_steps=3, weight_split=weight_split)
    pipeline = case.in_process()
    for data in case.steps:
        pipeline.step(data.inputs, data.targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_a_stage_may_have_any_number_of_copies() -> None:
    schedule = random_runnable(seed=4, num_ranks=4, num_stages=3, num_microbatches=8)
    assert max(len(ranks) for ranks in schedule.twins.values()) >= 3
    case = Case(schedule, [ordinary_step(8, seed) for seed in range(2)])
    pipeline = case.in_process()
    for data in case.steps:
        pipeline.step(data.inputs, data.targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1000, 1 << 30])
def test_the_size_of_the_buckets_changes_no_bit(bucket_bytes: int) -> None:
    case = ordinary_case("dualpipe", 2, 4, bucket_bytes=bucket_bytes)
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_buckets_of_parameters_of_several_precisions() -> None:
    def mixed(stage: int) -> nn.Module:
        parts = block(stage)
        return nn.Sequential(parts[0].float(), parts[1], parts[2], parts[3].float())

    class Stage(nn.Module):
        def __init__(self, stage: int) -> None:
            super().__init__()
            self.first, _, self.norm, self.last = mixed(stage)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(torch.tanh(self.first(x.float())).double()).float()).double()

    case = Case(generate("dualpipe", 2, 4), [ordinary_step(4)], Stage)
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_a_parameter_that_no_copy_used_keeps_no_gradient() -> None:
    case = FLOWS["unused parameters"].case(generate("dualpipe", 2, 4))
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    for modules in pipeline.stages.values():
        for module in modules.values():
            assert all((p.grad is None) == name.startswith("unused") for name, p in module.named_parameters())


def test_a_parameter_that_one_copy_used_gets_its_gradient_on_both() -> None:
    class Sometimes(nn.Module):
        def __init__(self, stage: int) -> None:
            super().__init__()
            self.inner, self.extra = block(stage), nn.Parameter(torch.ones(8, dtype=torch.float64))

        def forward(self, x: torch.Tensor, use: bool | None = None) -> tuple[torch.Tensor, bool] | torch.Tensor:
            x = self.inner(x)
            return (x * self.extra if use else x, use) if use is not None else x

    class Last(Sometimes):
        def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
            return super().forward(x, use)[0]

    data = ordinary_step(4)
    uses = [True, False, False, False]
    steps = [type(data)([(x, use) for x, use in zip(data.inputs, uses, strict=True)], data.targets)]
    case = Case(generate("dualpipe", 2, 4), steps, lambda stage: Last(1) if stage else Sometimes(0))
    pipeline = case.in_process()
    pipeline.step(steps[0].inputs, steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))
    assert all(modules[stage].extra.grad is not None for modules in pipeline.stages.values() for stage in modules)


def test_a_parameter_that_two_stages_share_is_summed_once() -> None:
    def tied() -> dict[int, nn.Module]:
        stages = {0: block(0), 1: block(1)}
        stages[1][0].weight = stages[0][0].weight
        return stages

    case = ordinary_case("dualpipe", 2, 4)
    data = case.steps[0]
    pipeline = Pipeline.in_process(case.schedule, [tied(), tied()], case.loss_fn)
    pipeline.step(data.inputs, data.targets)
    plain = tied()
    for x, target in zip(data.inputs, data.targets, strict=True):
        case.loss_fn(plain[1](plain[0](x)), target).backward()
    for modules in pipeline.stages.values():
        gradient = modules[0][0].weight.grad
        assert gradient is modules[1][0].weight.grad
        torch.testing.assert_close(gradient, plain[0][0].weight.grad, rtol=0, atol=1e-12)


def test_copies_that_start_different_become_the_first_holders() -> None:
    class WithBuffer(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.inner = block(seed)
            self.register_buffer("table", torch.full((3,), float(seed)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    schedule = generate("dualpipe", 4, 8)
    ranks = [{s: WithBuffer(10 * rank + s) for s in schedule.stages_of(rank)} for rank in range(4)]
    pipeline = Pipeline.in_process(schedule, ranks, nn.functional.mse_loss)
    assert are_equal(pipeline)
    for stage, (first, _) in schedule.twins.items():
        wanted = WithBuffer(10 * first + stage).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in ranks[first][stage].state_dict().items())


def test_copies_of_other_shapes_are_refused() -> None:
    schedule = generate("dualpipe", 2, 4)
    ranks = [{0: nn.Linear(8, 8), 1: nn.Linear(8, 8)}, {0: nn.Linear(8, 1), 1: nn.Linear(8, 8)}]
    with pytest.raises(PipelineError) as caught:
        Pipeline.in_process(schedule, ranks, nn.functional.mse_loss)
    assert str(caught.value) == (
        "stage 0 has other parameters or buffers on rank 0 than on rank 1; its copies need the same shapes and dtypes "
        "in the same order: build them by the same code"
    )


def test_a_frozen_stage_has_nothing_to_sum() -> None:
    case = FLOWS["frozen stages in the middle"].case(generate("dualpipe", 4, 8))
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    pipeline.step(case.steps[1].inputs, case.steps[1].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))
