"""Verbs that ask which schedule: schedule, check, simulate, compare, draw."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterflow.cli.output import about, counted, number, print_json, print_table, printable, spread, writing
from counterflow.errors import CounterflowError

if TYPE_CHECKING:
    from counterflow.schedule import Schedule
    from counterflow.simulator import Comparison, Costs
    from counterflow.timeline import Timeline

_SOURCE_HELP = "gpipe, 1f1b, zb1p, dualpipe or dualpipev; or a .json, .csv or .txt file."
Source = Annotated[str, typer.Argument(metavar="NAME|FILE", help=_SOURCE_HELP)]
Ranks = Annotated[int | None, typer.Option("--ranks", help="Number of ranks; a NAME needs it.")]
MicroBatches = Annotated[int | None, typer.Option("--microbatches", help="Number of micro-batches; a NAME needs it.")]
ForwardOnly = Annotated[bool, typer.Option("--forward-only", help="The forwards alone: what evaluation runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data with stable keys.")]
CostsFile = Annotated[Path | None, typer.Option("--costs", help="A costs.json, instead of the costs below.")]
Forward = Annotated[float | None, typer.Option("--forward-us", help="F  [default: 1]")]
Backward = Annotated[float | None, typer.Option("--backward-us", help="B  [default: twice F]")]
Weight = Annotated[float | None, typer.Option("--weight-us", help="W, the rest of B being I  [default: half of B]")]
Overlapped = Annotated[float | None, typer.Option("--overlapped-us", help="F&B  [default: F + B]")]
Latency = Annotated[float | None, typer.Option("--latency-us", help="Of every transfer  [default: 0]")]


def schedule(
    source: Source,
    ranks: Ranks = None,
    microbatches: MicroBatches = None,
    forward_only: ForwardOnly = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV as torch.distributed.pipelining reads it.")] = False,
    as_json: Json = False,
) -> None:
    """Print a schedule: a row for each rank.

    \b
    Example:
      counterflow schedule dualpipe --ranks 8 --microbatches 20 --csv > dualpipe.csv
    """
    from counterflow.schedule import to_csv, to_json, to_text

    if csv and as_json:
        raise CounterflowError("schedule got both --csv and --json; choose one")
    write = to_csv if csv else to_json if as_json else to_text
    print(write(_schedule(source, ranks, microbatches, forward_only)), end="")


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule in a .json, .csv or .txt file.")],
    as_json: Json = False,
) -> None:
    """Prove that the schedule in a file runs to its end.

    It is whole and in order, every send meets its receive, and no ranks wait for each other in a circle.

    \b
    Example:
      counterflow check dualpipe.csv
    """
    from counterflow.schedule import Post, check, read_schedule

    found = read_schedule(file)
    with about(file):
        programs = check(found).programs
    posts = (instruction for program in programs for instruction in program if isinstance(instruction, Post))
    transfers = sum(len(post.transfers) for post in posts) // 2  # each is posted at both of its ends
    actions = sum(map(len, found.rows))
    if as_json:
        print_json({"file": str(file), **_head(found), "actions": actions, "transfers": transfers, "runs": True})
    else:
        print(
            f"{printable(str(file))}: runs: {_sizes(found)}, "
            f"{counted(actions, 'action')}, {counted(transfers, 'transfer')}"
        )


def simulate(
    source: Source,
    ranks: Ranks = None,
    microbatches: MicroBatches = None,
    forward_only: ForwardOnly = False,
    costs: CostsFile = None,
    forward_us: Forward = None,
    backward_us: Backward = None,
    weight_us: Weight = None,
    overlapped_us: Overlapped = None,
    latency_us: Latency = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a Chrome trace, for Perfetto.")] = None,
    as_json: Json = False,
) -> None:
    """Tell how long a step takes and where ranks idle.

    \b
    Example:
      counterflow simulate dualpipe --ranks 8 --microbatches 20 --overlapped-us 2.4 -o timeline.json
    """
    from counterflow.simulator import simulate
    from counterflow.timeline import write_chrome

    chosen = _schedule(source, ranks, microbatches, forward_only)
    prices = _costs(costs, forward_us, backward_us, weight_us, overlapped_us, latency_us)
    with about(source):
        timeline = simulate(chosen, prices)
    if output is not None:
        with writing(output):
            write_chrome(timeline, output)
    figures = _figures(chosen, prices, timeline)
    if as_json:
        print_json({**figures, "timeline": None if output is None else str(output)})
        return
    _print_figures(chosen, figures)
    if output is not None:
        print(f"\nwrote {printable(str(output))}: open it at https://ui.perfetto.dev")


def compare(
    ranks: Annotated[int, typer.Option("--ranks", help="Number of ranks, and of stages.")],
    microbatches: Annotated[int, typer.Option("--microbatches", help="Number of micro-batches.")],
    costs: CostsFile = None,
    forward_us: Forward = None,
    backward_us: Backward = None,
    weight_us: Weight = None,
    overlapped_us: Overlapped = None,
    latency_us: Latency = None,
    as_json: Json = False,
) -> None:
    """Set the schedules for one model side by side.

    Each is simulated, and stands beside the bubble by its published formula.

    \b
    Example:
      counterflow compare --ranks 8 --microbatches 20 --overlapped-us 2.4
    """
    from counterflow.simulator import compare

    prices = _costs(costs, forward_us, backward_us, weight_us, overlapped_us, latency_us)
    comparison = compare(ranks, microbatches, prices)
    if not comparison.schedules:
        raise CounterflowError(next(iter(comparison.skipped.values())))
    if as_json:
        print_json(comparison.as_dict())
    else:
        _print_comparison(comparison)


def draw(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write: an .svg file.")],
    ranks: Ranks = None,
    microbatches: MicroBatches = None,
    forward_only: ForwardOnly = False,
    costs: CostsFile = None,
    forward_us: Forward = None,
    backward_us: Backward = None,
    weight_us: Weight = None,
    overlapped_us: Overlapped = None,
    latency_us: Latency = None,
    as_json: Json = False,
) -> None:
    """Draw a schedule in simulated time.

    \b
    Example:
      counterflow draw dualpipe --ranks 8 --microbatches 20 -o dualpipe.svg
    """
    from counterflow.files import write_text
    from counterflow.report import schedule_svg
    from counterflow.simulator import simulate

    if output.suffix != ".svg":
        raise CounterflowError(f"{output} ends in {output.suffix!r}; a schedule is drawn as .svg")
    chosen = _schedule(source, ranks, microbatches, forward_only)
    prices = _costs(costs, forward_us, backward_us, weight_us, overlapped_us, latency_us)
    with about(source):
        picture = schedule_svg(chosen, simulate(chosen, prices))
    with writing(output):
        write_text(output, picture)
    if as_json:
        print_json({"file": str(output), **_head(chosen)})
    else:
        print(f"wrote {printable(str(output))}: {_sizes(chosen)}")


# --- what they share ----------------------------------------------------------------------------------------


def _schedule(source: str, ranks: int | None, microbatches: int | None, forward_only: bool) -> Schedule:
    from counterflow.schedule import GENERATORS, generate, read_schedule

    if source in GENERATORS:
        if ranks is None or microbatches is None:
            raise CounterflowError(f"{source} needs its sizes; give --ranks and --microbatches")
        chosen = generate(source, ranks, microbatches)
    elif not os.path.exists(source):
        raise CounterflowError(
            f"{source!r} is neither a schedule nor a file; the schedules are {', '.join(GENERATORS)}"
        )
    elif ranks is not None or microbatches is not None:
        raise CounterflowError(f"{source} is a file and states its own sizes; leave out --ranks and --microbatches")
    else:
        chosen = read_schedule(source)
    return chosen.forward_only() if forward_only else chosen


def _costs(
    file: Path | None,
    forward_us: float | None,
    backward_us: float | None,
    weight_us: float | None,
    overlapped_us: float | None,
    latency_us: float | None,
) -> Costs:
    from counterflow.simulator import Costs, read_costs

    if file is not None:
        if any(us is not None for us in (forward_us, backward_us, weight_us, overlapped_us, latency_us)):
            raise CounterflowError(f"--costs {file} states every cost; leave out the single ones, or write them there")
        return read_costs(file)
    # What is not given scales with what is: F alone in real microseconds must not meet a B of 2.
    forward = 1.0 if forward_us is None else forward_us
    backward = 2 * forward if backward_us is None else backward_us
    weight = backward / 2 if weight_us is None else weight_us
    return Costs(forward, backward, None, weight, overlapped_us, latency_us or 0.0)


def _head(schedule: Schedule) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "mode": schedule.mode,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
    }


def _sizes(schedule: Schedule) -> str:
    sizes = (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
    return ", ".join(map(counted, sizes, ("rank", "stage", "micro-batch")))


def _figures(schedule: Schedule, costs: Costs, timeline: Timeline) -> dict[str, Any]:
    from counterflow.simulator import peak_activation_bytes, peak_activations

    busy_ns = timeline.busy_ns().tolist()
    busy_ns += [0] * (schedule.num_ranks - len(busy_ns))  # the last rows of a schedule may be empty
    peak_bytes = peak_activation_bytes(schedule, costs)
    return {
        **_head(schedule),
        "makespan_us": timeline.makespan_ns / 1000,
        "busy_us": [busy / 1000 for busy in busy_ns],
        "bubble_us": [(timeline.makespan_ns - busy) / 1000 for busy in busy_ns],
        "peak_activations": peak_activations(schedule),
        "peak_activation_bytes": peak_bytes if any(peak_bytes) else None,
    }


def _print_figures(schedule: Schedule, figures: dict[str, Any]) -> None:
    makespan_us = figures["makespan_us"]
    columns = {
        "rank": [str(rank) for rank in range(schedule.num_ranks)],
        "busy µs": [number(us) for us in figures["busy_us"]],
        "bubble µs": [number(us) for us in figures["bubble_us"]],
        "bubble %": [f"{100 * us / makespan_us if makespan_us else 0:.1f}" for us in figures["bubble_us"]],
        "peak activations": [str(count) for count in figures["peak_activations"]],
    }
    if figures["peak_activation_bytes"]:
        columns["peak MB"] = [number(size / 1e6) for size in figures["peak_activation_bytes"]]
    print(f"{printable(schedule.name)}: {_sizes(schedule)}; the step takes {number(makespan_us)} µs\n")
    print_table(list(columns), list(zip(*columns.values(), strict=True)))


def _print_comparison(comparison: Comparison) -> None:
    rows = [
        (
            row.name,
            str(row.num_ranks),
            number(row.makespan_us),
            spread(row.bubble_us),
            row.bubble_formula,
            "-" if row.bubble_formula_us is None else number(row.bubble_formula_us),
            {True: "yes", False: "no", None: "-"}[row.formula_exact],
            spread(row.peak_activations),
            counted(row.parameters_per_rank, "stage"),
        )
        for row in comparison.schedules
    ]
    headings = ("schedule", "ranks", "step µs", "bubble µs", "formula", "µs", "exact", "peak activations", "parameters")
    print_table(headings, rows)
    print("\nThe formula is the published one, for the rank with the largest bubble; S is the number of stages.")
    if any(row.num_ranks != row.num_stages for row in comparison.schedules):
        print("dualpipev runs the same number of stages on half as many devices, two on each.")
    for name, reason in comparison.skipped.items():
        print(f"{name} is left out: {reason}.")
