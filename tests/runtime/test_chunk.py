"""The chunk engine: whatever legal order its steps come in, results and gradients are those of plain autograd."""

import gc
import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from counterflow.errors import PipelineError
from counterflow.runtime import Context, OverlapBlock, ProcessGroupExchange, Rows
from counterflow.runtime.backward_program import BackwardProgram
from counterflow.runtime.block_stage import BlockStage
from counterflow.runtime.chunk import run
from counterflow.runtime.forward_program import ForwardProgram
from counterflow.runtime.graph_split import GraphSplit
from counterflow.runtime.pipeline import SPLITS
from counterflow.runtime.sequence import Chunk
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


# --- what a stage does not keep, and what it refuses --------------------------------------------------------


def test_without_gradients_rows_are_gone_when_they_have_been_read() -> None:
    module = chain(["Block", "Block", "Block"])
    with torch.no_grad():
        program = ForwardProgram(Chunk.of(module), leaf(1), GraphSplit)
        run(one_after_the_other(program.steps), program)
    assert not program.received
    assert not program.returned


def test_an_output_is_not_kept_once_it_was_passed_on() -> None:
    module = chain(["Block"])
    stage = BlockStage(0, module, Chunk.of(module), SPLITS["linear"])
    output = stage.forward(0, leaf(1), halved=True)
    kept = weakref.ref(output)
    del output
    assert kept() is None


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


