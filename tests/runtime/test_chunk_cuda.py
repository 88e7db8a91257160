"""The chunk engine and the loopback on a GPU: rows arrive unchanged, and no order of steps changes a bit."""

import random

import pytest
import torch

from counterflow.runtime.backward_program import BackwardProgram
from counterflow.runtime.chunk import run
from counterflow.runtime.exchange import Rows
from counterflow.runtime.forward_program import ForwardProgram
from counterflow.runtime.loopback import LoopbackExchange
from counterflow.runtime.sequence import Chunk
from counterflow.runtime.weights import LinearSplit
from counterflow.schedule.chunk_plans import (
    TRAINING,
    ChunkPlan,
    backward_steps,
    forward_steps,
    lay_out,
    one_after_the_other,
)
from runtime.chunks import any_legal_order, stage_of_blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

MIB = 1 << 20


def ready() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


@pytest.mark.parametrize("ctas", [0, 1, 20])
@pytest.mark.parametrize("abroad", [0, 3 * MIB, 8 * MIB, 21 * MIB])
def test_rows_come_back_as_they_left(ctas: int, abroad: int) -> None:
    exchange = LoopbackExchange(abroad, 0, ctas=ctas, piece_bytes=MIB, num_pieces=3)
    for _ in range(3):
        source = torch.randint(-(2**60), 2**60, (1024, 1024), device="cuda")
        target = torch.zeros_like(source)
        exchange.start(source, target, Rows((1024,), (1024,)), ready()).wait()
        assert torch.equal(target, source)


@pytest.mark.parametrize("ctas", [0, 20])
def test_they_do_so_in_a_cuda_graph_and_before_and_after_it(ctas: int) -> None:
    exchange = LoopbackExchange(3 * MIB, 0, ctas=ctas, piece_bytes=MIB, num_pieces=2)
    source, target = (torch.zeros(512, 1024, dtype=torch.int64, device="cuda") for _ in range(2))

    def go() -> None:
        exchange.start(source, target, Rows((512,), (512,)), ready()).wait()

    def holds() -> bool:
        return torch.equal(source, target)

    go()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        go()
    for number in range(3):
        source.fill_(number + 1)
        graph.replay()
        assert holds()
    source.fill_(9)
    torch.cuda.synchronize()
    go()
    assert holds()


@pytest.mark.parametrize("ctas", [0, 20])
def test_no_order_of_steps_changes_a_bit(ctas: int) -> None:
    exchange = LoopbackExchange(20_000, 40_000, ctas=ctas, piece_bytes=8192, num_pieces=2)
    up, down = stage_of_blocks(0, exchange).cuda(), stage_of_blocks(1, exchange).cuda()
    x, y = (torch.randn(300, 8, dtype=torch.float64, device="cuda").requires_grad_() for _ in range(2))

    def results(plan: ChunkPlan | None, *, serial: bool) -> list[torch.Tensor]:
        down.zero_grad()
        y.grad = None
        earlier = ForwardProgram(Chunk.of(down), y, lambda: LinearSplit(down))
        run(one_after_the_other(earlier.steps), earlier, serial=True)
        programs = (
            ForwardProgram(Chunk.of(up), x, lambda: LinearSplit(up)),
            BackwardProgram(earlier, [torch.ones_like(earlier.output)]),
        )
        run(plan or lay_out(TRAINING, *(p.steps for p in programs)), *programs, serial=serial)
        torch.cuda.synchronize()
        return [programs[0].output.detach(), y.grad, *(p.grad for p in down.parameters())]

    wanted = results(None, serial=True)
    chunk = Chunk.of(up)
    usual = lay_out(TRAINING, forward_steps(chunk.shared), backward_steps(chunk.shared))
    for seed in range(30):
        found = results(any_legal_order(usual, random.Random(seed)), serial=False)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
