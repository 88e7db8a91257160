"""Experts spread over the ranks of a process group: what comes out does not depend on where an expert lies."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.errors import LaunchError
from counterflow.moe import balance_routing
from moe.models import TINY, any_placement, tokens, whole
from moe.ranks.spread import data
from moe.spreading import assert_close, gradients, next_token_loss, run_ranks, summed

Found = tuple[str, list[dict[str, Any]]]
"""Where it was computed, and what each rank found."""


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs, and torch sees fewer here")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What four processes found over gloo, and two over NCCL."""
    num_ranks = 4 if request.param == "cpu" else 2
    return request.param, run_ranks("spread", num_ranks, tmp_path_factory.mktemp("spread"), request.param)


@pytest.mark.parametrize("placement", ["evenly", "replicated"])
def test_ranks_have_the_outputs_and_gradients_of_one(found: Found, placement: str) -> None:
    device, ranks = found
    alone = whole(device=device)
    for rank, results in enumerate(ranks):
        x = data(rank).to(device)
        logits = alone(x)
        (next_token_loss(logits, x) if len(x) else logits.sum()).backward()
        assert_close(results[placement]["logits"], logits.cpu())
    expected = {name: grad.cpu() for name, grad in gradients([alone]).items()}
    assert_close(summed(results[placement]["gradients"] for results in ranks), expected)


def test_every_rank_counts_the_tokens_that_it_sends(found: Found) -> None:
    for rank, results in enumerate(found[1]):
        sent = data(rank).numel() * TINY.top_k
        assert results["replicated"]["counts"].sum(1).tolist() == [sent, sent]


def test_balanced_ranks_tell_each_other_no_sizes_and_have_the_outputs_of_one(found: Found) -> None:
    device, ranks = found
    alone = whole(device=device)
    balance_routing([alone])
    for rank, results in enumerate(ranks):
        assert_close(results["balanced"]["logits"], alone(tokens(2, 8, seed=rank).to(device)).detach().cpu())
        assert results["balanced"]["told"] == 0
        assert results["balanced"]["counts"].unique().tolist() == [2 * 8 * TINY.top_k // TINY.experts]


def test_a_model_answers_the_same_while_its_experts_move(found: Found) -> None:
    device, ranks = found
    alone = whole(device=device)
    for rank, results in enumerate(ranks):
        moved = results["migrated"]
        assert moved["moves"] > 0
        assert len(moved["answers"]) > 2
        for answer in moved["answers"]:
            assert_close(answer, alone(data(rank).to(device)).detach().cpu())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=15)
def test_neither_order_nor_replicas_change_what_one_rank_computes(seed: int) -> None:
    x = tokens(2, 7, seed=seed)
    plain, placed = whole(), whole(placement=any_placement(seed, 1))
    outputs = [each(x) for each in (plain, placed)]
    for logits in outputs:
        next_token_loss(logits, x).backward()
    assert_close(outputs[1], outputs[0])
    assert_close(gradients([placed]), gradients([plain]))


def test_a_rank_that_fails_is_named_and_not_those_that_share_its_experts(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        run_ranks("failing", 2, tmp_path)
    first, other = str(caught.value).splitlines()
    # With an exchange under way torch may abort a process that ends by itself.
    end = r"(ended with exit code 1|was killed by SIGABRT)"
    assert re.fullmatch(rf"rank 1 {end}, at \(1F2;.*\)OVERLAP_F_B; the job was ended", first)
    assert re.fullmatch(
        r"  rank 0 of 2 that share experts waited \d+\.\d s for (word of how many rows come|\d+ rows): another one "
        r"died, stalled, or exchanges something else \(.+\)",
        other,
    )
