"""The verb trace pipeline: the schedule that ran, its bubble, and who waited for whom."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterflow.cli.options import Json
from counterflow.cli.output import counted, number, print_json, print_table, printable, refuse_loss, warn, writing
from counterflow.cli.schedules import head_of, sizes_of
from counterflow.cli.trace.bounds import report_bounds
from counterflow.cli.trace.clocks import clocks, print_stragglers
from counterflow.cli.trace.costs import ScheduleFile
from counterflow.cli.trace.options import RulesFile
from counterflow.cli.trace.progress import reading, warn_of
from counterflow.errors import CounterflowError

if TYPE_CHECKING:
    from counterflow.report import Deviation, Wait
    from counterflow.timeline import Timeline
    from counterflow.trace import MeasuredPipeline

_WAITS = 5


def pipeline(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Traces, one for each rank, or one folder.")],
    step: Annotated[str, typer.Option("--step", help="A step's number, from 0; all; or their mean.")] = "mean",
    schedule: ScheduleFile = None,
    costs: Annotated[
        Path | None, typer.Option("--costs", help="Simulate the schedule that ran with this costs.json, and compare.")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option("--overlay", help="Draw the step over the simulated one: an .svg or .png.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the measured timeline.")] = None,
    rules: RulesFile = None,
    as_json: Json = False,
) -> None:
    """Rebuild a pipeline's step from traces: its bubble, split, and who waited for whom.

    Reads the actions that counterflow's executor or torch's pipeline runtime named. Without such names it bounds
    the bubble by what the GPUs computed, and by when they only sent or received. Ranks are put on one clock by the
    ends of the collectives that they share, and those that come last to them are named.

    The overlay simulates the schedule that ran, with --costs or with the costs that the traces themselves tell.

    \b
    Example:
      counterflow trace pipeline rank0.json rank1.json --overlay step.svg
      counterflow trace pipeline traces/ --step 2 -o step2.json
    """
    from counterflow.schedule import read_schedule
    from counterflow.trace import Rules, bubble_bounds, measured_pipeline, open_traces
    from counterflow.trace.messages import unheard

    if overlay is not None and overlay.suffix not in (".svg", ".png"):
        raise CounterflowError(f"{overlay} ends in {overlay.suffix!r}; an overlay is drawn as .svg or .png")
    for path in (overlay, output):
        if path is not None:
            refuse_loss(path, files)
    ran = None if schedule is None else read_schedule(schedule)
    own = None if rules is None else Rules.read(rules)
    with reading(files) as progress:
        traces = open_traces(files[0] if len(files) == 1 else files, progress=progress)
    found = measured_pipeline(traces, ran, own)
    warn_of(traces)
    if found is None:
        if overlay is not None or output is not None or costs is not None:
            raise CounterflowError(
                f"{files[0]} names no actions, so there is no schedule to draw, to write or to simulate; leave out "
                "--overlay, --costs and -o"
            )
        for warning in unheard(traces):
            warn(warning)
        report_bounds(*bubble_bounds(traces, own), as_json)
        return
    for warning in found.warnings:
        warn(warning)
    chosen = _chosen(found, step)
    simulated = _simulated(found, costs) if costs is not None or overlay is not None else None
    differing: list[Deviation] = []
    if simulated is not None:
        if len(chosen) > 1:
            raise CounterflowError("--costs and --overlay are for one step and got all; give --step a number, or mean")
        differing = _compared(found, next(iter(chosen.values())), simulated, overlay)
    if output is not None:
        _write(output, found, chosen)
    if as_json:
        print_json(_plain(found, chosen, simulated, differing))
    else:
        _print(found, chosen, simulated, differing)
        for path in (overlay, output):
            if path is not None:
                print(f"\nwrote {printable(str(path))}")


def _chosen(found: MeasuredPipeline, step: str) -> dict[str, Timeline]:
    """The steps that were asked for, with what to call them."""
    if step == "mean":
        return {f"mean of {counted(len(found.steps), 'step')}": found.mean_step}
    numbers = range(len(found.steps)) if step == "all" else [int(step)] if step.isascii() and step.isdigit() else []
    if not numbers or numbers[-1] >= len(found.steps):
        raise CounterflowError(
            f"--step got {step!r}; the traces hold {counted(len(found.steps), 'whole step')}: give a number from 0 to "
            f"{len(found.steps) - 1}, all or mean"
        )
    return {f"step {number}": found.steps[number] for number in numbers}


def _simulated(found: MeasuredPipeline, costs: Path | None) -> Timeline:
    from counterflow.simulator import read_costs, simulate
    from counterflow.trace import pipeline_costs

    if found.problem is not None:
        raise CounterflowError(f"the rows of these traces cannot be simulated: {found.problem}; give all ranks' traces")
    return simulate(found.schedule, pipeline_costs(found).costs if costs is None else read_costs(costs))


def _compared(
    found: MeasuredPipeline, measured: Timeline, simulated: Timeline, overlay: Path | None
) -> list[Deviation]:
    from counterflow.files import write_bytes
    from counterflow.report import deviations, overlay_svg, to_png

    if overlay is not None:
        png = overlay.suffix == ".png"
        picture = overlay_svg(found.schedule, measured, simulated, theme="light" if png else None)
        data = to_png(picture) if png else picture.encode()
        with writing(overlay):
            write_bytes(overlay, data)
    return deviations(found.schedule, measured, simulated)


def _write(output: Path, found: MeasuredPipeline, chosen: dict[str, Timeline]) -> None:
    from counterflow.timeline import write_chrome

    with writing(output):
        write_chrome(next(iter(chosen.values())) if len(chosen) == 1 else found.every_step, output)


# --- named actions ------------------------------------------------------------------------------------------


def _figures(found: MeasuredPipeline, timeline: Timeline) -> dict[str, Any]:
    from counterflow.report import waits
    from counterflow.simulator import bubble_phases

    phases = bubble_phases(timeline)
    columns = {
        "busy_us": timeline.busy_ns(),
        "bubble_us": timeline.bubble_ns(),
        "warm_up_us": phases.warm_up_ns,
        "steady_us": phases.steady_ns,
        "cool_down_us": phases.cool_down_ns,
    }
    return {
        "makespan_us": timeline.makespan_ns / 1000,
        **{name: [ns / 1000 for ns in column.tolist()] for name, column in columns.items()},
        "waits": [_wait(one, int(timeline.start_ns.min())) for one in waits(found.schedule, timeline)],
    }


def _wait(one: Wait, origin_ns: int) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "action": str(one.action),
        "waits_for_rank": one.peer,
        "waits_for": str(one.part),
        "start_us": (one.start_ns - origin_ns) / 1000,
        "waited_us": one.waited_ns / 1000,
        "arriving_us": one.arriving_ns / 1000,
    }


def _plain(
    found: MeasuredPipeline, chosen: dict[str, Timeline], simulated: Timeline | None, differing: list[Deviation]
) -> dict[str, Any]:
    return {
        "named_by": found.named_by,
        **head_of(found.schedule),
        "schedule": [[str(action) for action in row] for row in found.schedule.rows],
        "problem": found.problem,
        "files": list(found.files),
        "ranks": list(found.ranks),
        "num_steps": len(found.steps),
        "actions_outside_steps": found.cut,
        "clocks": asdict(found.alignment),
        "steps": [{"step": name, **_figures(found, timeline)} for name, timeline in chosen.items()],
        "simulated": None
        if simulated is None
        else {
            "makespan_us": simulated.makespan_ns / 1000,
            "bubble_us": [ns / 1000 for ns in simulated.bubble_ns().tolist()],
            "deviations": [
                {
                    "rank": one.rank,
                    "action": str(one.action),
                    "measured_us": one.measured_ns / 1000,
                    "simulated_us": one.simulated_ns / 1000,
                    "later_us": one.later_ns / 1000,
                }
                for one in differing
            ],
        },
        "warnings": list(found.warnings),
    }


def _print(
    found: MeasuredPipeline, chosen: dict[str, Timeline], simulated: Timeline | None, differing: list[Deviation]
) -> None:
    print(f"{found.schedule.name}: {sizes_of(found.schedule)}; actions named by {found.named_by}")
    left_out = f", {counted(found.cut, 'action')} outside them" if found.cut else ""
    print(f"{counted(len(found.steps), 'whole step')} in the traces{left_out}; {clocks(found.alignment)}")
    for name, timeline in chosen.items():
        figures = _figures(found, timeline)
        print(f"\n{name}: {number(figures['makespan_us'])} µs\n")
        _print_bubbles(found, figures)
        _print_waits(figures["waits"])
    if simulated is not None:
        _print_difference(next(iter(chosen.values())), simulated, differing)
    print_stragglers(found.alignment)


def _print_bubbles(found: MeasuredPipeline, figures: dict[str, Any]) -> None:
    parts = ("busy_us", "bubble_us", "warm_up_us", "steady_us", "cool_down_us")
    rows = [
        [
            str(rank),
            printable(Path(found.files[rank]).name),
            *(number(figures[part][rank]) for part in parts),
            f"{figures['bubble_us'][rank] / max(figures['busy_us'][rank] + figures['bubble_us'][rank], 1e-9):.1%}",
        ]
        for rank in range(found.schedule.num_ranks)
    ]
    print_table(
        ["rank", "trace", "busy µs", "bubble µs", "warm-up µs", "steady µs", "cool-down µs", "of the step"], rows
    )


def _print_waits(waits: list[dict[str, Any]]) -> None:
    if not waits:
        return
    sums = defaultdict[tuple[int, int], list[float]](lambda: [0, 0.0, 0.0])
    for one in waits:
        known = sums[one["rank"], one["waits_for_rank"]]
        known[:] = known[0] + 1, known[1] + one["waited_us"], known[2] + one["arriving_us"]
    print()
    print_table(
        ["rank", "waited for rank", "times", "until it was done, µs", "until it was there, µs"],
        [
            [str(rank), str(peer), str(int(times)), number(waited), number(arriving)]
            for (rank, peer), (times, waited, arriving) in sorted(sums.items())
        ],
    )
    print("\nthe longest waits:")
    for one in waits[:_WAITS]:
        whole, waited = one["waited_us"] + one["arriving_us"], one["waited_us"]
        print(
            f"  rank {one['rank']} before {one['action']}: {number(whole)} µs for {one['waits_for']} of rank "
            f"{one['waits_for_rank']}, {number(waited)} µs of them until it was done"
        )


def _print_difference(measured: Timeline, simulated: Timeline, differing: list[Deviation]) -> None:
    share = simulated.makespan_ns / max(measured.makespan_ns, 1) - 1
    print(f"\nsimulated: {number(simulated.makespan_ns / 1000)} µs, {share:+.1%}")
    largest = [one for one in differing[:_WAITS] if one.longer_ns]
    if not largest:
        return
    print("\nthe actions that differ most:")
    print_table(
        ["action", "rank", "measured µs", "simulated µs", "longer by µs", "started later by µs"],
        [
            [
                str(one.action),
                str(one.rank),
                *(number(ns / 1000) for ns in (one.measured_ns, one.simulated_ns, one.longer_ns, one.later_ns)),
            ]
            for one in largest
        ],
    )
