"""What one GPU of the published deployments computes and sends, and the blocks and programs that do it here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.experts import Placement
from counterflow.moe import PRESETS, balance_routing
from counterflow.moe.block import MixtureBlock
from counterflow.moe.cache import Decode, LatentCache, Part, Prefill
from counterflow.moe.model import made_on
from counterflow.runtime.backward_program import BackwardProgram
from counterflow.runtime.chunk import run
from counterflow.runtime.exchange import Arrival, Exchange, Here, Ready, Rows
from counterflow.runtime.forward_program import ForwardProgram
from counterflow.runtime.sequence import Chunk
from counterflow.runtime.weights import LinearSplit
from counterflow.schedule.chunk_plans import DECODE, PREFILL, TRAINING, ChunkPlan, lay_out, one_after_the_other

LAYERS = 4
SCALES = 1 + 1 / 32  # fp8 rows carry a float32 scale for each 128 values
PATTERNS = {"training": TRAINING, "prefill": PREFILL, "decode": DECODE}


@dataclass(frozen=True)
class Deployment:
    """One GPU's share of ``ranks``: a micro-batch has ``tokens``, in sequences of ``length`` (decode: so long already).

    Each token is sent ``wire_copies`` times over the network on average.
    """

    mode: str
    preset: str
    ranks: int
    experts: int
    tokens: int
    length: int
    wire_copies: float

    @property
    def wire_bytes(self) -> tuple[int, int]:
        """Of a dispatch in fp8 with scales, and of a combine in bfloat16."""
        values = self.tokens * self.wire_copies * PRESETS[self.preset].hidden
        return round(values * SCALES), round(values * 2)


# Sources of the sizes: DeepSeek-V3 (arXiv 2412.19437) and what is said of the published profiles. A token goes to at
# most 4 nodes of 8 GPUs: of 8 nodes 3.5 of these are other ones on average, of 4 nodes 3. Decode sends every copy.
DEPLOYMENTS = {
    "training": Deployment("training", "v3-layer", ranks=64, experts=256, tokens=4096, length=4096, wire_copies=3.5),
    "prefill": Deployment("prefill", "v3-layer", ranks=32, experts=288, tokens=8192, length=4096, wire_copies=3),
    "decode": Deployment("decode", "v3-layer", ranks=128, experts=256, tokens=64, length=4096, wire_copies=8),
}
TINY = {
    mode: replace(deployment, preset="tiny", ranks=4, experts=20, tokens=32, length=16)
    for mode, deployment in DEPLOYMENTS.items()
}


class Still:
    """Nothing moves: what was sent is what arrives, in the same memory. For compute alone."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks, self.rank = num_ranks, num_ranks - 1

    def counts(self, rows: Tensor) -> Tensor:
        return rows[-1:].expand_as(rows).contiguous()

    def start(self, source: Tensor, target: Tensor, rows: Rows, ready: Ready) -> Arrival:
        assert len(source) == len(target), "rows are dealt evenly"
        target.set_(source)
        return Here()


def _dealt(deployment: Deployment) -> Placement:
    """Experts dealt to the ranks in turn: a token's go to different ranks, and as many rows come to a rank as go."""
    ranks, local = deployment.ranks, deployment.experts // deployment.ranks
    held = [rank + ranks * slot for rank in range(ranks) for slot in range(local)]
    return Placement([held] * LAYERS, deployment.experts, ranks)


class Share:
    """The blocks of one GPU's share, and its two micro-batches as programs over any exchange."""

    def __init__(self, deployment: Deployment, device: torch.device) -> None:
        self.deployment, self.device = deployment, device
        self.config = replace(PRESETS[deployment.preset], layers=LAYERS, experts=deployment.experts)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float64
        self.still = Still(deployment.ranks)
        with made_on(device, self.dtype):
            blocks = [MixtureBlock(self.config, layer, self.still, _dealt(deployment)) for layer in range(LAYERS)]
        self.model = nn.Sequential(*blocks)
        balance_routing([self.model])
        self._chunk = Chunk.of(self.model)
        self._generator = torch.Generator(device).manual_seed(0)
        trains = deployment.mode == "training"
        shape = (2, 1, deployment.tokens) if trains else (2, deployment.tokens)
        self.inputs = self.random(*shape).unbind()
        for tensor in self.inputs:
            tensor.requires_grad_(trains)
        self.batches = self._batches()

    def random(self, *shape: int) -> Tensor:
        """Rows of activations."""
        whole = (*shape, self.config.hidden)
        return torch.randn(whole, generator=self._generator, device=self.device, dtype=self.dtype)

    def _batches(self) -> list[Any]:
        tokens, length = self.deployment.tokens, self.deployment.length
        match self.deployment.mode:
            case "prefill":
                count = tokens // length
                cache = LatentCache(self.config, 2 * count, length, self.dtype, self.device)
                prompts = [Part(request, 0, length) for request in range(2 * count)]
                return [Prefill(cache, prompts[:count]), Prefill(cache, prompts[count:])]
            case "decode":
                self.cache = LatentCache(self.config, 2 * tokens, length, self.dtype, self.device)
                self.cache.latents.normal_()
                return [self.decoding(first, tokens) for first in (0, tokens)]
        return [None, None]

    def decoding(self, first: int, count: int) -> Decode:
        """The last token of so many requests."""
        return Decode(self.cache, first, torch.full((count,), self.deployment.length - 1, device=self.device))

    @contextmanager
    def over(self, exchange: Exchange) -> Iterator[None]:
        """Rows go by ``exchange``."""
        blocks = self._chunk.blocks
        before = [block.exchange for block in blocks]
        for block in blocks:
            block.exchange = exchange
        try:
            yield
        finally:
            for block, own in zip(blocks, before, strict=True):
                block.exchange = own

    def forward(self, x: Tensor, batch: Any, mark: str, mode: str | None = None) -> ForwardProgram:
        """A forward of ``x``, its steps being those of ``mode``."""
        split = LinearSplit
        model, halves = self.model, (mode or self.deployment.mode) == "decode"
        return ForwardProgram(
            self._chunk, x, lambda: split(model), batch=batch, mark=mark, halves=halves, receives=halves
        )

    def backward(self, *, weights: bool = True) -> BackwardProgram:
        """A backward of the second micro-batch, whose forward has been run for it."""
        forward = self.forward(self.inputs[1], None, "(F)")
        with self.over(self.still):
            run(one_after_the_other(forward.steps), forward)
        return BackwardProgram(forward, [torch.ones_like(forward.output)], weights=weights)

    def pair(self, mode: str | None = None) -> tuple[ForwardProgram | BackwardProgram, ...]:
        """The programs of both micro-batches, for the order of ``mode``, by default the deployment's own."""
        if self.deployment.mode == "training":
            return self.forward(self.inputs[0], None, "(F)"), self.backward()
        return tuple(self.forward(self.inputs[n], self.batches[n], str(n), mode) for n in (0, 1))

    def plan(self, programs: tuple[ForwardProgram | BackwardProgram, ...], mode: str | None = None) -> ChunkPlan:
        """The published order."""
        return lay_out(PATTERNS[mode or self.deployment.mode], *(program.steps for program in programs))

    def forget(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.model.parameters(), *self.inputs):
            tensor.grad = None
