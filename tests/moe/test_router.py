"""The router against its definition, one token and one expert at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow.moe import ModelConfig, balance_routing, take_counts
from counterflow.moe.draw import draw
from counterflow.moe.router import Router
from moe.models import CLOSE, TINY, tokens, whole


def router(config: ModelConfig = TINY, seed: int = 0) -> Router:
    made = Router(config).double()
    draw(made.weight, seed)
    made.bias.copy_(0.3 * torch.randn(config.experts, generator=torch.Generator().manual_seed(seed)))
    return made


def by_definition(made: Router, token: Tensor) -> dict[int, float]:
    """The weight of each expert that one token goes to."""
    config = made.config
    size = config.experts // config.groups
    scores = [1 / (1 + float((-(row @ token)).exp())) for row in made.weight.detach()]
    biased = [score + float(bias) for score, bias in zip(scores, made.bias, strict=True)]
    worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(config.groups)]
    groups = sorted(range(config.groups), key=lambda g: -worth[g])[: config.top_groups]
    open_ = [expert for expert in range(config.experts) if expert // size in groups]
    chosen = sorted(open_, key=lambda expert: -biased[expert])[: config.top_k]
    total = sum(scores[expert] for expert in chosen)
    return {expert: config.routed_scaling * scores[expert] / total for expert in chosen}


@given(
    seed=st.integers(0, 2**32),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 3), (16, 5)]),
    top_k=st.integers(1, 5),
)
def test_experts_and_weights_are_those_of_the_definition(seed: int, groups: tuple[int, int], top_k: int) -> None:
    made = router(replace(TINY, groups=groups[0], top_groups=groups[1], top_k=top_k, hidden=6), seed)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights, chosen = made(x)
    for token, own, experts in zip(x, weights.tolist(), chosen.tolist(), strict=True):
        assert dict(zip(experts, own, strict=True)) == pytest.approx(by_definition(made, token), abs=1e-12)


@given(seed=st.integers(0, 2**32))
def test_a_tokens_experts_are_different_ones_in_few_groups(seed: int) -> None:
    _, chosen = router(seed=seed)(torch.randn(20, TINY.hidden, dtype=torch.float64))
    for experts in chosen.tolist():
        assert len(set(experts)) == TINY.top_k
        assert len({expert * TINY.groups // TINY.experts for expert in experts}) <= TINY.top_groups


def test_the_bias_changes_who_is_chosen_and_not_what_they_weigh() -> None:
    made, x = router(), torch.randn(7, TINY.hidden, dtype=torch.float64)
    made.bias.zero_()
    made.bias[3] = 10.0
    weights, chosen = made(x)
    assert (chosen == 3).any(1).all()
    scores = torch.sigmoid(x @ made.weight.T).gather(1, chosen)
    torch.testing.assert_close(weights, TINY.routed_scaling * scores / scores.sum(1, keepdim=True), **CLOSE)


def test_no_gradient_comes_through_the_choice() -> None:
    made = router()
    weights, _ = made(torch.randn(7, TINY.hidden, dtype=torch.float64))
    weights.sum().backward()
    # They always add up to the scaling, so nothing is left of their sum.
    torch.testing.assert_close(made.weight.grad, torch.zeros_like(made.weight), **CLOSE)


def test_evening_out_moves_the_bias_towards_equal_loads() -> None:
    made = router(replace(TINY, hidden=16))
    made.bias.zero_()
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5

    def busiest() -> float:
        made.counts.zero_()
        made(x)
        return float(made.counts.max() / made.counts.double().mean())

    before = busiest()
    for _ in range(200):
        made.even_out(made.counts, speed=0.01)
        after = busiest()
    assert before > 1.8
    assert after < 1.2


def test_the_bias_moves_by_the_sign_of_the_error() -> None:
    made = router()
    made.bias.zero_()
    made.even_out(torch.tensor([4, 0] + [2] * 14), speed=0.5)
    assert made.bias.tolist() == [-0.5, 0.5] + [0.0] * 14


@given(count=st.integers(1, 40))
def test_balanced_routing_keeps_all_experts_equally_busy(count: int) -> None:
    model = whole()
    balance_routing([model])
    model(tokens(1, count))
    counts = take_counts([model])
    assert counts.sum(1).tolist() == [count * TINY.top_k] * 2
    assert int(counts.max() - counts.min()) <= 1
    balance_routing([model], balanced=False)
    model(tokens(1, 32))
    assert take_counts([model]).max() > 8


def test_counts_are_taken_once() -> None:
    model = whole()
    model(tokens(2, 5))
    assert take_counts([model]).sum().item() == 2 * 10 * TINY.top_k
    assert take_counts([model]).sum().item() == 0
