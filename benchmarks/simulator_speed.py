"""Generate, lower and simulate DualPipe: the compiled loops beside the slow reference, and a cold and a warm start.

    python benchmarks/simulator_speed.py [--ranks 128 --microbatches 8192] [--reference-microbatches 1024]

Both are timed in one process, one after the other; the reference takes fewer micro-batches where all of them would
not fit into memory, and both are then compared for each action.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from counterflow import Costs, Schedule, Timeline, dualpipe, simulate
from counterflow.simulator import reference

COSTS = Costs(1, 2, None, 1, 2.4, latency_us=0.1)
FIRST_CALL = """
import time
from counterflow import Costs, dualpipe, loops, simulate
loops.COMPILED_FROM = 0
start = time.perf_counter()
simulate(dualpipe(8, 20), Costs())
print(time.perf_counter() - start)
"""
CHECK = """
import sys, time
from counterflow import check, dualpipe, loops
if sys.argv[1] == "compiled":
    loops.COMPILED_FROM = 0
    check(dualpipe(8, 20))
start = time.perf_counter()
check(dualpipe(64, 512))
print(time.perf_counter() - start)
"""


def timed(num_ranks: int, num_microbatches: int, run: Callable[[Schedule, Costs], Timeline]) -> tuple[float, int]:
    """Seconds, from the name of the schedule to its largest bubble, and the number of actions."""
    start = time.perf_counter()
    schedule = dualpipe(num_ranks, num_microbatches)
    run(schedule, COSTS).bubble_ns()
    return time.perf_counter() - start, schedule.rows.num_actions


def in_a_new_process(code: str, *arguments: str, **environment: str) -> float:
    """The seconds that ``code`` prints."""
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=8192)
    parser.add_argument("--reference-microbatches", type=int, default=1024)
    sizes = parser.parse_args()

    timed(sizes.ranks, 2 * sizes.ranks, simulate)  # compiles, or reads what was compiled
    runs = [timed(sizes.ranks, sizes.microbatches, simulate) for _ in range(5)]
    seconds, actions = sorted(runs)[2]
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"DualPipe, {sizes.ranks} ranks, {sizes.microbatches} micro-batches: {actions:,} actions")
    print(f"generate, lower, simulate: {seconds:.2f} s, median of 5, {actions / seconds / 1e6:.2f} M actions a second")
    print(f"largest memory of this process so far: {gigabytes:.2f} GB")

    fewer = min(sizes.reference_microbatches, sizes.microbatches)
    slow_seconds, slow_actions = timed(sizes.ranks, fewer, reference.simulate)
    ratio = (slow_seconds / slow_actions) / (seconds / actions)
    print(f"reference, {fewer} micro-batches: {slow_seconds:.2f} s, {ratio:.0f} times as long for each action")

    with tempfile.TemporaryDirectory() as cache:
        cold, *warm = (in_a_new_process(FIRST_CALL, NUMBA_CACHE_DIR=cache) for _ in range(4))
    print(f"first call of a process, nothing compiled: {cold:.2f} s; compiled by an earlier one: {min(warm):.2f} s")
    plain, compiled = (in_a_new_process(CHECK, how) for how in ("plain", "compiled"))
    print(f"check of 64 ranks, 512 micro-batches, generation included: {plain:.2f} s, {compiled:.2f} s compiled")


if __name__ == "__main__":
    main()
