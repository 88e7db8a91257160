"""One rank of a model whose experts are spread over all: ``spread.py FOLDER DEVICE``.

What it found goes to ``rank-r.pt``.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow import plan_migration
from counterflow.moe import balance_routing, mixture_blocks
from counterflow.runtime import Migration, ProcessGroupExchange
from moe.models import any_placement, tokens, whole
from moe.spreading import gradients, next_token_loss
from runtime.processes import init_process_group


def data(rank: int) -> Tensor:
    """Ranks have different numbers of tokens, one has none."""
    return tokens(rank, 6, seed=rank)


def trained(device: str, **options: Any) -> dict[str, Any]:
    """Outputs and gradients of this rank's part."""
    here = whole(exchange=ProcessGroupExchange(), device=device, **options)
    x = data(dist.get_rank()).to(device)
    logits = here(x)
    (next_token_loss(logits, x) if len(x) else logits.sum()).backward()
    return {"logits": logits.detach(), "gradients": gradients([here]), "counts": _counts(here)}


def balanced(device: str) -> dict[str, Any]:
    """All ranks have equally many tokens, and no sizes are told."""
    exchange = ProcessGroupExchange()
    here = whole(exchange=exchange, placement=any_placement(5, exchange.num_ranks), device=device)
    balance_routing([here])
    told = []
    exchange.counts = told.append
    x = tokens(2, 8, seed=dist.get_rank()).to(device)
    return {"logits": here(x).detach(), "counts": _counts(here), "told": len(told)}


@torch.no_grad()
def migrated(device: str) -> dict[str, Any]:
    """The model's answers while its experts move, and how many steps that took."""
    exchange = ProcessGroupExchange()
    old, new = any_placement(1, exchange.num_ranks), any_placement(2, exchange.num_ranks)
    here = whole(exchange=exchange, placement=old, device=device)
    blocks = {block.layer: block for block in mixture_blocks([here])}
    slots = {layer: block.routed_experts.slots() for layer, block in blocks.items()}
    expert_bytes = sum(tensor.nbytes for tensor in slots[0][0])
    migration = Migration(plan_migration(old, new), slots, extra_bytes=2 * expert_bytes)
    x = data(dist.get_rank()).to(device)
    answers = [here(x)]
    while not migration.done:
        migration.advance()
        for layer, block in blocks.items():
            block.dispatch.place(migration.placement, layer)
        answers.append(here(x))
    return {"answers": answers, "moves": int(migration.plan.moves.sum())}


def _counts(here: Any) -> Tensor:
    return torch.stack([block.router.counts for block in mixture_blocks([here])])


def main(folder: str, device: str) -> None:
    torch.set_num_threads(1)
    init_process_group(device)
    found = {
        "evenly": trained(device),
        "replicated": trained(device, placement=any_placement(3, dist.get_world_size())),
        "balanced": balanced(device),
        "migrated": migrated(device),
    }
    torch.save(found, Path(folder) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
