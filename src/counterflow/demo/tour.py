"""The demo as its user sees it: plan, train, measure, predict, compare."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from counterflow.errors import LaunchError, PipelineError, SimulatorError
from counterflow.files import write_text
from counterflow.report import schedule_svg
from counterflow.runtime import launch
from counterflow.schedule import Schedule, check, generate, to_csv
from counterflow.simulator import Costs, simulate, write_costs
from counterflow.timeline import Timeline, from_chrome, write_chrome

Progress = Callable[[int, float | None], None]
"""Called with the number of steps done and the loss of the last one."""

RIVALS = ("1f1b", "zb1p")


@dataclass(frozen=True)
class Step:
    """One step's figures: its length, and the share of it that ranks spend idle, on average."""

    step_ms: float
    bubble_percent: float

    @classmethod
    def of(cls, timeline: Timeline) -> Step:
        """The figures of a measured or a simulated step."""
        bubble = timeline.bubble_ns().mean() / max(timeline.makespan_ns, 1)
        return cls(timeline.makespan_ns / 1e6, 100 * float(bubble))


@dataclass(frozen=True)
class Results:
    """What the demo found; ``results.json`` holds the same."""

    schedule: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    device: str
    cores: int
    parallel: bool
    parameters: int
    text_bytes: int
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    held_out_before: float
    held_out_after: float
    gradients: dict[str, Any]
    measured: Step
    predicted: Step
    rivals: dict[str, Step]
    without_prediction: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"format": 1, **asdict(self)}


def run_demo(
    schedule: Schedule, *, device: str, steps: int, out: Path, progress: Progress = lambda step, loss: None
) -> Results:
    """Train under ``schedule``; leaves its picture, both traces, the costs and the results in ``out``.

    One process for each rank; with a single GPU all ranks in one process, in turns.

    Raises:
        PipelineError: the device is not there, or too few steps to measure any.
        LaunchError: a rank died; what it said is in ``out``/logs.
    """
    if steps < 5:
        raise PipelineError(f"the demo got {steps} steps; it needs at least 5, for the first 3 only warm up")
    check(schedule)
    backend, num_processes = _processes(device, schedule.num_ranks)
    out.mkdir(parents=True, exist_ok=True)
    for left_over in ("progress.json", "measured.json"):
        (out / left_over).unlink(missing_ok=True)
    write_text(out / "schedule.csv", to_csv(schedule))
    write_text(out / "schedule.svg", schedule_svg(schedule, simulate(schedule, Costs())))
    command = [sys.executable, "-m", "counterflow.demo.train", "--schedule", str(out / "schedule.csv")]
    command += ["--steps", str(steps), "--device", device, "--out", str(out), "--backend", backend]
    try:
        launch(command, num_processes, logs=out / "logs", poll=lambda: progress(*_progress(out)))
    except LaunchError as error:
        raise LaunchError(f"{error}\n  what each rank printed is in {out / 'logs'}") from None
    progress(*_progress(out))
    measured = json.loads((out / "measured.json").read_text())
    for left_over in ("progress.json", "measured.json"):
        (out / left_over).unlink()
    return _evaluate(schedule, measured, device, num_processes == schedule.num_ranks, out)


def _processes(device: str, num_ranks: int) -> tuple[str, int]:
    """The backend, and one process for each rank, or a single one that is all ranks on one GPU."""
    if device == "cpu":
        return "gloo", num_ranks
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise PipelineError("the demo got device 'cuda' and torch sees no GPU here; use device 'cpu'")
    return ("nccl", num_ranks) if gpus >= num_ranks > 1 else ("none", 1)


def _progress(out: Path) -> tuple[int, float | None]:
    try:
        now = json.loads((out / "progress.json").read_text())
    except FileNotFoundError:
        return 0, None
    return now["step"], now["loss"]


def _evaluate(schedule: Schedule, found: dict[str, Any], device: str, parallel: bool, out: Path) -> Results:
    """Feed what was measured to the simulator, and put both side by side."""
    timelines = [from_chrome(data) for data in found["timelines"]]
    spans = (span for timeline in timelines for span in timeline)
    costs = Costs.from_timeline(Timeline.from_spans(spans))
    predicted = simulate(schedule, costs)
    typical = sorted(timelines, key=lambda timeline: timeline.makespan_ns)[len(timelines) // 2]
    write_costs(costs, out / "costs.json")
    write_chrome(predicted, out / "predicted.json")
    write_chrome(typical, out / "measured.json")
    write_text(out / "measured.svg", schedule_svg(schedule, typical))
    rivals, without = _rivals(schedule, costs)
    results = Results(
        schedule=schedule.name,
        num_ranks=schedule.num_ranks,
        num_stages=schedule.num_stages,
        num_microbatches=schedule.num_microbatches,
        device=device,
        cores=os.cpu_count() or 1,
        parallel=parallel,
        parameters=found["parameters"],
        text_bytes=found["text_bytes"],
        steps=len(found["losses"]),
        seconds=found["seconds"],
        first_loss=found["losses"][0],
        last_loss=median(found["losses"][-5:]),
        held_out_before=found["held_out"]["before"],
        held_out_after=found["held_out"]["after"],
        gradients=found["gradients"],
        measured=_median_step([Step.of(timeline) for timeline in timelines]),
        predicted=Step.of(predicted),
        rivals=rivals,
        without_prediction=without,
    )
    write_text(out / "results.json", json.dumps({**results.as_dict(), "losses": found["losses"]}, indent=1) + "\n")
    return results


def _median_step(steps: list[Step]) -> Step:
    return Step(median(step.step_ms for step in steps), median(step.bubble_percent for step in steps))


def _rivals(schedule: Schedule, costs: Costs) -> tuple[dict[str, Step], dict[str, str]]:
    """What the same stages would take under other schedules; where that cannot be said, why."""
    rivals, without = {}, {}
    for name in (name for name in RIVALS if name != schedule.name):
        try:
            rival = generate(name, schedule.num_stages, schedule.num_microbatches)
            rivals[name] = Step.of(simulate(rival, costs))
        except SimulatorError as error:
            without[name] = str(error)
    return rivals, without
