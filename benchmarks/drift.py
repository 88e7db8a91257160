"""How many slots move when the loads drift, and how even are the GPUs after it?

    python benchmarks/drift.py [--seeds 3]

The logarithm of each load is an autoregressive process of standard deviation 1: sqrt(1 - sigma^2) times the last one,
and a normal of sigma. After each of six such steps the experts are placed anew for the loads of that step. Prints the
share of slots that newly receive an expert, of all layers and steps, for the published algorithm as it stands, for its
placement laid beside the one before (``plan_migration``), and for ``balance`` with ``current``; then their mean
balancedness, in how many layers ours is below the published, and our time for one call.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from counterflow import Placement, balance, plan_migration, rebalance_experts

SIZES = (  # layers, experts, replicas, GPUs, nodes, groups, and the shares aimed at
    ("58 x 256 -> 288, 32 GPUs", (58, 256, 288, 32, 1, 1), (0.12, 0.20, 0.35)),
    ("same, 8 groups on 4 nodes", (58, 256, 288, 32, 4, 8), (None, None, None)),
    ("94 x 512 -> 640, 128 GPUs", (94, 512, 640, 128, 1, 1), (0.13, 0.25, 0.50)),
)
SIGMAS = (0.05, 0.2, 0.5)
STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    print(
        "| | sigma | moved, published | laid beside | ours | aim | balancedness, published | ours | layers below | ms |"
    )
    print("|" + "---|" * 10)
    for name, (layers, experts, *sizes), aims in SIZES:
        for sigma, aim in zip(SIGMAS, aims, strict=True):
            rows = np.concatenate([_drift(seed, sigma, (layers, experts), sizes) for seed in range(1, seeds + 1)])
            as_it_stands, beside, ours, theirs_even, ours_even, below = rows[:, :6].mean(axis=0)
            print(
                f"| {name} | {sigma:g} | {as_it_stands:.3f} | {beside:.3f} | {ours:.3f} | {aim or '-'} "
                f"| {theirs_even:.4f} | {ours_even:.4f} | {below * layers:.2f} | {np.median(rows[:, 6]):.0f} |",
                flush=True,
            )


def _drift(seed: int, sigma: float, shape: tuple[int, int], sizes: list[int]) -> np.ndarray:
    """A row for each step: three shares moved, two balancednesses, the share of layers below, and our ms."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(0, 1, shape)
    theirs, ours = _published(np.exp(logs), sizes), balance(np.exp(logs), *sizes)
    beside, rows = theirs, []
    for _ in range(STEPS):
        logs = np.sqrt(1 - sigma**2) * logs + sigma * rng.normal(0, 1, shape)
        load = np.exp(logs)
        before, theirs = theirs, _published(load, sizes)
        plan = plan_migration(beside, theirs)
        beside = plan.new
        started = time.perf_counter()
        after = balance(load, *sizes, current=ours)
        ms = (time.perf_counter() - started) * 1e3
        moved = plan_migration(ours, after).share.mean()
        even = theirs.balancedness(load), after.balancedness(load)
        below = (even[1] < even[0] * (1 - 1e-9)).mean()
        rows.append([_newly_filled(before, theirs), plan.share.mean(), moved, *map(np.mean, even), below, ms])
        ours = after
    return np.array(rows)


def _published(load: np.ndarray, sizes: list[int]) -> Placement:
    replicas, gpus, nodes, groups = sizes
    return Placement(rebalance_experts(load, replicas, groups, nodes, gpus)[0], load.shape[1], gpus, nodes)


def _newly_filled(old: Placement, new: Placement) -> float:
    """The share of slots that receive an expert which their GPU did not hold, GPUs left in their order."""
    holds = []
    for placement in (old, new):
        held = np.zeros((placement.num_layers, placement.num_gpus, placement.num_experts), dtype=bool)
        rows = placement.physical_to_logical.reshape(placement.num_layers, placement.num_gpus, -1)
        np.put_along_axis(held, rows, True, axis=2)
        holds.append(held)
    return float((holds[1] & ~holds[0]).sum() / new.physical_to_logical.size)


if __name__ == "__main__":
    main()
