"""Attention of one folded query each over cached latents: in one kernel where there is one, else in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from counterflow.moe.kernels import can_mix


def mixed_latents(folded: Tensor, latents: Tensor, positions: Tensor, width: int, scale: float) -> Tensor:
    """What queries mix out of the first ``width`` features of the latents they see: [n, heads, width].

    Query i of ``folded`` [n, heads, features] sees those of ``latents`` [n, room, features] that stand at
    ``positions[i]`` or before it, int64 [n], and scores them by ``scale`` times their product. In bfloat16 on a GPU,
    without gradient, one kernel adds in float32 and keeps no scores in memory.
    """
    if can_mix(folded, width):
        from counterflow.moe.kernels.decode_attention_kernel import mixed_by_kernel

        return mixed_by_kernel(folded, latents, positions, width, scale)
    return mixed_plainly(folded, latents, positions, width, scale)


def mixed_plainly(folded: Tensor, latents: Tensor, positions: Tensor, width: int, scale: float) -> Tensor:
    """The same, step by step."""
    scores = (folded @ latents.mT) * scale
    ahead = torch.arange(latents.shape[1], device=latents.device) > positions[:, None]
    precise = torch.promote_types(scores.dtype, torch.float32)
    shares = scores.masked_fill(ahead[:, None], float("-inf")).softmax(dim=-1, dtype=precise).to(scores.dtype)
    return shares @ latents[..., :width]
