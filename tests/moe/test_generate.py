"""Generation: the same tokens however the requests are divided, and the ones that a slow reference finds."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from counterflow.errors import ModelError
from counterflow.moe import PRESETS, LatentCache, stage
from counterflow.moe.inference.generate import Decoding, generate
from counterflow.moe.inference.prefill import prefill
from counterflow.schedule.chunk_plans import DECODE, forward_steps, lay_out

TINY = replace(PRESETS["tiny"], layers=2)


def model(seed: int = 0) -> nn.Sequential:
    return stage(TINY, 0, 1, seed=seed, dtype=torch.float64)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(TINY.vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def without_a_cache(here: nn.Sequential, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """All of a request anew for each token, as in training."""
    made = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new_tokens):
            tokens.append(int(here(torch.tensor([tokens]))[0, -1].argmax()))
        made.append(tokens[len(prompt) :])
    return made


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    new_tokens=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=20)
def test_tokens_are_the_same_with_and_without_overlap_and_without_a_cache(
    lengths: list[int], new_tokens: int, seed: int
) -> None:
    here, prompts = model(seed), prompts_of(lengths, seed)
    wanted = without_a_cache(here, prompts, new_tokens)
    assert generate(here, prompts, new_tokens).tolist() == wanted
    assert generate(here, prompts, new_tokens, overlap=False).tolist() == wanted


@pytest.mark.parametrize("requests", [1, 2, 5])
def test_a_decode_step_is_issued_in_the_published_order_where_there_are_two_requests(requests: int) -> None:
    shared = [True] * TINY.layers
    halves = [forward_steps(shared, mark, halves=True, receives=True) for mark in ("0", "1")[:requests]]
    wanted = lay_out(DECODE, *halves).names
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        generate(model(), prompts_of([3] * requests), new_tokens=2)
    ranges = sorted((e.time_range.start, e.name) for e in recorded.events() if e.name in wanted)
    names = [name for _, name in ranges]
    assert tuple(names[-len(wanted) :]) == wanted


def test_a_step_leaves_its_state_where_it_is_so_that_it_can_be_replayed() -> None:
    here, prompts = model(), prompts_of([4, 2, 3])
    cache = LatentCache(TINY, 3, 8, torch.float64)
    decoding = Decoding(here, cache, prefill(here, prompts, cache).argmax(-1), torch.tensor([4, 2, 3]), 2)
    tokens, positions = decoding.tokens, decoding.positions
    places = [tokens.data_ptr(), positions.data_ptr(), cache.latents.data_ptr()]
    for number in range(3):
        decoding.step()
        assert positions.tolist() == [5 + number, 3 + number, 4 + number]
        assert [decoding.tokens.data_ptr(), decoding.positions.data_ptr(), cache.latents.data_ptr()] == places
    assert decoding.replay() == decoding.step, "a CPU captures nothing"


@pytest.mark.parametrize("new_tokens", [0, -1, 1.5, True])
def test_a_number_of_tokens_that_is_none_is_refused(new_tokens: object) -> None:
    with pytest.raises(ModelError, match=r"new_tokens is .*; it has to be a whole number of at least 1"):
        generate(model(), [[1]], new_tokens)


def test_prompts_may_be_a_tensor_of_any_whole_numbers() -> None:
    here, prompts = model(), prompts_of([3, 3, 3])
    wanted = generate(here, prompts, 2)
    assert generate(here, torch.tensor(prompts), 2).equal(wanted)
    assert generate(here, [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts], 2).equal(wanted)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ModelError, match="there are no prompts; give at least one"):
        generate(model(), [], 1)
