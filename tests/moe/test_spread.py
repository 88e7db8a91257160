"""Experts spread over the ranks of a process group: what comes out does not depend on where an expert lies."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.moe import balance_routing
from moe.models import TINY, any_placement, tokens, whole
from moe.ranks.spread import RANKS, data
from moe.spreading import assert_close, gradients, next_token_loss, run_ranks, summed

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What four processes found."""
    return run_ranks("spread", RANKS, tmp_path_factory.mktemp("spread"))


@pytest.mark.parametrize("placement", ["evenly", "replicated"])
def test_four_ranks_have_the_outputs_and_gradients_of_one(found: Found, placement: str) -> None:
    alone = whole()
    for rank, results in enumerate(found):
        x = data(rank)
        logits = alone(x)
        (next_token_loss(logits, x) if len(x) else logits.sum()).backward()
        assert_close(results[placement]["logits"], logits)
    assert_close(summed(results[placement]["gradients"] for results in found), gradients([alone]))


def test_every_rank_counts_the_tokens_that_it_sends(found: Found) -> None:
    for rank, results in enumerate(found):
        sent = data(rank).numel() * TINY.top_k
        assert results["replicated"]["counts"].sum(1).tolist() == [sent, sent]


def test_balanced_ranks_tell_each_other_no_sizes_and_have_the_outputs_of_one(found: Found) -> None:
    alone = whole()
    balance_routing([alone])
    for rank, results in enumerate(found):
        assert_close(results["balanced"]["logits"], alone(tokens(2, 8, seed=rank)).detach())
        assert results["balanced"]["told"] == 0
        assert results["balanced"]["counts"].unique().tolist() == [2 * 8 * TINY.top_k // TINY.experts]


def test_a_model_answers_the_same_while_its_experts_move(found: Found) -> None:
    alone = whole()
    for rank, results in enumerate(found):
        moved = results["migrated"]
        assert moved["moves"] > 0
        assert len(moved["answers"]) > 2
        for answer in moved["answers"]:
            assert_close(answer, alone(data(rank)).detach())


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
