"""Blocks for tests: a router that sends every row to some of the ranks' experts, and exchanges that play tricks."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterflow.runtime import Context, Exchange, OverlapBlock, Rows
from counterflow.runtime.blocks import Carry
from counterflow.runtime.exchange import Arrival
from counterflow.schedule.chunk_plans import ChunkPlan

FEATURES = 8
COPIES = 2
"""Each row goes to two experts."""


def _matrix(generator: torch.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5)


class Block(OverlapBlock):
    """A little of everything: a residual, a router with gradient, rows out of order, a bias, a norm."""

    def __init__(self, seed: int, exchange: Exchange | None = None) -> None:
        super().__init__(exchange)
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(FEATURES).double()
        self.mix = _matrix(generator, FEATURES, FEATURES)
        self.bias = nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))
        self.router = _matrix(generator, COPIES, FEATURES)
        self.up = _matrix(generator, 2 * FEATURES, FEATURES)
        self.down = _matrix(generator, FEATURES, 2 * FEATURES)

    def before(self, x: Tensor, ctx: Context) -> tuple[Carry, Tensor]:
        ctx.notes.shape = x.shape
        x = x.reshape(-1, FEATURES)
        x = x + F.linear(F.gelu(self.norm(x)), self.mix, self.bias)
        weights = torch.sigmoid(F.linear(x, self.router))
        ctx.notes.order = torch.randperm(COPIES * len(x), generator=torch.Generator().manual_seed(len(x)))
        return {"x": x, "weights": weights, "rows": len(x)}, self.norm(x).repeat(COPIES, 1)[ctx.notes.order]

    def experts(self, received: Tensor, ctx: Context) -> Tensor:
        return F.linear(F.silu(F.linear(received, self.up)), self.down)

    def after(self, carry: Carry, returned: Tensor, ctx: Context) -> Tensor:
        back = returned[torch.argsort(ctx.notes.order)].view(COPIES, carry["rows"], FEATURES)
        return (carry["x"] + (back * carry["weights"].t().unsqueeze(-1)).sum(0)).view(ctx.notes.shape)


class SharedBlock(Block):
    """With work that needs no rows."""

    def __init__(self, seed: int, exchange: Exchange | None = None) -> None:
        super().__init__(seed, exchange)
        self.always = _matrix(torch.Generator().manual_seed(seed + 1), FEATURES, FEATURES)

    def shared(self, carry: Carry, ctx: Context) -> Carry:
        return carry | {"x": carry["x"] + F.linear(torch.tanh(carry["x"]), self.always)}


class HalvedBlock(SharedBlock):
    """Its first part comes in two."""

    before = OverlapBlock.before

    def project(self, x: Tensor, ctx: Context) -> Carry:
        ctx.notes.shape = x.shape
        x = x.reshape(-1, FEATURES)
        return x, F.linear(F.gelu(self.norm(x)), self.mix, self.bias)

    def attend(self, projected: Carry, ctx: Context) -> tuple[Carry, Tensor]:
        x, mixed = projected
        x = x + mixed
        weights = torch.sigmoid(F.linear(x, self.router))
        ctx.notes.order = torch.randperm(COPIES * len(x), generator=torch.Generator().manual_seed(len(x)))
        return {"x": x, "weights": weights, "rows": len(x)}, self.norm(x).repeat(COPIES, 1)[ctx.notes.order]


class CheckpointedBlock(Block):
    """Its experts are computed again in the backward."""

    def experts(self, received: Tensor, ctx: Context) -> Tensor:
        again: Tensor = checkpoint(super().experts, received, ctx, use_reentrant=False)
        return again


class FrozenBlock(Block):
    """Only its bias learns."""

    def __init__(self, seed: int, exchange: Exchange | None = None) -> None:
        super().__init__(seed, exchange)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter is self.bias)


class OddBlock(Block):
    """What nobody forbids: rows that lie crosswise, results of another width, None and numbers deep in what stays."""

    def before(self, x: Tensor, ctx: Context) -> tuple[Carry, Tensor]:
        carry, rows = super().before(x, ctx)
        return [None, ({"carry": carry, "shift": 1.5}, torch.arange(len(rows)))], rows.t().contiguous().t()

    def experts(self, received: Tensor, ctx: Context) -> Tensor:
        return super().experts(received, ctx)[:, ::2]

    def after(self, carry: Carry, returned: Tensor, ctx: Context) -> Tensor:
        nothing, (kept, numbers) = carry
        assert nothing is None
        wide = torch.cat([returned, returned + kept["shift"]], dim=1)[numbers]
        return super().after(kept["carry"], wide, ctx)


_KINDS = (Block, SharedBlock, HalvedBlock, CheckpointedBlock, FrozenBlock, OddBlock)
KINDS = {kind.__name__: kind for kind in _KINDS}


def stage_of_blocks(stage: int, exchange: Exchange | None = None) -> nn.Sequential:
    """Two blocks with something plain before, between and behind; equal for equal numbers."""
    torch.manual_seed(stage)
    plain = [nn.Linear(FEATURES, FEATURES).double(), nn.Tanh(), nn.LayerNorm(FEATURES).double()]
    first, second = SharedBlock(10 * stage, exchange), Block(10 * stage + 5, exchange)
    return nn.Sequential(plain[0], first, plain[1], nn.Sequential(second, plain[2]))


# --- orders ---------------------------------------------------------------------------------------------------


def any_legal_order(plan: ChunkPlan, rng: random.Random) -> ChunkPlan:
    """Every step at a random place behind those that it needs."""
    open_: list[tuple[int, int]] = list(plan.order)
    issued: list[tuple[int, int]] = []
    while open_:
        free = [(p, s) for p, s in open_ if all((p, need) in issued for need in plan.programs[p][s].needs)]
        issued.append(rng.choice(free))
        open_.remove(issued[-1])
    return ChunkPlan(plan.programs, tuple(issued))


# --- exchanges ----------------------------------------------------------------------------------------------


class LateExchange:
    """Rows arrive no sooner than they are waited for; until then their room holds NaN, and afterwards the source does.

    So whoever reads too early, or keeps relying on what was sent, computes NaN.
    """

    num_ranks, rank = 1, 0

    def __init__(self) -> None:
        self.under_way = 0

    def counts(self, rows: Tensor) -> Tensor:
        return rows

    def start(self, source: Tensor, target: Tensor, rows: Rows, ready: object) -> Arrival:
        self.under_way += 1
        # The graph may have saved the source (an activation that was sent as it is), so the rows leave in a copy.
        leaving = source.clone()
        target.fill_(torch.nan)
        return _Late(self, leaving, target)


class _Late:
    def __init__(self, exchange: LateExchange, leaving: Tensor, target: Tensor) -> None:
        self.exchange, self.leaving, self.target = exchange, leaving, target

    def wait(self) -> None:
        self.exchange.under_way -= 1
        self.target.copy_(self.leaving)
