"""The gradients are those of one process: bit for bit in the same order, and close for the whole batch at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.schedule import Kind
from runtime.cases import (
    Case,
    assert_bitwise,
    expected_gradients,
    furthest_apart,
    gradients_by_rank,
    microbatches_of,
    named_case,
    ordinary_case,
    ordinary_step,
    plain_losses,
    plain_outputs,
    whole_batch_gradients,
)
from runtime.processes import run_cases
from strategies import legal_sizes, random_runnable


def sizes() -> list[tuple[str, int, int]]:
    """For every schedule those of these that it exists for; fewer micro-batches than ranks are tried as well."""
    counts = {1: (1, 2, 5), 2: (1, 4, 5), 3: (2, 6, 7), 4: (3, 8, 10), 8: (5, 16, 20)}
    wanted = {(num_ranks, num_microbatches) for num_ranks in counts for num_microbatches in counts[num_ranks]}
    return [size for size in legal_sizes(most_ranks=8, most_microbatches=20) if size[1:] in wanted]


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), sizes())
def test_gradients_are_bitwise_those_of_one_process(name: str, num_ranks: int, num_microbatches: int) -> None:
    case = ordinary_case(name, num_ranks, num_microbatches)
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), [size for size in sizes() if size[1] in (2, 4)])
def test_gradients_are_within_1e_12_of_the_whole_batch(name: str, num_ranks: int, num_microbatches: int) -> None:
    case = ordinary_case(name, num_ranks, num_microbatches)
    pipeline = case.in_process()
    data = case.steps[0]
    pipeline.step(data.inputs, data.targets)
    at_once = whole_batch_gradients(case)
    assert furthest_apart(gradients_by_rank(pipeline), at_once) < 1e-12


@given(
    seed=st.integers(0, 2**32),
    num_ranks=st.integers(1, 4),
    num_stages=st.integers(1, 4),
    num_microbatches=st.integers(1, 4),
    stage_stays=st.booleans(),
    weight_split=st.sampled_from(["linear", "graph"]),
)
@settings(max_examples=100)
def test_any_runnable_schedule_gives_these_gradients(
    seed: int, num_ranks: int, num_stages: int, num_microbatches: int, stage_stays: bool, weight_split: str
) -> None:
    schedule = random_runnable(seed, num_ranks, num_stages, num_microbatches, stage_stays)
    data = ordinary_step(num_microbatches, seed=seed % 100)
    case = Case(schedule, [data], weight_split=weight_split)
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


# --- between processes --------------------------------------------------------------------------------------

# Cases that share the processes of one job. 3 ranks have no DualPipe; the weights of convolutions are strided.
JOBS = {
    2: ["gpipe/2/3", "1f1b/2/1", "1f1b/2/6", "zb1p/2/5", "dualpipe/2/6", "dualpipev/2/5", "dualpipe/2/4/convolutions"],
    4: [
        *("gpipe/4/3", "1f1b/4/9", "interleaved-1f1b/4/4", "interleaved-1f1b-overlap/4/8", "zb1p/4/3", "zb2p/4/8"),
        *("zbv/4/5", "v-half/4/6", "v-min/4/4", "dualpipe/4/10", "dualpipev/4/8"),
    ],
}
LONG_JOBS = {
    1: ["gpipe/1/3", "1f1b/1/3", "zb1p/1/4", "dualpipev/1/5"],
    3: ["gpipe/3/4", "1f1b/3/2", "1f1b/3/7", "zb1p/3/2", "zb1p/3/8", "dualpipev/3/7"],
    8: [
        *("gpipe/8/10", "1f1b/8/5", "1f1b/8/20", "interleaved-1f1b-overlap/8/16", "zb1p/8/20", "zb2p/8/20", "zbv/8/12"),
        *("v-half/8/20", "v-min/8/9", "dualpipe/8/16", "dualpipe/8/20", "dualpipev/8/17"),
    ],
}


@pytest.mark.parametrize(
    ("num_ranks", "names"),
    [*JOBS.items(), *(pytest.param(*job, marks=pytest.mark.slow) for job in LONG_JOBS.items())],
    ids=lambda value: f"{value}-ranks" if isinstance(value, int) else "",
)
def test_over_gloo_they_are_the_same_bits_and_so_is_all_else(num_ranks: int, names: list[str], tmp_path: Path) -> None:
    for name, ranks in run_cases(names, num_ranks, tmp_path).items():
        case = named_case(name)
        gradients = {rank: found["gradients"] for rank, found in ranks.items()}
        assert_bitwise(gradients, expected_gradients(case), name)
        for rank, found in ranks.items():
            assert_losses_and_outputs(case, rank, found)
        assert_one_timeline(case, [found["timeline"] for found in ranks.values()])


def assert_losses_and_outputs(case: Case, rank: int, found: dict[str, Any]) -> None:
    """On the ranks that hold the last stage; alike before, in and after training, and without a pipeline."""
    last = case.schedule.num_stages - 1
    here = sorted(microbatches_of(case.schedule, rank, last, [Kind.F]))
    plain = [{m: losses[m] for m in here} for losses in plain_losses(case)]
    assert found["losses"] == plain
    assert found["evaluated"] == [plain, plain]
    outputs = plain_outputs(case)
    assert list(found["outputs"][0]) == here
    assert all(torch.equal(found["outputs"][0][m], outputs[m]) for m in here)


def assert_one_timeline(case: Case, timelines: Sequence[list[tuple[int, str, int, int]]]) -> None:
    """The same on every rank: that of the last call, an evaluation, with the ranks' clocks agreeing."""
    spans = timelines[0]
    assert all(timeline == spans for timeline in timelines)
    for rank, row in enumerate(case.schedule.forward_only().rows):
        own = [span for span in spans if span[0] == rank]
        assert [name for _, name, _, _ in own] == [str(action) for action in row]
        assert all(before[3] <= after[2] for before, after in zip(own, own[1:], strict=False))
    starts, ends = ({name: span[i] for span in spans for name in [span[1]]} for i in (2, 3))
    for stage in range(1, case.schedule.num_stages):
        for m in range(case.schedule.num_microbatches):
            assert ends[f"{stage - 1}F{m}"] <= starts[f"{stage}F{m}"]
