"""How even is `balance`, how near to what is possible, and how fast beside the published code?

    python benchmarks/balance.py [--peer path/to/eplb.py] [--vllm path/to/eplb/policy/default.py]
                                 [--sglang path/to/eplb_algorithms/deepseek.py] [--quick]

Five named seeds for each kind of load. Prints, as means over the seeds' layers, the balancedness of the published
algorithm and of ours, our gap to the bound that no placement can beat, and our time. With ``--peer`` the published code
itself runs in turns with ours, and has to give exactly the maps of ``rebalance_experts``; the policies of vLLM and of
SGLang run where these are installed or, with ``--vllm`` and ``--sglang``, from that file and what it imports beside it.
Peers are timed on the first seed only: one call of the published code takes up to half a minute. Every time is the
shortest of those taken in turns, since whatever else runs on a machine only adds to it. Ends with the time of a first
call in a new process, with and without a compiled cache.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from counterflow import Placement, balance, rebalance_experts
from counterflow.experts import node_copies

SEEDS = {"ash": 1, "birch": 2, "cedar": 3, "elm": 4, "fir": 5}
SIZES = (  # layers, experts, replicas, groups, nodes, GPUs
    ("58 x 256 -> 288, 8 groups, 4 nodes, 32 GPUs", (58, 256, 288, 8, 4, 32)),
    ("58 x 256 -> 288, global, 32 GPUs", (58, 256, 288, 1, 1, 32)),
    ("94 x 512 -> 640, global, 128 GPUs", (94, 512, 640, 1, 1, 128)),
    ("58 x 256 -> 288, global, 144 GPUs", (58, 256, 288, 1, 1, 144)),
)
ROUNDS = 20
ENOUGH_MS = 3_000
TOKENS = 20_000

Call = Callable[[np.ndarray, tuple[int, int, int, int]], Any]


def lognormal(seed: int, layers: int, experts: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, (layers, experts))


def zipf(exponent: float) -> Callable[[int, int, int], np.ndarray]:
    """Loads i^-exponent in another order in each layer, each a little off: times exp of a normal of 0.2."""

    def draw(seed: int, layers: int, experts: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        popularity = np.arange(1, experts + 1.0) ** -exponent
        return np.stack([rng.permutation(popularity) for _ in range(layers)]) * rng.lognormal(0, 0.2, (layers, experts))

    return draw


LOADS = {"lognormal": lognormal, "zipf 0.8": zipf(0.8), "zipf 1.2": zipf(1.2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="the published eplb.py")
    parser.add_argument("--vllm", type=Path, help="the default.py of vLLM's policies, where vLLM is not installed")
    parser.add_argument("--sglang", type=Path, help="the deepseek.py of SGLang's algorithms, where it is not installed")
    parser.add_argument("--quick", action="store_true", help="one seed, and no new processes")
    options = parser.parse_args()
    peers = _peers(options.peer, options.vllm, options.sglang)
    seeds = dict(list(SEEDS.items())[: 1 if options.quick else None])
    print(f"seeds {', '.join(seeds)}; peers {', '.join(peers) or 'none'}\n")
    header = "| loads | balancedness, published | ours | gap % mean | worst | ours ms |"
    for size, (layers, experts, replicas, groups, nodes, gpus) in SIZES:
        print(f"**{size}**\n\n{header}{''.join(f' {name} ms (ratio) |' for name in peers)}")
        print("|---" * (header.count("|") - 1 + len(peers)) + "|")
        for kind, draw in LOADS.items():
            loads = [draw(seed, layers, experts) for seed in seeds.values()]
            placements = [balance(load, replicas, gpus, nodes, groups) for load in loads]
            even = [placement.balancedness(load) for placement, load in zip(placements, loads, strict=True)]
            gap = np.array([placement.certificate.gap for placement in placements]) * 100
            published = [
                Placement(rebalance_experts(load, replicas, groups, nodes, gpus)[0], experts, gpus, nodes)
                for load in loads
            ]
            theirs = [placement.balancedness(load) for placement, load in zip(published, loads, strict=True)]
            ours_ms, peers_ms = _times(loads[0], (replicas, groups, nodes, gpus), peers)
            print(
                f"| {kind} | {np.mean(theirs):.4f} | {np.mean(even):.4f} | {gap.mean():.3f} | {gap.max():.3f} "
                f"| {ours_ms:.1f} |" + "".join(f" {ms:.0f} ({ms / ours_ms:.1f} x) |" for ms in peers_ms),
                flush=True,
            )
        print()
    _crossings(seeds)
    if not options.quick:
        _first_calls()


def _times(load: np.ndarray, sizes: tuple[int, int, int, int], peers: dict[str, Call]) -> tuple[float, list[float]]:
    """Milliseconds of ours and of each peer, the shortest of all: in turns, a slow peer once."""
    replicas, groups, nodes, gpus = sizes
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(ROUNDS):
        started = time.perf_counter()
        balance(load, replicas, gpus, nodes, groups)
        ours.append((time.perf_counter() - started) * 1e3)
        for name, call in peers.items():
            if sum(theirs[name]) < ENOUGH_MS:
                started = time.perf_counter()
                call(load, sizes)
                theirs[name].append((time.perf_counter() - started) * 1e3)
    return min(ours), [min(times) for times in theirs.values()]


def _peers(published: Path | None, vllm: Path | None, sglang: Path | None) -> dict[str, Call]:
    peers: dict[str, Call] = {}
    if published is not None:
        eplb = _module("eplb", published)
        peers["published"] = lambda load, sizes: _exactly_ours(eplb, load, sizes)
    try:
        default = _module("vllm.distributed.eplb.policy.default", vllm).DefaultEplbPolicy
        peers["vLLM"] = lambda load, sizes: default.rebalance_experts(_tensor(load), *sizes)
    except ImportError:
        if vllm is not None:
            raise
    try:  # what its `auto` chooses
        deepseek = _module("sglang.srt.eplb.eplb_algorithms.deepseek", sglang)
        peers["SGLang"] = lambda load, sizes: deepseek.rebalance_experts(_tensor(load), *sizes, sizes[2] > 1)
    except ImportError:
        if sglang is not None:
            raise
    return peers


def _module(name: str, path: Path | None) -> Any:
    if path is None:
        return importlib.import_module(name)
    if not path.is_file():
        sys.exit(f"{path} is no file; give the {name.replace('.', '/')}.py of its source or wheel")
    folder = types.ModuleType(f"{name.split('.')[0]}_folder")  # stands in for the package, which would import far more
    folder.__path__ = [str(path.parent)]
    sys.modules[folder.__name__] = folder
    return importlib.import_module(f"{folder.__name__}.{path.stem}")


def _exactly_ours(eplb: Any, load: np.ndarray, sizes: tuple[int, int, int, int]) -> None:
    maps = eplb.rebalance_experts(_tensor(load), *sizes)
    for ours, theirs in zip(rebalance_experts(load, *sizes), maps, strict=True):
        if not np.array_equal(ours, theirs.numpy()):
            sys.exit(f"rebalance_experts differs from the published code at {sizes}")


def _tensor(load: np.ndarray) -> Any:
    return importlib.import_module("torch").from_numpy(load).float()


def _crossings(seeds: dict[str, int]) -> None:
    """Balancedness against token copies that cross nodes, for routes limited to 4 of 8 groups as DeepSeek-V3's are."""
    sizes = {"num_replicas": 288, "num_gpus": 32, "num_nodes": 4, "num_groups": 8}
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds.values():
        rng = np.random.default_rng(seed)
        score = rng.normal(0, 1, 256) + rng.gumbel(0, 1, (TOKENS, 256))
        by_group = score.reshape(TOKENS, 8, 32)
        best_two = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
        left_out = best_two < np.sort(best_two, axis=1)[:, 4:5]
        by_group[left_out] = -np.inf
        routes = np.argsort(-score, axis=1)[:, :8]
        loads = np.bincount(routes.ravel(), minlength=256)[None]
        published = Placement(rebalance_experts(loads, 288, 8, 4, 32)[0], 256, 32, 4)
        placements = {
            "published": published,
            "groups on nodes": balance(loads, **sizes),
            "spill 0.02": balance(loads, **sizes, node_spill=0.02),
            "spill 0.05": balance(loads, **sizes, node_spill=0.05),
            "global": balance(loads, **sizes, hierarchy="none"),
        }
        for name, placement in placements.items():
            copies = node_copies(routes, placement).mean()
            rows.setdefault(name, []).append((placement.balancedness(loads)[0], copies))
    print(f"**{TOKENS} tokens to 8 of 256 experts in 4 of 8 groups; 4 nodes**\n")
    print("| placement | balancedness | copies to other nodes, for each token |\n|---|---|---|")
    for name, values in rows.items():
        even, copies = np.mean(values, axis=0)
        print(f"| {name} | {even:.4f} | {copies:.3f} |")
    print()


def _first_calls() -> None:
    code = (
        "import time; started = time.perf_counter(); import numpy; from counterflow import balance;"
        "balance(numpy.random.default_rng(0).lognormal(0, 1, (58, 256)), 288, 32, 4, 8);"
        "print(time.perf_counter() - started)"
    )
    with tempfile.TemporaryDirectory() as empty:
        for what in ("compiled, then kept", "from the cache", "from the cache again"):
            took = subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"NUMBA_CACHE_DIR": empty},
                capture_output=True,
                check=True,
            ).stdout
            print(f"first call of a new process, imports included, {what}: {float(took):.2f} s")


if __name__ == "__main__":
    main()
