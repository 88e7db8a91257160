"""Verbs that ask which schedule: schedule, check, simulate."""

from __future__ import annotations

import os
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from counterflow.cli.options import (
    Backward,
    CostsFile,
    FirstWeight,
    Forward,
    Json,
    LastWeight,
    Latency,
    Overlapped,
    Weight,
    costs_of,
)
from counterflow.cli.output import about, counted, number, print_json, print_table, printable, writing
from counterflow.errors import CounterflowError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from counterflow.schedule import Channels, Schedule
    from counterflow.simulator import Costs
    from counterflow.timeline import Timeline

_SOURCE_HELP = (
    "gpipe, 1f1b, interleaved-1f1b, interleaved-1f1b-overlap, zb1p, zb2p, zbv, v-half, v-min, dualpipe or dualpipev; "
    "or a .json, .csv or .txt file."
)
Source = Annotated[str, typer.Argument(metavar="NAME|FILE", help=_SOURCE_HELP)]
Ranks = Annotated[int | None, typer.Option("--ranks", help="Number of ranks; a NAME needs it.")]
MicroBatches = Annotated[int | None, typer.Option("--microbatches", help="Number of micro-batches; a NAME needs it.")]
Chunks = Annotated[int | None, typer.Option("--chunks", help="Stages on each rank, if interleaved  [default: 2]")]
ForwardOnly = Annotated[bool, typer.Option("--forward-only", help="The forwards alone: what evaluation runs.")]


