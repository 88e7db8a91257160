"""What is each policy of rebalancing worth on recorded loads, and on loads that drift?

    python benchmarks/replay.py FILE... [--key loads] [--gpus 16] [--replicas 80] [--interval 8]

Each file holds an array [steps, layers, experts] of token counts. It is served again under every policy of
``counterflow replay``, then all files one after the other, where the traffic turns from one kind to the next, and then
generated loads of 58 layers and 256 experts, whose logarithms drift as in ``drift.py`` from step to step, with 32,768
tokens drawn in each layer. ``moved`` is the share of slots that newly receive an expert in a rebalance, ``in turn`` how
many experts arrive one after the other in it, ``CPU ms`` what deciding took, in the median rebalance, and ``largest``
the largest share that a replica has of a GPU's mean load in the end, the mean over layers. Then the policy balance
with other windows and averages, and with more and more redundant experts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from counterflow import balance
from counterflow.experts import POLICIES, Replay, ReplaySettings, replay, sweep_replicas, worthwhile
from counterflow.experts.recordings import read_loads

DRIFTS = (0.02, 0.1)
STEPS, TOKENS = 48, 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--key", help="the array in each file")
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=80)
    parser.add_argument("--interval", type=int, default=8)
    options = parser.parse_args()
    recorded = {file.stem: read_loads(file, options.key) for file in options.files}
    if len(recorded) > 1:
        recorded["one after the other"] = np.concatenate(list(recorded.values()))
    settings = ReplaySettings(2 * options.interval, options.interval)
    sizes = options.replicas, options.gpus
    balance(np.random.default_rng(0).lognormal(0, 1, (100, 512)), 544, 32)  # compiles
    figures = "balancedness | worst step | worst layer | x even | rebalances | moved | in turn | CPU ms | largest"
    print(f"| loads | policy | {figures} |")
    print("|" + "---|" * 11)
    for name, windows in recorded.items():
        _policies(name, windows, sizes, settings)
    for sigma in DRIFTS:
        _policies(f"drift {sigma:g}", drifting(sigma), (288, 32), settings)
    for name, windows in recorded.items():
        _trackers(name, windows, sizes, options.interval)
        _sweep(name, windows, options.gpus, settings)


def drifting(sigma: float) -> np.ndarray:
    """Tokens drawn from popularities whose logarithms are an autoregressive process of standard deviation 1."""
    rng = np.random.default_rng(1)
    logs = rng.normal(0, 1, (58, 256))
    steps = []
    for _ in range(STEPS):
        logs = np.sqrt(1 - sigma**2) * logs + sigma * rng.normal(0, 1, logs.shape)
        share = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
        steps.append(rng.multinomial(TOKENS, share))
    return np.array(steps)


def _policies(name: str, windows: np.ndarray, sizes: tuple[int, int], settings: ReplaySettings) -> None:
    for policy in POLICIES:
        served = replay(windows, policy, *sizes, settings=settings)
        even = served.balancedness
        figures = f"{even.mean():.3f} | {even.mean(axis=1).min():.3f} | {even.mean(axis=0).min():.3f}"
        told = "- | - | - | - | -"
        if served.due:
            in_turn = sum(each.in_turn for each in served.due) / len(served.due)
            told = f"{len(served.rebalances)} | {served.share:.3f} | {in_turn:.0f}"
            told += f" | {served.policy_s * 1e3:.1f} | {_largest(served, windows[-settings.window_size :]):.3f}"
        print(f"| {name} | {policy} | {figures} | {served.slowdown:.3f} | {told} |", flush=True)


def _largest(served: Replay, windows: np.ndarray) -> float:
    load, placement = windows.sum(axis=0), served.last
    share = (load / placement.logical_count).max(axis=1)
    return float((share / (load.sum(axis=1) / placement.num_gpus)).mean())


def _trackers(name: str, windows: np.ndarray, sizes: tuple[int, int], interval: int) -> None:
    print(f"\nThe policy balance on {name}, by what it learns from:\n\n| learns from | balancedness | x even |")
    print("|---|---|---|")
    for window in (interval // 2, interval, 2 * interval, 4 * interval, len(windows)):
        _tracker(f"the last {window}", windows, sizes, ReplaySettings(window, interval))
    for decay in (0.8, 0.95, 0.99):
        _tracker(f"decay {decay:g}", windows, sizes, ReplaySettings(1, interval, decay))


def _tracker(name: str, windows: np.ndarray, sizes: tuple[int, int], settings: ReplaySettings) -> None:
    served = replay(windows, "balance", *sizes, settings=settings)
    print(f"| {name} | {served.balancedness.mean():.3f} | {served.slowdown:.3f} |", flush=True)


def _sweep(name: str, windows: np.ndarray, gpus: int, settings: ReplaySettings) -> None:
    rows = sweep_replicas(windows, "balance", 5 * windows.shape[2] // 2, gpus, settings=settings)
    pays = {cost: worthwhile(rows, cost).num_replicas for cost in (0.02, 0.01, 0.005)}
    print(f"\nRedundant experts on {name}, {gpus} GPUs; a slot may cost: {pays}\n")
    print("| replicas | slots of a GPU | balancedness | x even | faster by |\n|---|---|---|---|---|")
    for row in rows:
        gain = "-" if row.gain is None else f"{row.gain:.2%}"
        even = f"{row.balancedness:.3f} | {row.slowdown:.3f}"
        print(f"| {row.num_replicas} | {row.slots} | {even} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
