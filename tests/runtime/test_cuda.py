"""The same code on a GPU, all ranks in one process: exact gradients, and times that are the GPU's own."""

import pytest
import torch
from torch import nn

from counterflow import Costs, simulate
from counterflow.runtime import Pipeline
from counterflow.schedule import generate
from runtime.cases import assert_bitwise, expected_gradients, gradients_by_rank, ordinary_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

SIZES = [
    *(("gpipe", 2, 3), ("1f1b", 4, 6), ("interleaved-1f1b-overlap", 2, 4), ("zb1p", 3, 5), ("zb2p", 3, 5)),
    *(("zbv", 3, 5), ("v-half", 2, 4), ("v-min", 4, 5), ("dualpipe", 4, 8), ("dualpipev", 1, 4), ("dualpipev", 2, 5)),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
@pytest.mark.parametrize("weight_split", ["linear", "graph"])
def test_gradients_are_bitwise_those_of_one_process(size: tuple[str, int, int], weight_split: str) -> None:
    case = ordinary_case(*size, weight_split=weight_split).on("cuda")
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_times_are_those_of_the_work_and_not_of_its_launch() -> None:
    width, layers, rows = 4096, 8, 8192
    schedule = generate("dualpipev", 1, 4)

    def stage() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).cuda()

    pipeline = Pipeline.in_process(schedule, [{0: stage(), 1: stage()}], nn.functional.mse_loss)
    data = [torch.randn(rows, width, device="cuda") for _ in range(4)]
    for _ in range(3):
        pipeline.step(data, data)
    measured = pipeline.timeline
    # No GPU does more than 200 TFLOP/s in fp32, and none is idle between actions of this size.
    least_ns = 2 * rows * width * width * layers / 200e12 * 1e9
    assert all(span.duration_ns > least_ns for span in measured)
    assert measured.bubble_ns().max() < 0.02 * measured.makespan_ns
    predicted = simulate(schedule, Costs.from_timeline(measured))
    assert abs(measured.makespan_ns / predicted.makespan_ns - 1) < 0.05