def schedule(
    source: Source,
    ranks: Ranks = None,
    microbatches: MicroBatches = None,
    chunks: Chunks = None,
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
    print(write(schedule_of(source, ranks, microbatches, chunks, forward_only)), end="")


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule in a .json, .csv or .txt file.")],
    channels: Annotated[
        str, typer.Option("--channels", help="What sends and receives do: rendezvous, buffered, nccl or nccl-pair.")
    ] = "rendezvous",
    most_activations: Annotated[
        int | None, typer.Option("--most-activations", help="Refuse a rank that would hold more at once.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that the schedule in a file runs to its end.

    It is whole and in order, every send meets its receive, and no ranks wait for each other in a circle: over
    channels as counterflow's runtime has them (rendezvous), over buffered ones, or when NCCL queues all messages
    of a communicator, which all ranks share (nccl) or each pair of them (nccl-pair).

    \b
    Example:
      counterflow check dualpipe.csv --most-activations 9
    """
    from counterflow.schedule import check, read_schedule

    found = read_schedule(file)
    with about(file):
        transfers = check(found, cast("Channels", channels), most_activations).columns.num_transfers
    actions = found.rows.num_actions
    if as_json:
        sizes = {"actions": actions, "transfers": transfers, "channels": channels}
        print_json({"file": str(file), **head_of(found), **sizes, "runs": True})
    else:
        print(
            f"{printable(str(file))}: runs: {sizes_of(found)}, "
            f"{counted(actions, 'action')}, {counted(transfers, 'transfer')}"
        )


def simulate(
    source: Source,
    ranks: Ranks = None,
    microbatches: MicroBatches = None,
    chunks: Chunks = None,
    forward_only: ForwardOnly = False,
    costs: CostsFile = None,
    forward_us: Forward = None,
    backward_us: Backward = None,
    weight_us: Weight = None,
    overlapped_us: Overlapped = None,
    latency_us: Latency = None,
    first_stage_weight: FirstWeight = 1.0,
    last_stage_weight: LastWeight = 1.0,
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

    chosen = schedule_of(source, ranks, microbatches, chunks, forward_only)
    prices = costs_of(costs, forward_us, backward_us, weight_us, overlapped_us, latency_us)
    with about(source):
        prices = prices.cut(chosen.num_stages, chosen.num_stages, first_stage_weight, last_stage_weight)
        timeline = simulate(chosen, prices)
    if output is not None:
        with writing(output, [Path(source), *([] if costs is None else [costs])]):
            write_chrome(timeline, output)
    figures = _figures(chosen, prices, timeline)
    if as_json:
        print_json({**figures, "timeline": None if output is None else str(output)})
        return
    _print_figures(chosen, figures)
    if output is not None:
        print(f"\nwrote {printable(str(output))}: open it at https://ui.perfetto.dev")


# --- what they share ----------------------------------------------------------------------------------------


def schedule_of(
    source: str, ranks: int | None, microbatches: int | None, chunks: int | None, forward_only: bool
) -> Schedule:
    """The schedule of a name and its sizes, or the one in a file.

    Raises:
        CounterflowError: neither, or sizes that are missing or too many.
    """
    from counterflow.schedule import GENERATORS, generate, read_schedule

    if source in GENERATORS:
        if ranks is None or microbatches is None:
            raise CounterflowError(f"{source} needs its sizes; give --ranks and --microbatches")
        chosen = generate(source, ranks, microbatches, chunks)
    elif not os.path.exists(source):
        raise CounterflowError(
            f"{source!r} is neither a schedule nor a file; the schedules are {', '.join(GENERATORS)}"
        )
    elif (ranks, microbatches, chunks) != (None, None, None):
        raise CounterflowError(
            f"{source} is a file and states its own sizes; leave out --ranks, --microbatches and --chunks"
        )
    else:
        chosen = read_schedule(source)
    return chosen.forward_only() if forward_only else chosen


def head_of(schedule: Schedule) -> dict[str, Any]:
    """Name and sizes, with stable keys."""
    return {
        "name": schedule.name,
        "mode": schedule.mode,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
    }


def sizes_of(schedule: Schedule) -> str:
    """``8 ranks, 8 stages, 20 micro-batches``, and that it has forwards alone."""
    numbers = (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
    sizes = [*map(counted, numbers, ("rank", "stage", "micro-batch"))]
    return ", ".join([*sizes, "forward only"] if schedule.mode == "forward" else sizes)


def _figures(schedule: Schedule, costs: Costs, timeline: Timeline) -> dict[str, Any]:
    from counterflow.simulator import bubble_phases, critical_path, peak_activation_bytes, peak_activations
    from counterflow.timeline import TWINS

    phases, path = bubble_phases(timeline), critical_path(schedule, costs)
    peak_bytes = peak_activation_bytes(schedule, costs)

    def us(ns: npt.NDArray[np.int64], of_an_idle_rank: int = 0) -> list[float]:
        # The last rows of a schedule may be empty; the timeline does not know of them.
        idle = [of_an_idle_rank] * (schedule.num_ranks - len(ns))
        return [one / 1000 for one in [*ns.tolist(), *idle]]

    busy_ns, bubble_ns = timeline.busy_ns(), timeline.bubble_ns()
    step_ns = int(busy_ns[0] + bubble_ns[0])
    return {
        **head_of(schedule),
        "makespan_us": timeline.makespan_ns / 1000,
        "busy_us": us(busy_ns),
        "bubble_us": us(bubble_ns, step_ns),
        "warm_up_us": us(phases.warm_up_ns),
        "steady_us": us(phases.steady_ns, step_ns),
        "cool_down_us": us(phases.cool_down_ns),
        "twins_us": us(timeline.busy_ns(TWINS)),
        "peak_activations": peak_activations(schedule),
        "peak_activation_bytes": peak_bytes if any(peak_bytes) else None,
        "critical_path": [
            {"rank": span.rank, "action": span.name, "start_us": span.start_ns / 1000, "end_us": span.end_ns / 1000}
            for span in path.spans
        ],
        "slack_us": [[ns / 1000 for ns in row] for row in path.slack_ns],
    }


def _print_figures(schedule: Schedule, figures: dict[str, Any]) -> None:
    makespan_us = figures["makespan_us"]
    columns = {
        "rank": [str(rank) for rank in range(schedule.num_ranks)],
        "busy µs": [number(us) for us in figures["busy_us"]],
        "bubble µs": [number(us) for us in figures["bubble_us"]],
        "bubble %": [f"{100 * us / makespan_us if makespan_us else 0:.1f}" for us in figures["bubble_us"]],
        "warm-up": [number(us) for us in figures["warm_up_us"]],
        "steady": [number(us) for us in figures["steady_us"]],
        "cool-down": [number(us) for us in figures["cool_down_us"]],
        "peak activations": [str(count) for count in figures["peak_activations"]],
    }
    if any(figures["twins_us"]):
        columns["twins µs"] = [number(us) for us in figures["twins_us"]]
    if figures["peak_activation_bytes"]:
        columns["peak MB"] = [number(size / 1e6) for size in figures["peak_activation_bytes"]]
    print(f"{printable(schedule.name)}: {sizes_of(schedule)}; the step takes {number(makespan_us)} µs\n")
    print_table(list(columns), list(zip(*columns.values(), strict=True)))
    print(f"\ncritical path: {_chain(figures['critical_path'])}")


def _chain(path: list[dict[str, Any]]) -> str:
    """The actions that the step hangs on, rank after rank; the middle is left out where it is long."""
    stretches = []
    for rank, spans in groupby(path, key=itemgetter("rank")):
        actions = [span["action"] for span in spans]
        shown = actions if len(actions) < 7 else [*actions[:3], "…", *actions[-2:]]
        stretches.append(f"rank {rank} {' '.join(shown)}")
    return " → ".join(stretches if len(stretches) < 13 else [*stretches[:6], "…", *stretches[-5:]])
