"""Any module, any structure, any shape: the gradients stay those of one process, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from counterflow.schedule import generate
from runtime.cases import (
    Gradients,
    assert_bitwise,
    block,
    expected_gradients,
    furthest_apart,
    gradients_by_rank,
    named_case,
)
from runtime.flows import FLOWS, Around, Flow
from runtime.processes import run_cases

SIZES = [("1f1b", 3, 4), ("zb1p", 3, 4), ("dualpipe", 4, 8), ("dualpipev", 2, 5)]
COMBINATIONS = [
    (flow, size, weight_split)
    for flow in FLOWS
    for size in SIZES
    for weight_split in ("linear", "graph")
    # 1F1B splits nothing, and torch lets no reentrant checkpoint be asked for some gradients only.
    if weight_split == "linear" or (size[0] != "1f1b" and "reentrant" not in flow)
]


@pytest.mark.filterwarnings("ignore:stage .* no weight gradient could be left for W:UserWarning")
@pytest.mark.parametrize(("flow", "size", "weight_split"), COMBINATIONS)
def test_it_flows_within_one_process(flow: str, size: tuple[str, int, int], weight_split: str) -> None:
    case = FLOWS[flow].case(generate(*size), weight_split)
    pipeline = case.in_process()
    for data in case.steps:
        pipeline.step(data.inputs, data.targets)
    assert_as_expected(flow, gradients_by_rank(pipeline), expected_gradients(case))


def test_all_of_it_flows_between_processes(tmp_path: Path) -> None:
    """One test, so that three processes start once."""
    found = run_cases([f"zb1p/3/4/{flow}" for flow in FLOWS], 3, tmp_path)
    for flow, (name, ranks) in zip(FLOWS, found.items(), strict=True):
        gradients = {rank: results["gradients"] for rank, results in ranks.items()}
        assert_as_expected(flow, gradients, expected_gradients(named_case(name)))


def assert_as_expected(flow: str, found: dict[int, Gradients], expected: Gradients) -> None:
    if FLOWS[flow].inexact:
        assert furthest_apart(found, expected) < 1e-12, flow
    else:
        assert_bitwise(found, expected, flow)


def test_what_only_an_unused_output_depends_on_gets_zeros() -> None:
    """The stage cannot know that nobody used it; one process would leave the gradient at None."""

    class Branching(nn.Module):
        def __init__(self, stage: int) -> None:
            super().__init__()
            self.inner, self.branch = block(stage), block(stage + 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.branch(x)

    flow = Flow(first=Branching, middle=lambda stage: Around(stage, take=lambda x, _: x))
    for weight_split in ("linear", "graph"):
        case = flow.case(generate("zb1p", 3, 4), weight_split)
        pipeline = case.in_process()
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in pipeline.stages[0][0].branch.parameters())
