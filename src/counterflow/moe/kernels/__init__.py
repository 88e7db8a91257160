"""Where kernels of our own run: on a GPU, without gradient, if triton is there. Everywhere else torch does the same."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from counterflow.moe.config import ModelConfig

FEW = 2048
"""Up to so many tokens or rows a kernel that compares all with all is quicker than a sort."""


def kernels_run(tensor: Tensor) -> bool:
    """Whether they run on ``tensor`` now."""
    return tensor.is_cuda and not torch.is_grad_enabled() and triton_is_there()


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
