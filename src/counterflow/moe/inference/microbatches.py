"""A whole decoder, one or two micro-batches of which go through it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.errors import ModelError
from counterflow.moe.block import MixtureBlock
from counterflow.moe.config import ModelConfig
from counterflow.runtime import Exchange
from counterflow.runtime.chunk import run
from counterflow.runtime.forward_program import ForwardProgram
from counterflow.runtime.sequence import Chunk
from counterflow.runtime.weights import Split
from counterflow.schedule.chunk_plans import DECODE, ChunkPlan, Steps, lay_out

Microbatch = tuple[Chunk, Tensor, Any]
"""What it goes through, what goes in, and what the blocks are told of it."""

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True)
class Decoder:
    """A model with all its layers, from tokens to logits."""

    chunk: Chunk
    config: ModelConfig
    exchange: Exchange
    head: Tensor

    @classmethod
    def of(cls, model: nn.Sequential) -> Decoder:
        """That in ``model``.

        Raises:
            ModelError: it is one stage of several, or has other blocks.
        """
        chunk = Chunk.of(model)
        blocks = [block for block in chunk.blocks if isinstance(block, MixtureBlock)] if chunk else []
        if chunk is None or not blocks or len(chunk.blocks) != blocks[0].config.layers or not chunk.behind:
            raise ModelError(
                f"the model has {len(blocks)} blocks of a decoder and is not a whole one; build it as the only stage: "
                "stage(config, 0, 1)"
            )
        return cls(chunk, blocks[0].config, blocks[0].exchange, next(chunk.behind[-1].parameters()))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.head.dtype

    def row_of(self, prompt: Sequence[int] | Tensor) -> Tensor:
        """``prompt`` as int64 [tokens], on the CPU.

        Raises:
            ModelError: it is no row of the model's tokens.
        """
        try:
            row = torch.as_tensor(prompt).cpu()
        except (TypeError, ValueError, RuntimeError):  # all of which torch raises for what is no row of numbers
            raise self._no_prompt(prompt) from None
        legal = row.dim() == 1 and len(row) > 0 and row.dtype in _WHOLE
        if not legal or not 0 <= int(row.min()) <= int(row.max()) < self.config.vocabulary:
            raise self._no_prompt(row.tolist())
        return row.long()

    def _no_prompt(self, given: object) -> ModelError:
        return ModelError(
            f"a prompt is {given!r}; give a row of at least one token, whole numbers from 0 to "
            f"{self.config.vocabulary - 1}"
        )

    def outputs(self, pattern: str, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """What comes out of one or two of them, without gradient, their steps being issued by ``pattern``."""
        halves = pattern == DECODE
        programs = [
            ForwardProgram(chunk, x, _no_split, batch=batch, mark=str(number), halves=halves, receives=halves)
            for number, (chunk, x, batch) in enumerate(microbatches)
        ]
        run(_plan(pattern, *(program.steps for program in programs)), *programs)
        return [program.output for program in programs]

    def all_say(self, numbers: Sequence[int], refusal: ModelError | None) -> list[list[int]]:
        """The ``numbers`` of every rank among which the experts are divided; all of them have to ask.

        Raises:
            ModelError: the ``refusal`` of what this rank was given, or that another rank has one: so none waits for it.
        """
        own = torch.tensor([refusal is not None, *numbers], dtype=torch.int64, device=self.device)
        told: list[list[int]] = self.exchange.counts(own.repeat(self.exchange.num_ranks, 1)).tolist()
        if refusal is not None:
            raise refusal
        refused = [rank for rank, (no, *_) in enumerate(told) if no]
        if refused:
            raise ModelError(
                f"rank {refused[0]} of {len(told)} refused its prompts, so no rank computes; see its error"
            )
        return [rest for _, *rest in told]


@lru_cache(maxsize=8)
def _plan(pattern: str, *programs: Steps) -> ChunkPlan:
    return lay_out(pattern, *programs)


def _no_split() -> Split:
    raise AssertionError("without gradients nothing is recorded")
