"""The model's blocks under the chunk engine: the results of plain runs, in training, prefill and decode."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterflow.moe import Decode, LatentCache, Part, Prefill
from counterflow.moe import run as run_plainly
from counterflow.runtime.backward_program import BackwardProgram
from counterflow.runtime.chunk import run
from counterflow.runtime.forward_program import ForwardProgram
from counterflow.runtime.sequence import Chunk
from counterflow.runtime.weights import LinearSplit
from counterflow.schedule.chunk_plans import DECODE, PREFILL, TRAINING, lay_out, one_after_the_other
from moe.models import TWO_LAYERS, any_placement, packed, tokens, whole
from moe.spreading import gradients, next_token_loss
from runtime.chunks import LateExchange

LENGTHS = (5, 3)


def late(**options: Any) -> nn.Sequential:
    """Rows arrive when they are waited for, and no sooner."""
    return whole(exchange=LateExchange(), placement=any_placement(1, 1), **options)


def forward(model: nn.Sequential, x: Tensor, **options: Any) -> ForwardProgram:
    chunk, split = Chunk.of(model), LinearSplit
    assert chunk is not None
    return ForwardProgram(chunk, x, lambda: split(model), **options)


def test_a_forward_and_a_backward_at_once_are_bitwise_those_of_plain_autograd() -> None:
    up, down = tokens(2, 6, seed=1), tokens(1, 7, seed=2)
    plain = whole(placement=any_placement(1, 1))
    expected = plain(up)
    loss = next_token_loss(plain(down), down)
    loss.backward()

    model = late()
    earlier = forward(model, down)
    run(one_after_the_other(earlier.steps), earlier)
    its_loss = next_token_loss(earlier.output, down)
    programs = forward(model, up), BackwardProgram(earlier, None, its_loss)
    run(lay_out(TRAINING, *(program.steps for program in programs)), *programs)

    assert torch.equal(programs[0].output, expected)
    assert torch.equal(its_loss, loss)
    found, wanted = gradients([model]), gradients([plain])
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_every_matrix_waits_for_w() -> None:
    model, x = late(), tokens(1, 7)
    program = forward(model, x)
    run(one_after_the_other(program.steps), program)
    backward = BackwardProgram(program, None, next_token_loss(program.output, x), weights=False)
    run(one_after_the_other(backward.steps), backward)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1 and name != "0.weight"}
    assert [name for name, p in matrices.items() if p.grad is not None] == []
    backward.backward_weight()
    assert [name for name, p in matrices.items() if id(p) not in backward.deferred] == []
    plain = whole(placement=any_placement(1, 1))
    next_token_loss(plain(x), x).backward()
    found, wanted = gradients([model]), gradients([plain])
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def in_parts(cache: LatentCache, cuts: Sequence[Sequence[Part]]) -> list[tuple[Tensor, Prefill]]:
    """Micro-batches of the prompts in ``cuts``."""
    prompts = [tokens(length, seed=length) for length in LENGTHS]
    return [(packed(prompts, parts), Prefill(cache, parts)) for parts in cuts]


def a_cache() -> LatentCache:
    return LatentCache(TWO_LAYERS, len(LENGTHS), 8, torch.float64)


@torch.no_grad()
def test_two_prefills_at_once_give_what_they_give_in_turn() -> None:
    # The first prompt is cut: its second part, in the other micro-batch, has to find the first one's latents.
    cuts = [Part(0, 0, 4)], [Part(0, 4, 1), Part(1, 0, 3)]
    cache, plain, model = a_cache(), whole(placement=any_placement(1, 1)), late()
    expected = [run_plainly(plain, x, batch) for x, batch in in_parts(cache, cuts)]
    again = a_cache()
    programs = [forward(model, x, batch=batch, mark=str(n)) for n, (x, batch) in enumerate(in_parts(again, cuts))]
    run(lay_out(PREFILL, *(program.steps for program in programs)), *programs)
    assert all(torch.equal(program.output, wanted) for program, wanted in zip(programs, expected, strict=True))
    assert torch.equal(again.latents, cache.latents)


@torch.no_grad()
def test_two_decodes_at_once_give_what_they_give_in_turn() -> None:
    cache, plain, model = a_cache(), whole(placement=any_placement(1, 1)), late()
    whole_prompts = [[Part(0, 0, LENGTHS[0]), Part(1, 0, LENGTHS[1])]]
    ((x, batch),) = in_parts(cache, whole_prompts)
    run_plainly(plain, x, batch)
    again = a_cache()
    again.latents.copy_(cache.latents)
    following = tokens(2, seed=9)

    def halves(kept: LatentCache) -> list[tuple[Tensor, Decode]]:
        return [(following[n : n + 1], Decode(kept, n, torch.tensor([LENGTHS[n]]))) for n in (0, 1)]

    expected = [run_plainly(plain, x, batch) for x, batch in halves(cache)]
    programs = [
        forward(model, x, batch=batch, mark=str(n), halves=True, receives=True)
        for n, (x, batch) in enumerate(halves(again))
    ]
    run(lay_out(DECODE, *(program.steps for program in programs)), *programs)
    assert all(torch.equal(program.output, wanted) for program, wanted in zip(programs, expected, strict=True))
    assert torch.equal(again.latents, cache.latents)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of norms, by torch
def test_the_blocks_run_under_autocast() -> None:
    model = nn.Sequential(*list(whole())[1:3]).float()
    x = torch.randn(2, 5, TWO_LAYERS.hidden)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.dim() > 1)
