"""What is one placement worth for several kinds of traffic, none of which it was measured on?

    python benchmarks/scenarios.py CODE.npz CHAT.npz ...

Each file holds what one kind of traffic did, an array [windows, layers, experts] of token counts under ``--key``.
Placements are made from the first half of the windows and scored on the second: balancedness, the mean over layers.
``each`` is the traffic of one file at a time, the mean over files; ``mixed`` all of them at once, with equal weight;
``unseen`` the traffic of a file whose own first half was left out, the mean over files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from counterflow import Placement, balance, rebalance_experts
from counterflow.experts import balance_scenarios

SIZES = ((8, 8), (16, 16), (32, 32))  # GPUs, and slots beyond one for each expert

Maker = Callable[[list[np.ndarray], int, int], Placement]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--key", default="loads", help="the array in each file")
    options = parser.parse_args()
    recorded = [np.load(file, allow_pickle=False)[options.key].astype(np.float64) for file in options.files]
    seen = [windows[: len(windows) // 2] for windows in recorded]
    later = [windows[len(windows) // 2 :].sum(axis=0) for windows in recorded]
    experts = later[0].shape[1]
    print("| placement | GPUs | slots | each | mixed | unseen | ms |\n|---|---|---|---|---|---|---|")
    for gpus, extra in SIZES:
        for name, maker in MAKERS.items():
            started = time.perf_counter()
            placement = maker(seen, experts + extra, gpus)
            ms = (time.perf_counter() - started) * 1e3
            each = np.mean([placement.balancedness(load).mean() for load in later])
            mixed = placement.balancedness(mixture(later)).mean()
            unseen = _unseen(maker, seen, later, experts + extra, gpus)
            print(
                f"| {name} | {gpus} | {experts + extra} | {each:.3f} | {mixed:.3f} | {unseen} | {ms:.0f} |", flush=True
            )
        own = [balance(windows.sum(axis=0), experts + extra, gpus) for windows in seen]
        each = np.mean([place.balancedness(load).mean() for place, load in zip(own, later, strict=True)])
        print(f"| balance, another one for each | {gpus} | {experts + extra} | {each:.3f} | - | - | - |", flush=True)


def mixture(loads: list[np.ndarray]) -> np.ndarray:
    """The loads of all, each as a share of its own layer's."""
    return np.sum([load / load.sum(axis=1, keepdims=True) for load in loads], axis=0)


def published(seen: list[np.ndarray], slots: int, gpus: int) -> Placement:
    load = mixture([windows.sum(axis=0) for windows in seen])
    return Placement(rebalance_experts(load, slots, 1, 1, gpus)[0], load.shape[1], gpus)


def ours(seen: list[np.ndarray], slots: int, gpus: int) -> Placement:
    return balance(mixture([windows.sum(axis=0) for windows in seen]), slots, gpus)


def scenarios(seen: list[np.ndarray], slots: int, gpus: int, parts: int = 1) -> Placement:
    recorded = [part.sum(axis=0) for windows in seen for part in np.array_split(windows, parts)]
    return balance_scenarios(recorded, slots, gpus)


MAKERS: dict[str, Maker] = {
    "published, on the mixture": published,
    "balance, on the mixture": ours,
    "scenarios": scenarios,
    "scenarios, each in 4 parts": lambda seen, slots, gpus: scenarios(seen, slots, gpus, parts=4),
}


def _unseen(maker: Maker, seen: list[np.ndarray], later: list[np.ndarray], slots: int, gpus: int) -> str:
    if len(seen) == 1:
        return "-"
    left_out = [
        maker(seen[:index] + seen[index + 1 :], slots, gpus).balancedness(load).mean()
        for index, load in enumerate(later)
    ]
    return f"{np.mean(left_out):.3f}"


if __name__ == "__main__":
    main()
