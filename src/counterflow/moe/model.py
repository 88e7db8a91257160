"""The decoder as a row of modules, whole or cut into stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.errors import ModelError
from counterflow.experts import Placement
from counterflow.moe.block import MixtureBlock
from counterflow.moe.config import ModelConfig
from counterflow.moe.draw import draw
from counterflow.runtime import Exchange, OverlapBlock


def stage(
    config: ModelConfig,
    index: int,
    num_stages: int,
    *,
    exchange: Exchange | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Stage ``index`` of the decoder: blocks, in front of the first the embedding, behind the last norm and head.

    Tokens, int64 [sequences, time], come into the first stage, logits [sequences, time, vocabulary] leave the last.
    Layers are divided as evenly as they can be. Weights follow from ``seed`` and where they are in the model, so all
    that build a stage build the same one, whatever the ``placement`` of its experts on the ranks of ``exchange``.

    Raises:
        ModelError: there are more stages than layers, no such stage, or the placement is for another model.

    Example:
        >>> import torch
        >>> from counterflow.moe import PRESETS, stage
        >>> model = stage(PRESETS["tiny"], 0, 1)
        >>> model(torch.zeros(2, 3, dtype=torch.int64)).shape
        torch.Size([2, 3, 256])
    """
    if not 0 <= index < num_stages <= config.layers:
        raise ModelError(
            f"stage {index} of {num_stages} was asked for, and the model has {config.layers} layers; give at most a "
            "stage for each, numbered from 0"
        )
    first, end = (number * config.layers // num_stages for number in (index, index + 1))
    with made_on(torch.device(device), dtype):
        items: list[nn.Module] = []
        if index == 0:
            embedding = nn.Embedding(config.vocabulary, config.hidden)
            draw(embedding.weight, seed, "embedding")
            items.append(embedding)
        items += [MixtureBlock(config, layer, exchange, placement, seed) for layer in range(first, end)]
        if index == num_stages - 1:
            head = nn.Linear(config.hidden, config.vocabulary, bias=False)
            draw(head.weight, seed, "head")
            items += [nn.RMSNorm(config.hidden, config.norm_eps), head]
    return nn.Sequential(*items)


def stages(config: ModelConfig, num_stages: int, **options: Any) -> list[nn.Sequential]:
    """All stages of the decoder; ``options`` are those of ``stage``, and so is what it raises."""
    return [stage(config, index, num_stages, **options) for index in range(num_stages)]


def run(model: nn.Sequential, x: Tensor, batch: Any = None) -> Tensor:
    """Through ``model``, its blocks being told of ``batch``."""
    for item in model:
        x = item(x, batch) if isinstance(item, OverlapBlock) else item(x)
    return x


def mixture_blocks(modules: Iterable[nn.Module]) -> list[MixtureBlock]:
    """The blocks in ``modules``, by layer."""
    found = [block for module in modules for block in module.modules() if isinstance(block, MixtureBlock)]
    return sorted(found, key=lambda block: block.layer)


def take_counts(modules: Iterable[nn.Module]) -> Tensor:
    """The tokens that the routers have sent to each expert since they were last asked: int64 [layers, experts].

    This is what a ``LoadTracker`` adds. Copies of a layer, DualPipe's twins, have a row each.
    """
    counts = [block.router.counts for block in mixture_blocks(modules)]
    taken = torch.stack(counts)
    for count in counts:
        count.zero_()
    return taken


def balance_routing(modules: Iterable[nn.Module], balanced: bool = True) -> None:
    """Send equally many tokens to every expert from now on, as one profiles, or no longer."""
    for block in mixture_blocks(modules):
        block.router.balanced = balanced


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is made in here is made there, so that no second copy is needed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
