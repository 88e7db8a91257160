"""The kernels give what plain torch gives: on a GPU, or where TRITON_INTERPRET=1 says so, in Triton's interpreter.

Whole numbers are equal; attention adds in another order, so it is held to float64 within what the plain steps err.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from counterflow.moe import PRESETS
from counterflow.moe.decode_attention import mixed_latents, mixed_plainly
from counterflow.moe.dispatch import by_slot, counted, inverse_of, serving_slots
from counterflow.moe.rotary import rates, turned_behind, turned_plainly
from counterflow.moe.router import Router

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
needs_kernels = pytest.mark.skipif(
    not CUDA and not INTERPRETED, reason="torch sees no GPU here, and TRITON_INTERPRET=1 is not set"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="torch sees no GPU here")
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter multiplies the bits of bfloat16 numbers as if they were whole numbers.
DTYPE = torch.bfloat16 if CUDA else torch.float32


@pytest.mark.skipif(CUDA, reason="the GPU here runs the kernels itself")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreter_agrees_where_there_is_no_gpu() -> None:
    # In a process of its own, for what triton does is settled when it is first imported.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def attention(n: int, heads: int, width: int, turned: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, latents and positions; what nobody may look at is large."""
    generator = torch.Generator().manual_seed(n * heads + room)
    query = torch.randn(n, heads, width + turned, generator=generator)
    latents = torch.randn(n, room, width + turned, generator=generator)
    positions = torch.randint(0, room, (n,), generator=generator)
    positions[0], positions[-1] = 0, room - 1
    latents[torch.arange(room) > positions[:, None]] = 1000.0
    return query.to(DEVICE, DTYPE), latents.to(DEVICE, DTYPE), positions.to(DEVICE)


SHAPES = [(3, 5, 32, 16, 200), (2, 70, 64, 16, 130)] + [(5, 128, 512, 64, 1000), (64, 16, 256, 32, 300)] * CUDA


@needs_kernels
@pytest.mark.parametrize("parts", [None, 1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_errs_no_more_than_the_plain_steps_do(shape: tuple[int, ...], parts: int | None) -> None:
    from counterflow.moe.kernels.decode_attention_kernel import mixed_by_kernel

    query, latents, positions = attention(*shape)
    width, scale = shape[2], 0.1
    exact = mixed_plainly(query.double(), latents.double(), positions, width, scale)
    plain = (mixed_plainly(query, latents, positions, width, scale) - exact).abs().max()
    assert (mixed_by_kernel(query, latents, positions, width, scale, parts) - exact).abs().max() <= 2 * plain


@needs_kernels
def test_one_key_is_taken_as_it_is() -> None:
    from counterflow.moe.kernels.decode_attention_kernel import mixed_by_kernel

    query, latents, _ = attention(3, 4, 32, 16, 70)
    mixed = mixed_by_kernel(query, latents, torch.zeros(3, dtype=torch.int64, device=DEVICE), 32, 0.1)
    assert torch.equal(mixed, latents[:, :1, :32].expand_as(mixed))


@needs_kernels
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 48), (128, 144)])
def test_rows_are_turned_alike_there_and_back(heads: int, width: int) -> None:
    from counterflow.moe.kernels.rotary_kernel import turn_by_kernel

    generator = torch.Generator().manual_seed(heads)
    whole = torch.randn(2, 7, heads, width + 8 * (heads == 1), generator=generator).to(DEVICE, DTYPE)
    x = whole[..., -width:]  # one head's rows lie apart
    positions, by = torch.arange(3000, 3007, device=DEVICE), rates(16, 10000.0, x.device, torch.float32)
    turned = turn_by_kernel(x, positions, by, 1.0)
    plain = turned_plainly(x, positions, 16, 10000.0)
    torch.testing.assert_close(turned, plain, rtol=1e-2 if CUDA else 1e-5, atol=1e-5)
    assert torch.equal(turned[..., : width - 16], x[..., : width - 16])
    back = turn_by_kernel(turned.transpose(0, 1).contiguous().transpose(0, 1), positions, by, -1.0)
    torch.testing.assert_close(back, x, rtol=2e-2 if CUDA else 1e-5, atol=2e-2 if CUDA else 1e-5)


