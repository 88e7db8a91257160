"""Measure and profile training, prefill and decode on one GPU, at the sizes and bytes of the published deployments.

The GPU is rank 0 of a deployment: its experts, its tokens, routed evenly. Its rows leave it for host memory and come
back, as many bytes as the deployment sends between nodes; ``counterflow.runtime.loopback`` says what that cannot show.

    python profiles/make.py --out profiles

writes results.json, costs.json for ``counterflow compare`` and a profile for each mode and transport (training.json.gz,
training-20-ctas.json.gz, …). ``--tiny`` runs the same on a CPU with a tiny model, to see that it runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from decode import PIECE_BYTES, decode_figures, pair_graph
from deployments import DEPLOYMENTS, LAYERS, TINY, Deployment, Share
from graph_phases import mark_phases
from timing import Stopwatch, actions, figures, sms_left_free
from torch.profiler import ProfilerActivity, profile, schedule

from counterflow.files import write_bytes, write_text
from counterflow.runtime.chunk import run
from counterflow.runtime.exchange import Exchange
from counterflow.runtime.loopback import NOT_SHOWN, LoopbackExchange

ACTIONS = ("forward_us", "backward_us", "weight_us", "overlapped_us")


def traced(device: torch.device, prepare: Callable[[], Callable[[], None]]) -> dict[str, Any]:
    """A trace of the second of two runs: in the first one the profiler gets ready."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize = Stopwatch(device).synchronize
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1), acc_events=True) as recorded:
        for last in (False, True):
            work = prepare()
            synchronize()
            if last:
                recorded.step()
            work()
            synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_bytes())
    return trace


def profiled(share: Share, exchange: Exchange, path: Path) -> None:
    """Write the profile of a pair; decode's is of a CUDA graph."""
    trace = traced(share.device, eager(share, exchange))
    if share.deployment.mode == "decode" and share.device.type == "cuda":
        graph = pair_graph(share, exchange)
        plain, trace = trace, traced(share.device, lambda: graph.replay)
        mark_phases(trace, plain)
    write_bytes(path, gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), 9, mtime=0))


def eager(share: Share, exchange: Exchange) -> Callable[[], Callable[[], None]]:
    """A pair of programs, made ready to run."""

    def prepare() -> Callable[[], None]:
        share.forget()
        programs = share.pair()
        plan = share.plan(programs)

        def work() -> None:
            with share.over(exchange):
                run(plan, *programs)

        return work

    return prepare


def measure(
    deployment: Deployment, device: torch.device, options: argparse.Namespace, earlier: dict[str, Any]
) -> dict[str, Any]:
    """All figures of one mode, and its profiles; transports that were measured ``earlier`` stay."""
    share = Share(deployment, device)
    dispatch, combine = deployment.wire_bytes
    found: dict[str, Any] = earlier | {"dispatch_bytes": dispatch, "combine_bytes": combine}
    found["transports"] = found.get("transports", {})
    piece = PIECE_BYTES if deployment.mode == "decode" else 16 << 20
    for ctas in options.ctas:
        exchange = LoopbackExchange(dispatch, combine, num_ranks=deployment.ranks, ctas=ctas, piece_bytes=piece)
        name, suffix = (f"{ctas} CTAs", f"-{ctas}-ctas") if ctas else ("copy engines", "")
        with sms_left_free(ctas):
            found["transports"][name] = figures(share, exchange, options.rounds)
            tell(deployment.mode, name, found["transports"][name])
            if ctas in options.profile:
                profiled(share, exchange, options.out / f"{deployment.mode}{suffix}.json.gz")
            if deployment.mode == "training" and not ctas:
                found["actions"] = actions(share, exchange, options.rounds)
                tell("actions", name, found["actions"])
                costs = {"format": 1} | {key: round(found["actions"][key]) for key in ACTIONS}
                write_text(options.out / "costs.json", json.dumps(costs, indent=1) + "\n")
    if deployment.mode == "decode":
        found["graphs"] = decode_figures(share, options.rounds)
        tell("decode", "in graphs", {key: value for key, value in found["graphs"].items() if key != "rows"})
        for row in found["graphs"]["rows"]:
            tell("decode", "in graphs", row)
    return found


def tell(mode: str, name: str, row: dict[str, Any]) -> None:
    """One line."""
    told = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    print(mode, name, *(f"{key} {value}" for key, value in told.items()), flush=True)


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("profiles"))
    parser.add_argument("--modes", nargs="+", default=list(DEPLOYMENTS), choices=list(DEPLOYMENTS))
    parser.add_argument("--ctas", nargs="+", type=int, default=[0, 4, 8, 20, 24], help="0 stands for copy engines")
    parser.add_argument("--profile", nargs="*", type=int, default=[0, 20], help="of which transports to keep profiles")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("profiles/make.py needs a GPU; --tiny runs a tiny model on a CPU")
    device = torch.device("cpu" if options.tiny else "cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    modes = json.loads(path.read_text())["modes"] if path.exists() else {}
    for mode in options.modes:
        with torch.set_grad_enabled(mode == "training"):
            deployment = (TINY if options.tiny else DEPLOYMENTS)[mode]
            modes[mode] = measure(deployment, device, options, modes.get(mode, {}))
    gpu = "CPU" if options.tiny else torch.cuda.get_device_name()
    results = {"gpu": gpu, "torch": torch.__version__, "layers": LAYERS, "not_shown": NOT_SHOWN, "modes": modes}
    write_text(path, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
