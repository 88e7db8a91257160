"""Generation on a GPU: a step in a CUDA graph makes the tokens that it makes when it is launched."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from counterflow.moe import PRESETS, LatentCache, stage
from counterflow.moe.inference.generate import Decoding, generate
from counterflow.moe.inference.prefill import prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

SMALL = replace(PRESETS["small"], layers=3)
NEW_TOKENS = 12


def model(dtype: torch.dtype) -> nn.Sequential:
    return stage(SMALL, 0, 1, device="cuda", dtype=dtype)


def prompts(requests: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(requests)
    lengths = torch.randint(1, 40, (requests,), generator=generator).tolist()
    return [torch.randint(SMALL.vocabulary, (length,), generator=generator).tolist() for length in lengths]


def launched(here: nn.Sequential, requests: int, num_microbatches: int) -> Tensor:
    """Every step anew."""
    given = prompts(requests)
    cache = LatentCache(SMALL, requests, 40 + NEW_TOKENS, torch.bfloat16, "cuda")
    first = prefill(here, given, cache, overlap=num_microbatches > 1).argmax(-1)
    positions = torch.tensor([len(prompt) for prompt in given], device="cuda")
    decoding, made = Decoding(here, cache, first, positions, num_microbatches), [first.clone()]
    for _ in range(NEW_TOKENS - 1):
        decoding.step()
        made.append(decoding.tokens.clone())
    return torch.stack(made, dim=1)


@pytest.mark.parametrize("requests", [1, 2, 7])
def test_a_replayed_step_makes_the_tokens_of_a_launched_one(requests: int) -> None:
    here = model(torch.bfloat16)
    for overlap in (True, False):
        two = 2 if overlap and requests > 1 else 1
        assert torch.equal(generate(here, prompts(requests), NEW_TOKENS, overlap), launched(here, requests, two))


def test_further_tokens_are_made_by_one_graph() -> None:
    here = model(torch.bfloat16)
    cache = LatentCache(SMALL, 4, 20, torch.bfloat16, "cuda")
    first = prefill(here, [[1, 2], [3], [4, 5, 6], [7]], cache).argmax(-1)
    decoding = Decoding(here, cache, first, torch.tensor([2, 1, 3, 1], device="cuda"), 2)
    decoding.step()
    before = decoding.positions.tolist()
    replay = decoding.replay()
    assert replay != decoding.step
    assert decoding.positions.tolist() == before, "capturing runs nothing"
    replay()
    replay()
    assert decoding.positions.tolist() == [position + 2 for position in before]


def test_in_double_precision_tokens_are_the_same_with_and_without_overlap() -> None:
    here = model(torch.float64)
    one, two = (generate(here, prompts(5), 6, overlap) for overlap in (False, True))
    assert torch.equal(one, two)
