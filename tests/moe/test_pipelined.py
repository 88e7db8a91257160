"""DualPipe and spread experts together: each process is in a pipeline and in a group that shares experts."""

from pathlib import Path

import pytest

from moe.models import TINY, whole
from moe.ranks.pipelined import data
from moe.spreading import assert_close, gradients, next_token_loss, run_ranks, summed


@pytest.mark.parametrize(
    ("pipeline_ranks", "expert_ranks", "microbatches"),
    [(2, 2, 4), pytest.param(4, 2, 8, marks=pytest.mark.slow)],
)
def test_losses_and_gradients_are_those_of_one_process(
    pipeline_ranks: int, expert_ranks: int, microbatches: int, tmp_path: Path
) -> None:
    found = run_ranks("pipelined", pipeline_ranks * expert_ranks, tmp_path, pipeline_ranks, expert_ranks, microbatches)
    alone = whole(TINY)
    for number in range(expert_ranks):
        losses = {m: loss for results in found[number::expert_ranks] for m, loss in results["losses"].items()}
        assert sorted(losses) == list(range(microbatches))
        for m, x in enumerate(data(number, microbatches)):
            loss = next_token_loss(alone(x), x)
            loss.backward()
            assert_close(losses[m], loss.detach())
    expected = gradients([alone])
    for rank in range(pipeline_ranks):
        sharing = found[rank * expert_ranks : (rank + 1) * expert_ranks]
        # Twins have added theirs already, so either holder of a stage has all there is.
        for index in sharing[0]["gradients"]:
            stage = summed(results["gradients"][index] for results in sharing)
            assert_close(stage, {name: expected[name] for name in stage})