@needs_cuda
def test_the_gradient_is_turned_as_that_of_the_plain_steps() -> None:
    x = torch.randn(2, 7, 4, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions, grad = torch.arange(7, device="cuda"), torch.randn_like(x)
    found = [torch.autograd.grad(turn(x, positions, 16, 100.0), x, grad) for turn in (turned_behind, turned_plainly)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@needs_kernels
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "small", "v3-layer"])
def test_the_same_experts_are_chosen(preset: str, balanced: bool) -> None:
    from counterflow.moe.kernels.routing_kernel import choose_by_kernel

    config = replace(PRESETS[preset], hidden=16)
    router = Router(config).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    torch.nn.init.normal_(router.weight, generator=generator)
    router.bias.normal_(generator=generator)
    router.balanced = balanced
    x = torch.randn(37, 16, generator=generator, device=DEVICE)
    weights, chosen = router(x)
    counts = router.counts.clone()
    logits = torch.nn.functional.linear(x, router.weight).detach()
    own, same = choose_by_kernel(logits, router.bias, counts, config, torch.float32, balanced=balanced)
    assert torch.equal(same, chosen)
    assert torch.equal(counts, 2 * router.counts)
    torch.testing.assert_close(own, weights.detach(), rtol=1e-5, atol=0)


@needs_kernels
def test_of_equal_experts_those_with_lower_numbers_are_chosen() -> None:
    from counterflow.moe.kernels.routing_kernel import choose_by_kernel

    config = replace(PRESETS["tiny"], hidden=16)
    logits, bias = torch.zeros(2, config.experts, device=DEVICE), torch.zeros(config.experts, device=DEVICE)
    counts = torch.zeros(config.experts, dtype=torch.int64, device=DEVICE)
    _, chosen = choose_by_kernel(logits, bias, counts, config, torch.float32, balanced=False)
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2


def replicas(experts: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """A table of slots in any order, the copies of each expert, and how many slots there are."""
    copies = torch.randint(1, most + 1, (experts,), generator=generator)
    slots = int(copies.sum())
    table = torch.zeros(experts, most, dtype=torch.int64)
    table[torch.arange(most) < copies[:, None]] = torch.randperm(slots, generator=generator)
    return table, copies, slots


@needs_kernels
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 16, 1), (9, 16, 4), (64, 256, 8)])
def test_rows_are_sorted_alike(tokens: int, experts: int, top_k: int, most: int) -> None:
    from counterflow.moe.kernels.routing_kernel import sort_by_kernel

    generator = torch.Generator().manual_seed(tokens)
    table, copies, num_slots = replicas(experts, most, generator)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    slots = serving_slots(chosen, table, copies, 2)
    order = slots.argsort(stable=True)
    found = sort_by_kernel(chosen.to(DEVICE), table.to(DEVICE), copies.to(DEVICE), 2, num_slots)
    for own, plain in zip(found, (order, inverse_of(order), counted(slots, num_slots)), strict=True):
        assert torch.equal(own.cpu(), plain)


@needs_kernels
@pytest.mark.parametrize(("ranks", "slots"), [(1, 4), (3, 5), (8, 2), (128, 2)])
def test_rows_that_came_are_sorted_alike(ranks: int, slots: int) -> None:
    from counterflow.moe.kernels.routing_kernel import arrive_by_kernel

    counts = torch.randint(0, 5, (ranks, slots), generator=torch.Generator().manual_seed(ranks))
    rows = int(counts.sum())
    order = by_slot(counts, rows)
    found = arrive_by_kernel(counts.to(DEVICE), rows)
    for own, plain in zip(found, (order, inverse_of(order), counts.sum(0).cumsum(0)), strict=True):
        assert torch.equal(own.cpu(), plain)


# --- rows -----------------------------------------------------------------------------------------------------

# A kernel rounds to the dtype where torch does, but adds in another order: they differ by the last bit at most.
LAST_BIT = {"rtol": 2.0**-7, "atol": 2.0**-7} if CUDA else {"rtol": 1e-5, "atol": 1e-6}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 16), (2, 5, 96), (3, 7168)])
def test_rows_and_sums_of_rows_are_normed_alike(shape: tuple[int, ...]) -> None:
    from counterflow.moe.kernels.rows_kernel import norm_by_kernel

    x, added, weight = drawn(*shape), drawn(*shape, seed=1), drawn(shape[-1], seed=2)
    norm = torch.nn.functional.rms_norm
    same, normed = norm_by_kernel(x, weight, 1e-6)
    assert same is x
    torch.testing.assert_close(normed, norm(x, weight.shape, weight, 1e-6), **LAST_BIT)
    total, normed = norm_by_kernel(x, weight, 1e-6, added)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(normed, norm(x + added, weight.shape, weight, 1e-6), **LAST_BIT)


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 2 * 1500)])
def test_a_gate_opens_alike(shape: tuple[int, ...]) -> None:
    from counterflow.moe.kernels.rows_kernel import gate_by_kernel

    x = drawn(*shape)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(gate_by_kernel(x), torch.nn.functional.silu(gate) * up, **LAST_BIT)


