"""What the blocks have to know of a micro-batch of prompts or of one that is decoded, and the latents they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.errors import ModelError
from counterflow.moe.config import ModelConfig


class LatentCache:
    """Room for the latents of ``requests`` requests of up to ``room`` tokens each, in every layer.

    ``latents`` is [layers, requests, room, latent + rope].
    """

    def __init__(
        self, config: ModelConfig, requests: int, room: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        # Zeros, for what nobody looks at yet is multiplied by zero, and must not be NaN.
        self.latents = torch.zeros(config.layers, requests, room, config.latent_width, dtype=dtype, device=device)


@dataclass(frozen=True)
class Part:
    """``count`` tokens of a request from position ``start`` on; those before are in the cache, or come first."""

    request: int
    start: int
    count: int


class Prefill:
    """A micro-batch of ``parts``, whose tokens follow each other in ``x`` [tokens, hidden].

    A part sees what the cache has of its request before it, so a prompt can come in several parts: in each layer the
    earlier one has to be stored before the later one attends.

    Raises:
        ModelError: there is no part, or the cache has no such request or too little room for it.
    """

    def __init__(self, cache: LatentCache, parts: Sequence[Part]) -> None:
        _, requests, room, _ = cache.latents.shape
        if not parts:
            raise ModelError("a micro-batch of prompts has no part; give at least one")
        for part in parts:
            fits = 0 <= part.request < requests and part.start >= 0 and part.count >= 1
            if not fits or part.start + part.count > room:
                raise ModelError(
                    f"{part} does not fit into a cache with room for {requests} requests of {room} tokens; make a "
                    "larger one"
                )
        self.cache, self.parts = cache, tuple(parts)
        spans = [torch.arange(part.start, part.start + part.count) for part in parts]
        self.positions = torch.cat(spans).to(cache.latents.device)

    def store(self, layer: int, latent: Tensor) -> None:
        """Keep the latents [tokens, latent + rope] of ``layer``."""
        for part, rows in self.split(latent):
            self.cache.latents[layer, part.request, part.start : part.start + part.count] = rows

    def seen(self, layer: int, part: Part) -> Tensor:
        """The latents [start + count, latent + rope] that the last token of ``part`` sees."""
        return self.cache.latents[layer, part.request, : part.start + part.count]

    def split(self, rows: Tensor) -> list[tuple[Part, Tensor]]:
        """The rows of each part."""
        return list(zip(self.parts, torch.split(rows, [part.count for part in self.parts]), strict=True))


class Decode:
    """A micro-batch of one token each of the requests ``first``, ``first + 1``, … at ``positions``, int64 [requests].

    Its sizes do not change from token to token, and nothing in it waits for a GPU.

    Raises:
        ModelError: the cache has no such requests.
    """

    def __init__(self, cache: LatentCache, first: int, positions: Tensor) -> None:
        requests = cache.latents.shape[1]
        if first < 0 or len(positions) < 1 or first + len(positions) > requests:
            raise ModelError(
                f"{len(positions)} requests from number {first} on are not in a cache of {requests}; give some that are"
            )
        self.cache, self.positions = cache, positions
        self._requests = slice(first, first + len(positions))

    def seen(self, layer: int) -> Tensor:
        """All that is kept of these requests: [requests, room, latent + rope]."""
        return self.cache.latents[layer, self._requests]
