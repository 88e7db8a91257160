"""Generation over ranks that share the experts, each with requests of its own: the tokens of one rank alone.

As a script, ``test_generate_ranks.py FOLDER``, it is one of these ranks.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from counterflow.errors import ModelError
from counterflow.moe import PRESETS, stage
from counterflow.moe.cache import LatentCache
from counterflow.moe.inference.generate import generate
from counterflow.moe.inference.prefill import prefill
from counterflow.runtime import ProcessGroupExchange, launch

TINY = replace(PRESETS["tiny"], layers=2)
NEW_TOKENS = 4
CASES = {
    "several requests each": [[3, 9, 4], [1, 5]],
    "one rank has a single request": [[3, 9, 4], [6]],
    "one rank has a single token": [[3, 9, 4], [1]],
}
"""The lengths of each rank's prompts."""


def prefill_into_little(here: nn.Sequential, rank: int) -> None:
    prefill(here, [[1, 2], [3, 4]], LatentCache(TINY, 2, 2 - rank, torch.float64))


REFUSED = {
    "a token that is none": (lambda here, rank: generate(here, [[1], [2 - 9 * rank]], 2), "a prompt is [-7]"),
    "a prompt without a token": (lambda here, rank: generate(here, [[1], [2][rank:]], 2), "a prompt is []"),
    "text": (lambda here, rank: generate(here, [[1], ["two"] if rank else [2]], 2), "a prompt is ['two']"),
    "no prompts": (lambda here, rank: generate(here, [[1], [2]][2 * rank :], 2), "there are no prompts"),
    "no tokens": (lambda here, rank: generate(here, [[1], [2]], 2 - 2 * rank), "new_tokens is 0"),
    "too little room": (prefill_into_little, "does not fit into a cache with room for 2 requests of 1 tokens"),
}
"""What rank 1 alone refuses, and its words."""


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(TINY.vocabulary, (length,), generator=generator).tolist() for length in lengths]


def model(**options: Any) -> nn.Sequential:
    return stage(TINY, 0, 1, dtype=torch.float64, **options)


def test_each_rank_makes_the_tokens_that_it_would_alone(tmp_path: Path) -> None:
    from runtime.processes import surroundings

    with surroundings():
        launch([sys.executable, __file__, str(tmp_path)], 2, timeout_s=60, logs=tmp_path / "logs")
    alone = model()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        for name, lengths in CASES.items():
            assert found[name] == generate(alone, prompts_of(lengths[rank]), NEW_TOKENS).tolist(), name
        assert "the ranks were asked for [1, 2] new tokens" in found["different numbers"]
        for name, (_, whose) in REFUSED.items():
            assert (whose if rank == 1 else "rank 1 of 2 refused its prompts") in found[name], name


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    here = model(exchange=ProcessGroupExchange())
    found: dict[str, Any] = {
        name: generate(here, prompts_of(lengths[rank]), NEW_TOKENS).tolist() for name, lengths in CASES.items()
    }
    try:
        generate(here, [[1], [2]], 1 + rank)
    except ModelError as error:
        found["different numbers"] = str(error)
    for name, (refused, _) in REFUSED.items():
        try:
            refused(here, rank)
        except ModelError as error:
            found[name] = str(error)
    torch.save(found, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