@needs_kernels
def test_results_are_weighed_alike() -> None:
    from counterflow.moe.kernels.rows_kernel import weigh_by_kernel

    x, weights, returned = drawn(5, 1100), drawn(5, 4, seed=1), drawn(20, 1100, seed=2)
    places = torch.randperm(20, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    plain = x + torch.bmm(weights.unsqueeze(1), returned[places].view(5, 4, 1100)).view_as(x)
    torch.testing.assert_close(weigh_by_kernel(x, weights, returned, places), plain, **LAST_BIT)


@needs_kernels
def test_latents_are_kept_alike_and_where_they_belong() -> None:
    from counterflow.moe.kernels.rows_kernel import keep_by_kernel

    x, weight, positions = drawn(3, 80), drawn(64, seed=1), torch.tensor([0, 4, 2], device=DEVICE)
    latents = drawn(2, 3, 5, 80, seed=2)[1]  # one layer's
    expected = latents.clone()
    normed = torch.nn.functional.rms_norm(x[:, :64], (64,), weight, 1e-6)
    key = turned_plainly(x[:, None, 64:], positions, 16, 100.0)[:, 0]
    expected[torch.arange(3), positions] = torch.cat([normed, key], dim=-1)
    keep_by_kernel(x, weight, 1e-6, positions, rates(16, 100.0, x.device, torch.float32), latents)
    torch.testing.assert_close(latents, expected, **LAST_BIT)


@needs_kernels
def test_rows_can_be_turned_into_a_part_of_others() -> None:
    from counterflow.moe.kernels.rotary_kernel import turn_by_kernel

    x, positions = drawn(3, 4, 48), torch.arange(3, device=DEVICE)
    out, by = drawn(3, 4, 80, seed=1), rates(16, 100.0, x.device, torch.float32)
    before = out.clone()
    turn_by_kernel(x[..., 32:], positions, by, 1.0, out[..., 64:])
    assert torch.equal(out[..., 64:], turn_by_kernel(x[..., 32:].contiguous(), positions, by, 1.0))
    assert torch.equal(out[..., :64], before[..., :64])


@needs_kernels
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [[3], [0, 130, 0, 1], [256, 128], [300, 300, 5]])
def test_groups_of_rows_are_multiplied_alike(sizes: list[int], gated: bool) -> None:
    from counterflow.moe.kernels.grouped_kernel import product_by_kernel

    rows, weight = drawn(sum(sizes), 192), drawn(len(sizes), 256, 192, seed=1) / 14
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0, dtype=torch.int32)
    parts = torch.split(rows.double(), sizes)
    exact = torch.cat([part @ own.double().T for part, own in zip(parts, weight, strict=True)])
    if gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up
    found = product_by_kernel(rows, weight, ends, gated=gated)
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-6 if CUDA else 1e-5, atol=2.0**-6 if CUDA else 1e-5)


@needs_cuda
def test_decode_attention_can_be_captured_and_reads_its_positions_anew() -> None:
    query, latents, positions = attention(4, 16, 64, 16, 300)
    with torch.no_grad():
        mixed_latents(query, latents, positions, 64, 0.1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = mixed_latents(query, latents, positions, 64, 0.1)
        positions.copy_(torch.tensor([7, 0, 299, 150]))
        graph.replay()
        assert torch.equal(captured, mixed_latents(query, latents, positions, 64, 0.1))


@needs_cuda
def test_a_block_decodes_and_prefills_alike_with_and_without_kernels() -> None:
    from counterflow.moe import Decode, LatentCache, MixtureBlock, Part, Prefill
    from counterflow.moe.model import made_on

    config = replace(PRESETS["small"], layers=1)
    with made_on(torch.device("cuda"), torch.bfloat16):
        block = MixtureBlock(config, 0)
        x = torch.randn(8, config.hidden)
    block.router.balanced = True  # of experts that are nearly alike, either may choose another
    cache = LatentCache(config, 8, 64, torch.bfloat16, "cuda")
    cache.latents.normal_()
    for batch in (Decode(cache, 0, torch.full((8,), 40, device="cuda")), Prefill(cache, [Part(0, 0, 8)])):
        with torch.no_grad():
            fast = block(x, batch)
        kept = cache.latents.clone()
        plain = block(x, batch).detach()
        torch.testing.assert_close(fast, plain, rtol=0.05, atol=0.05)
        torch.testing.assert_close(kept, cache.latents, rtol=0.05, atol=0.05)
