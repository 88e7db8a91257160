"""Small models in double precision, and what goes into them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from counterflow import Placement
from counterflow.moe import PRESETS, ModelConfig, Part, stage

TINY = PRESETS["tiny"]
TWO_LAYERS = replace(TINY, layers=2)
CLOSE = {"rtol": 0.0, "atol": 1e-12}
REPLICAS = 24
"""Slots for the 16 experts of ``tiny`` that divide over 1, 2 and 4 ranks."""


def whole(config: ModelConfig = TWO_LAYERS, **options: Any) -> nn.Sequential:
    """The model in one stage."""
    return stage(config, 0, 1, dtype=torch.float64, **options)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def any_placement(seed: int, num_gpus: int, layers: int = TWO_LAYERS.layers) -> Placement:
    """Every expert somewhere, and some of them again, in any order."""
    drawn = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(layers):
        again = torch.randint(TINY.experts, (REPLICAS - TINY.experts,), generator=drawn)
        held = torch.cat([torch.arange(TINY.experts), again])
        rows.append(held[torch.randperm(REPLICAS, generator=drawn)])
    return Placement(torch.stack(rows).numpy(), TINY.experts, num_gpus)


def packed(sequences: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """The tokens of ``parts``, one behind the other."""
    return torch.cat([sequences[part.request][part.start : part.start + part.count] for part in parts])
