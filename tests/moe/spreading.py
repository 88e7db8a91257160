"""Models whose experts lie on several ranks, what they have to add up to, and how to start ``ranks/*.py``."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow.moe import MixtureBlock
from counterflow.runtime import launch
from runtime.processes import surroundings


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def gradients(stages: Iterable[nn.Sequential]) -> dict[str, Tensor]:
    """Of every parameter by layer and name, those of routed experts by expert.

    An expert that is not here has zeros, the slots of one that is here several times are added. So the sum over the
    ranks of a model is what one process has that holds all of it.
    """
    found: dict[str, Tensor] = {}
    for item in (item for module in stages for item in module):
        where = f"layer {item.layer}" if isinstance(item, MixtureBlock) else type(item).__name__
        for name, parameter in item.named_parameters():
            grad = parameter.grad
            assert grad is not None, f"{where} {name}"
            found[f"{where} {name}"] = by_expert(item, grad) if name.startswith("routed") else grad
    return found


def by_expert(block: MixtureBlock, of_slots: Tensor) -> Tensor:
    """[slots of this rank, ...] to [experts, ...]."""
    first = block.exchange.rank * len(of_slots)
    whole = of_slots.new_zeros(block.config.experts, *of_slots.shape[1:])
    for expert, (slots, copies) in enumerate(zip(block.dispatch.table, block.dispatch.copies, strict=True)):
        for slot in slots[:copies].tolist():
            if first <= slot < first + len(of_slots):
                whole[expert] += of_slots[slot - first]
    return whole


def summed(found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over ranks."""
    total: dict[str, Tensor] = {}
    for each in found:
        for name, grad in each.items():
            total[name] = total[name] + grad if name in total else grad
    return total


def assert_close(found: Any, expected: Any) -> None:
    """Equal but for the order in which double-precision numbers were added."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def run_ranks(script: str, num_ranks: int, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """What every rank of ``ranks/<script>.py`` left in ``folder``."""
    command = [sys.executable, "-m", f"moe.ranks.{script}", str(folder), *map(str, arguments)]
    with surroundings():
        launch(command, num_ranks, timeout_s=60, logs=folder / "logs")
    return [torch.load(folder / f"rank-{rank}.pt", map_location="cpu") for rank in range(num_ranks)]
