"""How many copies of each token cross nodes, and how even are the GPUs, for each way to place the experts?

    python benchmarks/traffic.py [--routes FILE --experts 256 --replicas 288 --gpus 32 --nodes 4 --groups 8] [--quick]

Without a file, routes are drawn for five named seeds: every expert of a layer has a popularity, a token adds noise of
its own, and a router takes the 8 best of 256 experts. A group-limited one first keeps the 4 of 8 groups whose two best
experts add up to most, as DeepSeek-V3's does; the other one takes the best wherever they are. Placements are made for
half of the tokens and measured on the other half. With ``--routes`` both halves are those of the recorded tokens
(see ``read_routes``). ``copies`` is how many other nodes a token is sent to, in a layer on average.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from counterflow import Placement
from counterflow.experts import alternatives, balance, copies_per_token, read_routes, route_loads

SEEDS = {"ash": 1, "birch": 2, "cedar": 3, "elm": 4, "fir": 5}
EXPERTS, GROUPS, LAYERS, TOKENS, TOP_K, TOP_GROUPS = 256, 8, 4, 8_192, 8, 4
SIZES = ((288, 32, 4), (320, 64, 8))  # replicas, GPUs, nodes
SPILLS = (0.02, 0.05, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--routes", type=Path, metavar="FILE", help="recorded routes instead of drawn ones")
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--replicas", type=int, default=288)
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--quick", action="store_true", help="one seed")
    options = parser.parse_args()
    if options.routes is not None:
        routes = read_routes(options.routes)
        sizes = (options.replicas, options.gpus, options.nodes)
        _table(f"{len(routes)} recorded tokens", [routes], options.experts, sizes, options.groups)
        return
    seeds = list(SEEDS.items())[: 1 if options.quick else None]
    print(f"seeds {', '.join(name for name, _ in seeds)}; {LAYERS} layers, {TOKENS} tokens\n")
    for limited in (True, False):
        drawn = [drawn_routes(seed, limited) for _, seed in seeds]
        what = f"{TOP_K} of {EXPERTS} experts" + (
            f", in {TOP_GROUPS} of {GROUPS} groups" if limited else ", in any group"
        )
        for sizes in SIZES:
            _table(what, drawn, EXPERTS, sizes, GROUPS)


def drawn_routes(seed: int, limited: bool) -> np.ndarray:
    """Routes [tokens, layers, k]."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(LAYERS):
        score = rng.normal(0, 1, EXPERTS) + rng.gumbel(0, 1, (TOKENS, EXPERTS))
        if limited:
            by_group = score.reshape(TOKENS, GROUPS, -1)
            best_two = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
            by_group[best_two < np.sort(best_two, axis=1)[:, -TOP_GROUPS, None]] = -np.inf
        layers.append(np.argpartition(-score, TOP_K, axis=1)[:, :TOP_K])
    return np.stack(layers, axis=1)


def _table(what: str, drawn: list[np.ndarray], experts: int, sizes: tuple[int, int, int], groups: int) -> None:
    replicas, gpus, nodes = sizes
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for routes in drawn:
        seen, later = routes[::2], routes[1::2]
        loads, unseen = route_loads(seen, experts), route_loads(later, experts)
        ways = alternatives(loads, replicas, gpus, nodes, groups)
        for share in SPILLS if ways.pop("spill", None) else ():
            ways[f"spill of {share:g}"] = balance(loads, replicas, gpus, nodes, groups, node_spill=share)
        for name, way in ways.items():
            copies = float(np.nanmean(copies_per_token(later, way)))
            rows.setdefault(name, []).append((_mean(way, loads), _mean(way, unseen), copies))
    print(f"**{what}; {replicas} replicas on {gpus} GPUs, {nodes} nodes**\n")
    print("| placement | balancedness | on unseen tokens | copies | over published |\n|---|---|---|---|---|")
    published = np.mean(rows["published"], axis=0)[2]
    for name, values in rows.items():
        even, later_even, copies = np.mean(values, axis=0)
        print(f"| {name} | {even:.4f} | {later_even:.4f} | {copies:.3f} | {copies / published - 1:+.1%} |")
    print(flush=True)


def _mean(placement: Placement, loads: np.ndarray) -> float:
    return float(placement.balancedness(loads).mean())


if __name__ == "__main__":
    main()
