"""Prefill: micro-batches that cost the same, and logits that do not tell how the prompts were divided."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from counterflow.errors import ModelError
from counterflow.moe import PRESETS, LatentCache, Part, Prefill, run, stage
from counterflow.moe.inference.prefill import PartCost, Parts, prefill, split_prompts

TINY = replace(PRESETS["tiny"], layers=2)
CONFIGS = st.sampled_from(sorted(PRESETS)).map(PRESETS.__getitem__)
LENGTHS = st.lists(st.one_of(st.integers(1, 4), st.integers(1, 20_000)), min_size=1, max_size=12)
Halves = tuple[Parts, Parts]


def dearer(halves: Halves, cost: PartCost) -> int:
    return max(sum(map(cost, half)) for half in halves)


def at_the_middle_token(lengths: Sequence[int]) -> Halves:
    """The prompts in order, cut where half of all tokens are on each side."""
    left = sum(lengths) // 2
    halves: tuple[list[Part], list[Part]] = ([], [])
    for request, length in enumerate(lengths):
        first = min(left, length)
        left -= first
        if first:
            halves[0].append(Part(request, 0, first))
        if length > first:
            halves[1].append(Part(request, first, length - first))
    return tuple(halves[0]), tuple(halves[1])


def best_there_is(lengths: Sequence[int], cost: PartCost) -> int:
    """Every prompt in either half, one of them cut everywhere."""
    worst = []
    for places in product((0, 1), repeat=len(lengths)):
        for cut, length in enumerate(lengths):
            for count in range(length):
                sums = [0, 0]
                for request, place in enumerate(places):
                    if request != cut:
                        sums[place] += cost(Part(request, 0, lengths[request]))
                sums[0] += cost(Part(cut, 0, count))
                sums[1] += cost(Part(cut, count, length - count))
                worst.append(max(sums))
    return min(worst)


# --- the split ----------------------------------------------------------------------------------------------


def test_a_part_costs_what_its_tokens_do_one_by_one() -> None:
    cost = PartCost(per_token=1000, per_latent=100, per_pair=1)
    assert cost(Part(0, 3, 2)) == 2 * 1000 + 5 * 100 + (4 + 5)
    assert cost(Part(0, 3, 0)) == 0


@given(lengths=LENGTHS, config=CONFIGS)
@settings(max_examples=300)
def test_every_token_is_in_one_half_and_at_most_one_prompt_in_both(lengths: list[int], config: object) -> None:
    first, second = split_prompts(lengths, config)
    spans = sorted((part.request, part.start, part.start + part.count) for part in (*first, *second))
    ends = [0] * len(lengths)
    for request, start, end in spans:
        assert start == ends[request] < end
        ends[request] = end
    assert ends == lengths
    assert len(spans) <= len(lengths) + 1
    assert all(part.start == 0 for part in first), "what comes later in a prompt is in the later micro-batch"
    assert first
    assert bool(second) == (sum(lengths) > 1)


@given(lengths=LENGTHS, config=CONFIGS)
@settings(max_examples=300)
def test_it_is_never_worse_than_a_cut_at_the_middle_token(lengths: list[int], config: object) -> None:
    cost = PartCost.of(config)
    assert dearer(split_prompts(lengths, config), cost) <= dearer(at_the_middle_token(lengths), cost)


@given(lengths=LENGTHS, config=CONFIGS)
@settings(max_examples=300)
def test_the_halves_differ_by_one_token_at_most(lengths: list[int], config: object) -> None:
    cost = PartCost.of(config)
    first, second = (sum(map(cost, half)) for half in split_prompts(lengths, config))
    longest = max(lengths)
    dearest_token = cost(Part(0, 0, longest)) - cost(Part(0, 0, longest - 1))
    assert abs(first - second) <= dearest_token


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    cost=st.builds(PartCost, st.integers(1, 50), st.integers(0, 10), st.integers(0, 20)),
)
@settings(max_examples=60)
def test_no_division_is_better_by_more_than_a_token(lengths: list[int], cost: PartCost) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartCost, "of", lambda config: cost)
        found = dearer(split_prompts(lengths, TINY), cost)
    longest = max(lengths)
    token = cost(Part(0, 0, longest)) - cost(Part(0, 0, longest - 1))
    assert best_there_is(lengths, cost) <= found <= best_there_is(lengths, cost) + token


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_no_prompt_or_an_empty_one_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ModelError, match=r"give at least one prompt, of at least one token each"):
        split_prompts(lengths, TINY)


# --- the run ------------------------------------------------------------------------------------------------


def model(seed: int = 0) -> nn.Sequential:
    return stage(TINY, 0, 1, seed=seed, dtype=torch.float64)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(TINY.vocabulary, (length,), generator=generator).tolist() for length in lengths]


def cache_for(prompts: Sequence[Sequence[int]]) -> LatentCache:
    return LatentCache(TINY, len(prompts), max(map(len, prompts)), torch.float64)


@torch.no_grad()
def plainly(here: nn.Sequential, prompts: list[list[int]], cache: LatentCache) -> Tensor:
    """One prompt after the other, and all of its logits."""
    logits = []
    for request, prompt in enumerate(prompts):
        batch = Prefill(cache, [Part(request, 0, len(prompt))])
        logits.append(run(here, torch.tensor(prompt), batch)[-1])
    return torch.stack(logits)


CASES = {
    "one huge prompt": [3, 200, 5, 1],
    "one prompt": [33],
    "one prompt of two tokens": [2],
    "a single token": [1],
    "prompts of one token": [1, 1, 1],
    "many prompts": [7, 1, 12, 3, 3, 9, 2, 14, 5, 1, 8],
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_logits_and_latents_are_those_of_each_prompt_alone(lengths: list[int], overlap: bool) -> None:
    here, prompts = model(), prompts_of(lengths)
    wanted, found = cache_for(prompts), cache_for(prompts)
    expected = plainly(here, prompts, wanted)
    torch.testing.assert_close(prefill(here, prompts, found, overlap), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.latents, wanted.latents, rtol=0, atol=1e-12)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_two_micro_batches_give_the_logits_of_one(lengths: list[int], seed: int) -> None:
    here, prompts = model(seed), prompts_of(lengths, seed)
    one, two = (prefill(here, prompts, cache_for(prompts), overlap) for overlap in (False, True))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompt", [[], [0, 256], [-1], [1.5], [[1], [2]], "a", ["a"], [None], [[1], 2], 5])
def test_what_is_no_row_of_tokens_is_refused(prompt: object) -> None:
    with pytest.raises(ModelError, match=r"give a row of at least one token, whole numbers from 0 to 255"):
        prefill(model(), [[1], prompt], cache_for([[1, 2], [1, 2]]))


def test_a_stage_of_several_is_refused() -> None:
    with pytest.raises(ModelError, match=r"build it as the only stage: stage\(config, 0, 1\)"):
        prefill(stage(TINY, 0, 2), [[1]], cache_for([[1]]))
    with pytest.raises(ModelError, match=r"the model has 0 blocks of a decoder"):
        prefill(nn.Sequential(nn.Linear(1, 1)), [[1]], cache_for([[1]]))
