"""Training's F&B between two GPUs over NCCL: a real all-to-all in the place of the loopback.

    python profiles/two_gpus.py --out profiles

starts a process on each of two GPUs. They share 16 experts, eight on each: as many rows come to a GPU as in EP64, and
half of them from the other one, over NVLink in bfloat16. Writes two-gpus.json and a profile of each rank. ``--tiny``
runs the same over gloo on a CPU with a tiny model, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from deployments import LAYERS, Deployment, Share
from make import profiled, tell
from timing import Stopwatch, medians, sms_left_free, ways_of, with_shares

from counterflow.files import write_text
from counterflow.runtime import ProcessGroupExchange, launch
from counterflow.runtime.blocks import ready_now
from counterflow.runtime.exchange import Rows

NUM_RANKS = 2
DEPLOYMENT = Deployment("training", "v3-layer", ranks=NUM_RANKS, experts=16, tokens=4096, length=4096, wire_copies=4)
TINY = replace(DEPLOYMENT, preset="tiny", tokens=32, length=16)
CHANNELS = (4, 8, 16, 32)
"""NCCL's for messages between two ranks, each a block that stays on a multiprocessor."""


def wire_alone(share: Share, exchange: ProcessGroupExchange) -> float:
    """The transfers of both micro-batches behind each other, and nothing else."""
    rows = share.deployment.tokens * share.config.top_k
    source = share.random(rows)
    target = torch.empty_like(source)
    there = Rows((rows // NUM_RANKS,) * NUM_RANKS, (rows // NUM_RANKS,) * NUM_RANKS)
    watch = Stopwatch(share.device)
    watch.synchronize()

    def exchange_all() -> None:
        for _ in range(4 * LAYERS):
            exchange.start(source, target, there, ready_now(source)).wait()

    return watch.of(exchange_all)


def measure(out: Path, channels: int, rounds: int, *, keep: bool, tiny: bool) -> None:
    """One rank."""
    rank = int(os.environ["RANK"])
    if not tiny:
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if tiny else "nccl")
    exchange = ProcessGroupExchange()
    share = Share(TINY if tiny else DEPLOYMENT, torch.device("cpu") if tiny else torch.device("cuda", rank))
    with sms_left_free(channels):
        ways = ways_of(share, exchange, lambda: wire_alone(share, exchange))
        found = with_shares(medians(ways, rounds))
        rows = share.deployment.tokens * share.config.top_k
        found["transfer_bytes"] = rows // NUM_RANKS * share.config.hidden * 2
        if keep:
            profiled(share, exchange, out / f"two-gpus-{rank}.json.gz")
    if rank == 0:
        tell("training", f"{channels} channels", found)
        path = out / "two-gpus.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        machine = "CPU" if tiny else torch.cuda.get_device_name()
        library = "gloo" if tiny else f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        results |= {"gpu": machine, "torch": torch.__version__, "library": library, str(channels): found}
        write_text(path, json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("profiles"))
    parser.add_argument("--channels", nargs="+", type=int, default=CHANNELS)
    parser.add_argument("--profile", type=int, default=8, help="with how many channels to keep profiles")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if "RANK" in os.environ:
        (channels,) = options.channels
        measure(options.out, channels, options.rounds, keep=channels == options.profile, tiny=options.tiny)
        return
    if not options.tiny and torch.cuda.device_count() < NUM_RANKS:
        sys.exit("profiles/two_gpus.py needs two GPUs; --tiny runs a tiny model on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    for channels in options.channels:
        os.environ["NCCL_MAX_P2P_NCHANNELS"] = os.environ["NCCL_MIN_P2P_NCHANNELS"] = str(channels)
        arguments = ["--out", options.out, "--channels", channels, "--profile", options.profile]
        arguments += ["--rounds", options.rounds, *(["--tiny"] if options.tiny else [])]
        launch([sys.executable, __file__, *map(str, arguments)], NUM_RANKS)


if __name__ == "__main__":
    main()
