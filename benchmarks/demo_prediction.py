"""The demo under every schedule: its measured step beside what the costs read off its own timelines predict.

    python benchmarks/demo_prediction.py [NAME ...] [--steps 16]

Four processes train the demo's model on the CPU. Its costs are read off its own timelines; "durations alone" leaves out
the latency and the sums over twins that were read with them.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from counterflow import simulate
from counterflow.demo import run_demo
from counterflow.schedule import GENERATORS, generate
from counterflow.simulator import read_costs

NUM_RANKS, NUM_MICROBATCHES = 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(GENERATORS))
    parser.add_argument("--steps", type=int, default=16)
    asked = parser.parse_args()
    print(
        f"{NUM_RANKS} ranks on {os.cpu_count()} cores, {NUM_MICROBATCHES} micro-batches, median of {asked.steps} steps"
    )
    print(f"{'schedule':24} {'measured ms':>11} {'predicted ms':>12} {'error':>7} {'durations alone':>15} {'error':>7}")
    for name in asked.names:
        schedule = generate(name, NUM_RANKS, NUM_MICROBATCHES)
        with tempfile.TemporaryDirectory() as folder:
            found = run_demo(schedule, device="cpu", steps=asked.steps, out=Path(folder), progress=lambda *_: None)
            costs = read_costs(Path(folder) / "costs.json")
        alone = simulate(schedule, replace(costs, latency_us=0.0, twins_us=0.0)).makespan_ns / 1e6
        measured, predicted = found.measured.step_ms, found.predicted.step_ms
        errors = (f"{100 * (measured / ms - 1):5.1f} %" for ms in (predicted, alone))
        print(f"{name:24} {measured:11.1f} {predicted:12.1f} {next(errors)} {alone:15.1f} {next(errors)}", flush=True)


if __name__ == "__main__":
    main()
