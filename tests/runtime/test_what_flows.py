"""Any module, any structure, any shape: the gradients stay those of one process, bit for bit."""

from typing import Any

import pytest

from counterflow.schedule import generate
from runtime.cases import (
    Gradients,
    assert_bitwise,
    expected_gradients,
    furthest_apart,
    gradients_by_rank,
    named_case,
)
from runtime.flows import FLOWS
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


@pytest.fixture(scope="module")
def over_gloo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Any]]:
    """Every flow, one after the other, on the same three processes."""
    return run_cases([f"zb1p/3/4/{flow}" for flow in FLOWS], 3, tmp_path_factory.mktemp("flows"))


@pytest.mark.parametrize("flow", FLOWS)
def test_it_flows_between_processes(flow: str, over_gloo: dict[str, dict[int, Any]]) -> None:
    name = f"zb1p/3/4/{flow}"
    found = {rank: results["gradients"] for rank, results in over_gloo[name].items()}
    assert_as_expected(flow, found, expected_gradients(named_case(name)))


def assert_as_expected(flow: str, found: dict[int, Gradients], expected: Gradients) -> None:
    if FLOWS[flow].inexact:
        assert furthest_apart(found, expected) < 1e-12
    else:
        assert_bitwise(found, expected)