class Join(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


def test_modules_between_blocks_are_called_as_in_a_sequential() -> None:
    blocks = [KINDS["Block"](seed) for seed in (1, 2)]
    module = nn.Sequential(blocks[0], Pair(), Join(), blocks[1])
    program = ForwardProgram(Chunk.of(module), leaf(1), lambda: SPLITS["linear"](module))
    run(one_after_the_other(program.steps), program)
    assert torch.equal(program.output, module(leaf(1)))


class Attending(nn.Module):
    """A linear with a computed second operand, whose gradient the input's depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, FEATURES).double()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return (nn.functional.linear(self.a(flat), flat).softmax(-1) @ flat).view_as(x)


@pytest.mark.parametrize("name", ["zb1p", "dualpipev"])
def test_a_linear_with_a_computed_operand_has_its_gradient_in_time(name: str) -> None:
    def make(stage: int) -> nn.Module:
        torch.manual_seed(stage)
        return nn.Sequential(nn.Linear(FEATURES, FEATURES).double(), Attending())

    case = ordinary_case(name, 2, 4, make=make)
    pipeline = case.in_process()
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    assert_bitwise(gradients_by_rank(pipeline), expected_gradients(case))


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_gradients_of_the_callers_own_inputs_add_up(split: str) -> None:
    case = ordinary_case("zb1p", 2, 2, weight_split=split)
    pipeline = case.in_process()
    inputs = [x.clone().requires_grad_() for x in case.steps[0].inputs]
    pipeline.step(inputs, case.steps[0].targets)
    once = [x.grad.clone() for x in inputs]
    pipeline.step(inputs, case.steps[0].targets)
    assert all(torch.equal(x.grad, 2 * first) for x, first in zip(inputs, once, strict=True))


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("as planned")


def test_after_an_error_no_rows_are_under_way() -> None:
    exchange = LateExchange()
    module = nn.Sequential(KINDS["Block"](1, exchange), Failing(), KINDS["Block"](2, exchange))
    program = ForwardProgram(Chunk.of(module), leaf(1), lambda: SPLITS["linear"](module))
    with pytest.raises(RuntimeError, match="as planned") as caught:
        run(one_after_the_other(program.steps), program)
    assert caught.value.__notes__ == ["counterflow: at attn(F) of layer 1"]
    assert program._arrival is None
    assert program._parcel is None


def broken(**parts: Any) -> OverlapBlock:
    """A block with these parts in the place of its own."""
    block = KINDS["Block"](1)
    for name, part in parts.items():
        object.__setattr__(block, name, part)
    return block


REFUSED = {
    "one tensor": ({"before": lambda x, ctx: x}, r"Block.before gave a Tensor; let it give a tuple of two"),
    "one number": (
        {"before": lambda x, ctx: (x, x.sum())},
        r"Block.before gave \(Tensor, Tensor\); let it give a tuple of two: .* at least one dimension",
    ),
    "fewer results": (
        {"experts": lambda r, ctx: r[:1]},
        r"Block.experts made \[1, 8\] of 10 rows; let it give a result",
    ),
    "no tensor": (
        {"experts": lambda r, ctx: (r, r)},
        r"Block.experts made a tuple of 10 rows; let it give a result for",
    ),
}


@pytest.mark.parametrize(("parts", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("engine", [False, True])
def test_a_part_that_gives_something_else_is_refused(parts: dict[str, Any], said: str, engine: bool) -> None:
    block = broken(**parts)
    program = ForwardProgram(Chunk.of(block), leaf(1), lambda: SPLITS["linear"](block))

    def call() -> None:
        if engine:
            run(one_after_the_other(program.steps), program)
        else:
            block(leaf(1))

    with pytest.raises(PipelineError, match=said):
        call()


class Noting(KINDS["Block"]):
    """Leaves its router's weights where its last part finds them: in its notes, or on itself."""

    where = "notes"

    def before(self, x: Tensor, ctx: Context) -> Any:
        carry, rows = super().before(x, ctx)
        (ctx.notes if self.where == "notes" else self).kept = carry.pop("weights")
        return carry, rows

    def after(self, carry: Any, returned: Tensor, ctx: Context) -> Tensor:
        kept = ctx.notes.kept if self.where == "notes" else self.kept
        return super().after(carry | {"weights": kept}, returned, ctx)


@pytest.mark.parametrize("split", sorted(SPLITS))
@pytest.mark.parametrize("where", ["notes", "module"])
def test_a_gradient_that_would_pass_by_the_carry_is_never_lost_in_silence(split: str, where: str) -> None:
    block = Noting(1)
    block.where = where
    block(leaf(1)).sum().backward()  # in plain autograd it flows

    def train() -> None:
        forward = ForwardProgram(Chunk.of(block), leaf(1), lambda: SPLITS[split](block))
        run(one_after_the_other(forward.steps), forward)
        backward = BackwardProgram(forward, [torch.ones_like(forward.output)])
        run(one_after_the_other(backward.steps), backward)

    said = {
        "notes": r"Noting left a tensor with gradient in ctx.notes.kept; gradients flow .* put it into carry",
        "module": r"follows the last rows reads, with gradient, what another part left|through the graph a second time",
    }
    with pytest.raises(RuntimeError, match=said[where]):
        train()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (((10,), (10,)), "set ctx.rows to a tuple; give Rows"),
        (Rows((9,), (10,)), "sends 10 rows to 1 ranks; give one number for each rank"),
        (Rows((10,), (-1,)), "give one number for each rank"),
        (Rows((10,), (9,)), "set 10 rows from this rank to itself, and 9 that come from it; let those that come be"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(rows: Any, said: str) -> None:
    class Saying(KINDS["Block"]):
        def before(self, x: Tensor, ctx: Context) -> Any:
            ctx.rows = rows
            return super().before(x, ctx)

    with pytest.raises(PipelineError, match=said):
        Saying(1)(leaf(1))


def test_counts_without_a_row_for_each_rank_blame_nobody_else() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for counts in (torch.zeros(3, 2), torch.tensor(1)):
            with pytest.raises(PipelineError, match=r"counts got \[.*\] for 1 ranks; give it \[1, sorts of rows\]"):
                ProcessGroupExchange().counts(counts)
    finally:
        dist.destroy_process_group()


def test_what_the_engine_would_pass_by_is_refused() -> None:
    class Twice(KINDS["Block"]):
        def forward(self, x: Tensor, batch: Any = None) -> Tensor:
            return 2 * super().forward(x, batch)

    with pytest.raises(PipelineError, match="Twice has a forward of its own, which is not called where its parts are"):
        Chunk.of(nn.Sequential(Twice(1)))
    for module in (KINDS["Block"](1), nn.Sequential(KINDS["Block"](1))):
        module.forward = torch.tanh
        with pytest.raises(PipelineError, match="has a forward of its own, which is not called where its parts are"):
            Chunk.of(module)
    plain = nn.Sequential(nn.Tanh())
    plain.register_forward_hook(lambda *args: None)
    assert Chunk.of(plain) is None
    hooked = nn.Sequential(KINDS["Block"](1))
    hooked.register_forward_hook(lambda *args: None)
    with pytest.raises(PipelineError, match="Sequential has hooks, which are not called where its parts are"):
        Chunk.of(hooked)


class Row(nn.Module):
    """Blocks in a module of their own, as models often have them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KINDS["Block"](seed) for seed in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("beside", [[], ["Block"]])
def test_blocks_that_the_engine_does_not_see_are_warned_of(beside: list[str]) -> None:
    with pytest.warns(UserWarning, match="Row is no nn.Sequential, so nothing hides the transfers of the blocks in it"):
        chunk = Chunk.of(nn.Sequential(Row(), *(KINDS[name](3) for name in beside)))
    assert (chunk is None) == (not beside)
