"""The runtime between two GPUs over NCCL: what gloo shows on CPUs, shown where it will run."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from counterflow.errors import LaunchError
from counterflow.runtime import launch
from runtime.cases import assert_bitwise, expected_gradients, named_case
from runtime.posting import postings
from runtime.processes import command, run_cases, run_ranks, surroundings

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs, and torch sees fewer here")

CASES = [
    *("gpipe/2/3", "1f1b/2/1", "1f1b/2/6", "interleaved-1f1b/2/4", "interleaved-1f1b-overlap/2/8", "zb1p/2/5"),
    *("zb2p/2/6", "zbv/2/5", "v-half/2/6", "v-min/2/4", "dualpipe/2/4", "dualpipe/2/10", "dualpipev/2/5"),
]


def test_gradients_and_losses_are_those_of_one_process(tmp_path: Path) -> None:
    for name, ranks in run_cases(CASES, 2, tmp_path, "cuda").items():
        case = named_case(name).on("cuda")
        expected = {
            stage: {parameter: grad if grad is None else grad.cpu() for parameter, grad in gradients.items()}
            for stage, gradients in expected_gradients(case).items()
        }
        assert_bitwise({rank: found["gradients"] for rank, found in ranks.items()}, expected, name)
        losses = {m: loss for found in ranks.values() for m, loss in found["losses"][0].items()}
        assert sorted(losses) == list(range(case.schedule.num_microbatches))
        assert all(found["timeline"] == ranks[0]["timeline"] for found in ranks.values())


@pytest.mark.parametrize("how", ["raise", "kill", "stop"])
def test_a_rank_that_fails_is_named(how: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        run_ranks("fail", 2, tmp_path, how, "1f1b", 60, "cuda", timeout_s=10)
    first, *_ = str(caught.value).splitlines()
    assert first.startswith("rank 1 ")


MESSAGE_BYTES = 1 << 30
"""More than NCCL's buffers hold, so that a send ends when it is received; 64 MiB may leave before."""


def outcomes(names: list[str], folder: Path) -> set[tuple[str, str]]:
    """What both ranks saw of these postings, one after the other until one hangs."""
    folder.mkdir()
    launch(command("post", folder, MESSAGE_BYTES, *names), 2, logs=folder / "logs")
    told = [(folder / f"rank-{rank}.txt").read_text(encoding="utf-8").splitlines() for rank in range(2)]
    return {tuple(line.rsplit(" ", 1)) for lines in told for line in lines}


def test_check_tells_what_hangs_where_a_communicator_queues_all(tmp_path: Path) -> None:
    run = [name for name, posting in postings().items() if posting.runs]
    hang = [name for name in postings() if name not in run]
    with surroundings(), ThreadPoolExecutor(6) as pool:
        jobs = [run, *([name] for name in hang)]
        found = pool.map(outcomes, jobs, (tmp_path / str(number) for number in range(len(jobs))))
        seen = {outcome for each in found for outcome in each}
    assert seen == {(name, "ran") for name in run} | {(name, "hung") for name in hang}
