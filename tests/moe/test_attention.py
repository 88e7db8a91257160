"""Attention over latents: the same by every way to it, causal, and blind to where positions start."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow import CounterflowError
from counterflow.moe import Decode, LatentCache, Part, Prefill, run
from counterflow.moe.attention import LatentAttention
from counterflow.moe.causal import causal_attention
from counterflow.moe.rotary import rotated, turns
from moe.models import CLOSE, TINY, TWO_LAYERS, packed, tokens, whole


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention() -> LatentAttention:
    torch.manual_seed(0)
    return LatentAttention(TINY).double()


def one_pair_at_a_time(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition."""
    batch, heads, n, width = query.shape
    behind = key.shape[2] - n
    out = torch.zeros(batch, heads, n, value.shape[3], dtype=query.dtype)
    for b, h, i in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(n)).tolist():
        scores = torch.stack([query[b, h, i] @ key[b, h, j] / width**0.5 for j in range(behind + i + 1)])
        out[b, h, i] = sum(share * value[b, h, j] for j, share in enumerate(scores.softmax(0)))
    return out


@pytest.mark.parametrize(("n", "m"), [(4, 4), (1, 5), (3, 7)])
def test_each_query_sees_the_keys_up_to_its_own(n: int, m: int) -> None:
    query, key, value = randn(2, 3, n, 6), randn(2, 3, m, 6, seed=1), randn(2, 3, m, 4, seed=2)
    torch.testing.assert_close(causal_attention(query, key, value), one_pair_at_a_time(query, key, value), **CLOSE)


def test_heads_see_latents_as_the_definition_says() -> None:
    module, x = attention(), randn(1, 5, TINY.hidden)
    query, latent = module.project(x, torch.arange(5))
    opened = module.latent_up(latent[..., : TINY.latent]).view(1, 5, TINY.heads, TINY.nope + TINY.value)
    turned = latent[..., None, TINY.latent :].expand(1, 5, TINY.heads, TINY.rope)
    key = torch.cat([opened[..., : TINY.nope], turned], dim=-1)
    mixed = one_pair_at_a_time(*(t.transpose(1, 2) for t in (query, key, opened[..., TINY.nope :])))
    expected = module.out(mixed.transpose(1, 2).reshape(1, 5, -1))
    torch.testing.assert_close(module.attend(query, latent), expected, **CLOSE)


def test_folded_queries_get_what_opened_latents_give() -> None:
    module, x = attention(), randn(3, 6, TINY.hidden)
    query, latent = module.project(x, torch.arange(6))
    for position in range(6):
        at = torch.full((3,), position)
        folded = module.attend_folded(module.fold(query[:, position]), latent, at)
        torch.testing.assert_close(folded, module.attend(query, latent)[:, position], **CLOSE)


# --- rotation -----------------------------------------------------------------------------------------------


def turned(x: Tensor, position: int) -> Tensor:
    return rotated(x, turns(torch.tensor(position), x.shape[-1], 10000.0, x.dtype))


@given(position=st.integers(0, 100_000))
def test_turning_keeps_lengths(position: int) -> None:
    x = randn(3, 8)
    torch.testing.assert_close(turned(x, position).norm(dim=-1), x.norm(dim=-1))


@given(query=st.integers(0, 1000), key=st.integers(0, 1000), shift=st.integers(0, 10_000))
def test_scores_depend_on_the_distance_alone(query: int, key: int, shift: int) -> None:
    q, k = randn(8), randn(8, seed=1)
    score, later = (turned(q, query + by) @ turned(k, key + by) for by in (0, shift))
    torch.testing.assert_close(score, later, rtol=0, atol=1e-10)


def test_a_pair_is_turned_by_its_own_frequency() -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    angles = torch.tensor([3.0, 3.0 * 10000**-0.5], dtype=torch.float64)
    expected = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten()
    torch.testing.assert_close(turned(x, 3), expected)


# --- the cache ----------------------------------------------------------------------------------------------


def test_prompts_packed_into_one_micro_batch_get_what_each_gets_alone() -> None:
    model, prompts = whole(), [tokens(n, seed=n) for n in (3, 1, 6)]
    cache = LatentCache(TWO_LAYERS, 3, 6, torch.float64)
    parts = [Part(request, 0, len(prompt)) for request, prompt in enumerate(prompts)]
    logits = run(model, packed(prompts, parts), Prefill(cache, parts)).split([3, 1, 6])
    for prompt, found in zip(prompts, logits, strict=True):
        torch.testing.assert_close(found, model(prompt[None])[0], **CLOSE)


def test_prefill_and_decode_give_what_the_whole_sequence_gives() -> None:
    model, sequences = whole(), tokens(2, 9)
    expected = model(sequences)
    cache = LatentCache(TWO_LAYERS, 2, 9, torch.float64)
    lengths = torch.tensor([3, 5])
    parts = [Part(request, 0, length) for request, length in enumerate(lengths.tolist())]
    with torch.no_grad():
        run(model, packed(list(sequences), parts), Prefill(cache, parts))
        for step in range(4):
            at = lengths + step
            logits = run(model, sequences[torch.arange(2), at], Decode(cache, 0, at))
            torch.testing.assert_close(logits, expected[torch.arange(2), at], **CLOSE)


@given(cuts=st.lists(st.integers(1, 8), max_size=4))
def test_a_prompt_in_any_pieces_gives_what_it_gives_whole(cuts: list[int]) -> None:
    model, prompt = whole(), tokens(9)
    cache = LatentCache(TWO_LAYERS, 2, 9, torch.float64)
    ends = sorted({*cuts, 9})
    with torch.no_grad():
        pieces = [Part(1, start, end - start) for start, end in zip([0, *ends], ends, strict=False)]
        found = [run(model, packed([prompt, prompt], [part]), Prefill(cache, [part])) for part in pieces]
        torch.testing.assert_close(torch.cat(found), model(prompt[None])[0], **CLOSE)


def test_what_is_not_in_the_cache_is_refused() -> None:
    cache = LatentCache(TINY, 2, 4, torch.float64)
    for parts in ([], [Part(2, 0, 1)], [Part(0, 3, 2)], [Part(0, -1, 2)], [Part(0, 0, 0)]):
        with pytest.raises(CounterflowError, match=r"micro-batch|fit"):
            Prefill(cache, parts)
    with pytest.raises(CounterflowError, match="2 requests from number 1 on are not in a cache of 2; give some"):
        Decode(cache, 1, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(CounterflowError, match=r"the batch has 1 tokens and x is \[2, 64\]; give one row for each"):
        run(whole(), tokens(2), Prefill(cache, [Part(0, 0, 1)]))
    with pytest.raises(CounterflowError, match="the batch is a SimpleNamespace; give a Prefill, a Decode, or None"):
        run(whole(), tokens(1), SimpleNamespace(positions=torch.zeros(1), store=lambda *_: None))


def test_a_single_row_at_an_odd_place_is_turned_like_any_other() -> None:
    rows = torch.randn(2, 33 + 8, dtype=torch.float64)
    turn = turns(torch.arange(2), 8, 10000.0, torch.float64)
    together = rotated(rows[:, 33:], turn)
    alone = torch.cat([rotated(rows[row : row + 1, 33:], turn[row : row + 1]) for row in range(2)])
    assert torch.equal(alone, together)
