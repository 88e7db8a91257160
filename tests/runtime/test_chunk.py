"""The chunk engine: whatever legal order its steps come in, results and gradients are those of plain autograd."""

import gc
import random
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from counterflow.runtime import Context
from counterflow.runtime.chunk import BackwardProgram, Chunk, ForwardProgram, run
from counterflow.runtime.graph_split import GraphSplit
from counterflow.runtime.pipeline import SPLITS
from counterflow.schedule.chunk_plans import (
    DECODE,
    PREFILL,
    TRAINING,
    backward_steps,
    forward_steps,
    lay_out,
    one_after_the_other,
)
from runtime.cases import assert_bitwise, expected_gradients, gradients_by_rank, ordinary_case
from runtime.chunks import FEATURES, KINDS, LateExchange, SharedBlock, any_legal_order, stage_of_blocks
from strategies import legal_sizes

kinds = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3)


def chain(names: Sequence[str], exchange: LateExchange | None = None) -> nn.Sequential:
    """Blocks with a plain module before and behind."""
    torch.manual_seed(7)
    blocks = [KINDS[name](seed, exchange) for seed, name in enumerate(names)]
    return nn.Sequential(nn.Linear(FEATURES, FEATURES).double(), *blocks, nn.Tanh())


def leaf(seed: int, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- results ------------------------------------------------------------------------------------------------


@given(
    forward=kinds,
    backward=kinds,
    seed=st.integers(0, 2**32),
    serial=st.booleans(),
    split=st.sampled_from(sorted(SPLITS)),
)
@settings(max_examples=60)
def test_any_legal_order_of_a_forward_and_a_backward_gives_bitwise_the_results_of_plain_autograd(
    forward: list[str], backward: list[str], seed: int, serial: bool, split: str
) -> None:
    up, down = chain(forward), chain(backward)
    expected_output = up(leaf(1))
    x = leaf(2)
    loss = down(x).square().sum()
    loss.backward()
    wanted = gradients(down)

    exchange = LateExchange()
    up, down = chain(forward, exchange), chain(backward, exchange)
    splitting, y = SPLITS[split], leaf(2)
    earlier = ForwardProgram(Chunk.of(down), y, lambda: splitting(down))
    run(one_after_the_other(earlier.steps), earlier)
    its_loss = earlier.output.square().sum()
    programs = (
        ForwardProgram(Chunk.of(up), leaf(1), lambda: splitting(up)),
        BackwardProgram(earlier, None, its_loss),
    )
    plan = lay_out(TRAINING, *(program.steps for program in programs))
    run(any_legal_order(plan, random.Random(seed)), *programs, serial=serial)
    assert torch.equal(its_loss, loss)
    assert torch.equal(programs[0].output, expected_output)
    assert torch.equal(y.grad, x.grad)
    assert same(gradients(down), wanted)
    assert exchange.under_way == 0


@given(one=kinds, other=kinds, seed=st.integers(0, 2**32), pattern=st.sampled_from([PREFILL, DECODE]))
@settings(max_examples=60)
def test_any_legal_order_of_two_forwards_gives_bitwise_their_outputs(
    one: list[str], other: list[str], seed: int, pattern: str
) -> None:
    halves = pattern == DECODE
    if halves:
        one, other = ["HalvedBlock"] * len(one), ["HalvedBlock"] * len(other)
    with torch.no_grad():
        expected = [chain(names)(leaf(number)) for number, names in enumerate((one, other))]
        exchange = LateExchange()
        programs = [
            ForwardProgram(
                Chunk.of(chain(names, exchange)),
                leaf(number),
                GraphSplit,
                mark=str(number),
                halves=halves,
                receives=halves,
            )
            for number, names in enumerate((one, other))
        ]
        plan = lay_out(pattern, *(program.steps for program in programs))
        for order in (plan, any_legal_order(plan, random.Random(seed))):
            if order is not plan:
                programs = [
                    ForwardProgram(p.chunk, leaf(n), GraphSplit, mark=str(n), halves=halves, receives=halves)
                    for n, p in enumerate(programs)
                ]
            run(order, *programs)
            assert all(torch.equal(p.output, wanted) for p, wanted in zip(programs, expected, strict=True))


def test_weights_left_for_later_come_with_backward_weight() -> None:
    module = chain(["SharedBlock", "Block"])
    module(leaf(1)).sum().backward()
    wanted = gradients(module)
    module = chain(["SharedBlock", "Block"], LateExchange())
    split = SPLITS["linear"]
    forward = ForwardProgram(Chunk.of(module), leaf(1), lambda: split(module))
    run(one_after_the_other(forward.steps), forward)
    backward = BackwardProgram(forward, [torch.ones_like(forward.output)], weights=False)
    run(one_after_the_other(backward.steps), backward)
    matrices = [p for p in module.parameters() if p.dim() > 1]
    assert all(p.grad is None for p in matrices)
    backward.backward_weight()
    assert same(gradients(module), wanted)
    assert {id(p) for p in matrices} <= backward.deferred


def test_programs_are_gone_with_their_last_reference() -> None:
    module = chain(["SharedBlock", "HalvedBlock", "CheckpointedBlock"])
    split = SPLITS["linear"]
    gc.collect()
    gc.disable()
    try:
        forward = ForwardProgram(Chunk.of(module), leaf(1), lambda: split(module))
        run(one_after_the_other(forward.steps), forward)
        backward = BackwardProgram(forward, [torch.ones_like(forward.output)])
        run(one_after_the_other(backward.steps), backward)
        dropped = ForwardProgram(Chunk.of(module), leaf(1), lambda: split(module))
        run(one_after_the_other(dropped.steps), dropped)
        halved = ForwardProgram(Chunk.of(module), leaf(1), lambda: split(module))
        run(one_after_the_other(halved.steps), halved)
        left = BackwardProgram(halved, [torch.ones_like(halved.output)], weights=False)
        rows = [weakref.ref(dropped.received[0]), weakref.ref(halved.received[0])]
        run(one_after_the_other(left.steps), left)
        remaining = rows + [weakref.ref(program) for program in (forward, backward, dropped, halved, left)]
        del forward, backward, dropped, halved, left
        assert [ref() for ref in remaining] == [None] * 7
    finally:
        gc.enable()


def test_a_block_called_as_a_module_runs_its_parts_in_order() -> None:
    block = SharedBlock(3)
    x, ctx = leaf(1), Context()
    carry, send = block.before(x, ctx)
    assert torch.equal(block(x), block.after(block.shared(carry, ctx), block.experts(send, ctx), ctx))


# --- in a pipeline ------------------------------------------------------------------------------------------

OVERLAPPING = [
    size
    for size in legal_sizes(most_ranks=4, most_microbatches=8)
    if size[0] in ("dualpipe", "dualpipev", "interleaved-1f1b-overlap")
]


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches"), [*OVERLAPPING[::4], ("zbv", 2, 4), ("zb1p", 2, 4), ("dualpipev", 1, 4)]
)
def test_stages_of_blocks_have_bitwise_the_gradients_of_one_process(
    name: str, num_ranks: int, num_microbatches: int
) -> None:
    case = ordinary_case(name, num_ranks, num_microbatches, make=stage_of_blocks)
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


def test_an_f_and_b_of_blocks_is_issued_in_the_published_order() -> None:
    case = ordinary_case("dualpipev", 1, 2, make=stage_of_blocks)
    pipeline = case.in_process()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    ranges = sorted((e.time_range.start, e.time_range.end, e.name) for e in recorded.events() if e.name)
    start, end = next((start, end) for start, end, name in ranges if name.endswith("OVERLAP_F_B"))
    inside = [
        name for begin, stop, name in ranges if start < begin and stop < end and name.endswith((")",)) and "(" in name
    ]
    shared = Chunk.of(stage_of_blocks(0)).shared
    wanted = lay_out(TRAINING, forward_steps(shared), backward_steps(shared)).names
    assert tuple(name for name in inside if name in wanted) == wanted
