"""When kernels of our own run: on a GPU, most without gradient only, if triton is there. Else torch does the same.

The kernels are in the other files here, which cannot be imported without triton: they are, late, where one runs.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from counterflow.moe.config import ModelConfig

FEW = 2048
"""Up to so many tokens or rows a kernel that compares all with all is quicker than a sort."""

FEW_OF_A_GROUP = 512
"""Up to so many rows a group our grouped product is quicker than torch's, whose tiles are for more of them."""

_SMALLEST = 16
"""Of the sides of a tile that tensor cores multiply."""


def kernels_run(tensor: Tensor) -> bool:
    """Whether they run on ``tensor`` now."""
    return tensor.is_cuda and not torch.is_grad_enabled() and triton_is_there()


def kernels_run_in_bfloat16(tensor: Tensor) -> bool:
    """Whether those run on ``tensor`` that are for bfloat16 alone."""
    return tensor.dtype == torch.bfloat16 and kernels_run(tensor)


def can_turn(x: Tensor, features: int) -> bool:
    """Whether one kernel turns the last ``features`` of the rows of ``x``, and the gradient back: in bfloat16, with
    parts of a row that are powers of two."""
    straight = x.shape[-1] - features
    fits = is_power_of_two(features) and (straight == 0 or is_power_of_two(straight))
    return fits and x.is_cuda and x.dtype == torch.bfloat16 and triton_is_there()


def can_keep(x: Tensor, config: ModelConfig) -> bool:
    """Whether one kernel norms and turns the latents of ``x``, and puts them into a cache."""
    return is_power_of_two(config.latent) and is_power_of_two(config.rope) and kernels_run_in_bfloat16(x)


def can_mix(folded: Tensor, width: int) -> bool:
    """Whether one kernel attends with ``folded`` queries, and mixes the first ``width`` features of what they see: in
    bfloat16, with features that come in powers of two, on a Hopper or newer."""
    sides = width, folded.shape[2] - width
    fits = all(side >= _SMALLEST and is_power_of_two(side) for side in sides)
    return fits and kernels_run_in_bfloat16(folded) and copies_tiles(folded.device)


def multiplying_pays(rows: Tensor, *weights: Tensor) -> bool:
    """Whether one kernel multiplies ``rows`` by the ``weights`` [groups, out, in] of each group."""
    if not kernels_run_in_bfloat16(rows) or not 0 < len(rows) <= FEW_OF_A_GROUP * len(weights[0]):
        return False
    return copies_tiles(rows.device) and all(side % 128 == 0 for weight in weights for side in weight.shape[1:])


def choosing_pays(logits: Tensor, config: ModelConfig) -> bool:
    """Whether one kernel chooses the experts for ``logits`` [tokens, experts]."""
    fits = is_power_of_two(config.experts) and is_power_of_two(config.groups) and logits.dtype != torch.float64
    return fits and len(logits) <= FEW and kernels_run(logits)


def sorting_pays(numbers: Tensor) -> bool:
    """Whether one kernel that compares all with all sorts ``numbers``; there have to be any."""
    return 0 < numbers.numel() <= FEW and kernels_run(numbers)


def arriving_pays(counts: Tensor, rows: int) -> bool:
    """Whether one kernel that compares ``rows`` rows with all ``counts`` sorts the rows; there have to be any."""
    return 0 < rows <= FEW and 4 * counts.numel() <= FEW and kernels_run(counts)


def is_power_of_two(number: int) -> bool:
    """As the sides of a kernel's tiles have to be."""
    return number > 0 and number & (number - 1) == 0


@cache
def copies_tiles(device: torch.device) -> bool:
    """Whether multiprocessors of this GPU have an engine that copies tiles."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def triton_is_there() -> bool:
    """Whether it is installed; torch brings it along where there can be a GPU."""
    return find_spec("triton") is not None
