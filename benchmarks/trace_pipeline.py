"""Steps rebuilt from profiler traces beside those that the executor's own clock measured, and what they predict.

    python benchmarks/trace_pipeline.py [NAME ...]                 two gloo processes on the CPU
    python benchmarks/trace_pipeline.py --device cuda [NAME ...]   both ranks in one process, on one GPU
    python benchmarks/trace_pipeline.py --device nccl [NAME ...]   two NCCL processes, each on a GPU
    python benchmarks/trace_pipeline.py --folder FOLDER [...]      keep what was recorded, or take what is there

For each schedule: by how much the busy time of a rank, its bubble and the length of a single action differ between
the trace and the executor's clock (marks of the host's clock on the CPU, events on the GPU): the worst of all ranks
and steps, for actions also the median. Then the step that is simulated with the costs out of the traces, beside the
measured one, the median of all; not for one GPU, where ranks take turns. With NCCL also the bounds of the bubble that
are left when nothing names the actions, as shares of the step, beside the bubble with names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from counterflow import Timeline

NAMES = ("1f1b", "zb1p", "dualpipev")
NUM_RANKS, NUM_MICROBATCHES, STEPS, WARM_UP = 2, 8, 8, 3


def record(name: str, device: str, folder: Path) -> None:
    """One process: profile some steps, and leave the trace and the clock's own timelines."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, record_function

    from counterflow.runtime import Pipeline
    from counterflow.schedule import generate, to_csv
    from counterflow.timeline import write_chrome

    schedule = generate(name, NUM_RANKS, NUM_MICROBATCHES)
    on_gpu, in_process = device != "cpu", device == "cuda"
    if device == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    place = "cuda" if on_gpu else "cpu"
    width, rows = (2048, 8192) if on_gpu else (256, 512)

    def stages(rank: int) -> dict[int, torch.nn.Module]:
        def block() -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width))

        return {s: torch.nn.Sequential(*(block() for _ in range(4))).to(place) for s in schedule.stages_of(rank)}

    loss, rank = torch.nn.functional.mse_loss, 0
    if in_process:
        pipeline = Pipeline.in_process(schedule, [stages(rank) for rank in range(NUM_RANKS)], loss)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("nccl" if on_gpu else "gloo")
        rank = dist.get_rank()
        pipeline = Pipeline(schedule, stages(rank), loss)
    data = list(torch.randn(NUM_MICROBATCHES, rows, width, device=place))
    for _ in range(WARM_UP):
        pipeline.step(data, data)
    timelines = []
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for number in range(STEPS):
            with record_function(f"ProfilerStep#{number}"):
                pipeline.step(data, data)
                timelines.append(pipeline.gather_timeline())
                if not in_process:
                    dist.all_reduce(torch.ones(1, device=place))
    profiler.export_chrome_trace(str(folder / f"rank{rank}.json"))
    if rank == 0:
        (folder / "schedule.csv").write_text(to_csv(schedule))
        for number, timeline in enumerate(timelines):
            write_chrome(timeline, folder / f"clock{number}.own")
    if not in_process:
        dist.destroy_process_group()


def compare(name: str, device: str, folder: Path) -> None:
    """A line of the table."""
    from counterflow import simulate
    from counterflow.schedule import read_schedule
    from counterflow.timeline import COMPUTE, read_chrome
    from counterflow.trace import measured_pipeline, open_traces, pipeline_costs

    schedule = read_schedule(folder / "schedule.csv") if device == "cuda" else None
    found = measured_pipeline(open_traces(folder), schedule)
    assert found is not None
    own = [read_chrome(folder / f"clock{number}.own") for number in range(STEPS)]
    busy, bubble, single, lengths = [], [], [], []
    for step, timeline in zip(found.steps, own, strict=True):
        share = 100 / timeline.busy_ns()
        busy += (abs(step.busy_ns() - timeline.busy_ns()) * share).tolist()
        bubble += (abs(step.bubble_ns() - timeline.bubble_ns()) * share).tolist()
        theirs = {(span.rank, span.name): span.duration_ns for span in timeline if span.lane == COMPUTE}
        single += [abs(span.duration_ns - theirs[span.rank, span.name]) for span in step]
        lengths.append(timeline.makespan_ns)
    predicted = simulate(found.schedule, pipeline_costs(found).costs).makespan_ns / 1e6
    measured = median(lengths) / 1e6
    prediction = f"{measured:10.2f} {predicted:10.2f} {100 * (predicted / measured - 1):+7.1f} %"
    print(
        f"{name:12} {max(busy):7.2f} % {max(bubble):7.2f} % {median(single) / 1e3:10.1f} {max(single) / 1e3:10.1f}"
        f"   {prediction if device != 'cuda' else ''}",
        flush=True,
    )
    if device == "nccl":
        without_names(folder, found.steps)


def without_names(folder: Path, steps: "Sequence[Timeline]") -> None:
    """A line for each rank: its bubble with names, and the bounds of it without, means over the steps."""
    from counterflow.trace import bubble_bounds, open_traces

    named = {span.name for step in steps for span in step}
    with tempfile.TemporaryDirectory() as bare:
        for path in sorted(folder.glob("rank*.json")):
            trace = json.loads(path.read_bytes())
            trace["traceEvents"] = [e for e in trace["traceEvents"] if e["name"] not in named]
            Path(bare, path.name).write_text(json.dumps(trace), encoding="utf-8")
        bounds, _ = bubble_bounds(open_traces(bare))
    for rank in range(NUM_RANKS):
        own = [one for one in bounds if one.rank == rank]
        shares = [
            100 * mean(us / one.window_us for us, one in zip(column, own, strict=True))
            for column in (
                [step.bubble_ns()[rank] / 1e3 for step in steps],
                [one.least_us for one in own],
                [one.most_us for one in own],
            )
        ]
        print("{:12} rank {}: bubble {:.2f} %, without names {:.2f} to {:.2f} %".format("", rank, *shares), flush=True)


def run(name: str, device: str, folder: Path) -> None:
    """Start the processes that record."""
    command = [sys.executable, __file__, name, "--device", device, "--record", str(folder)]
    if device == "cuda":
        subprocess.run(command, check=True)
    else:
        from counterflow.runtime import launch

        launch(command, NUM_RANKS, logs=folder / "logs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(NAMES))
    parser.add_argument("--device", choices=("cpu", "cuda", "nccl"), default="cpu")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.record:
        record(asked.names[0], asked.device, asked.record)
        return
    print(f"{NUM_RANKS} ranks, {NUM_MICROBATCHES} micro-batches, {STEPS} steps; trace against clock, then prediction")
    print(
        f"{'schedule':12} {'busy':>9} {'bubble':>9} {'action, µs':>10} {'most, µs':>10}   "
        f"{'measured':>10} {'predicted':>10}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name in asked.names:
            folder = (asked.folder or Path(temporary)) / f"{asked.device}-{name}"
            if not (folder / "schedule.csv").exists():
                folder.mkdir(parents=True, exist_ok=True)
                run(name, asked.device, folder)
            compare(name, asked.device, folder)


if __name__ == "__main__":
    main()
