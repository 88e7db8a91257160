"""The verb compare: which schedule for one model and these costs, and how much hangs on a single cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from counterflow.cli.output import counted, number, print_json, print_table, printable, spread, writing
from counterflow.errors import CounterflowError

if TYPE_CHECKING:
    from counterflow.simulator import Comparison, Row, Sweep


class Over(StrEnum):
    """What a sweep varies."""

    LATENCY = "latency"
    OVERLAP = "overlap"


def compare(
    ranks: Annotated[int, typer.Option("--ranks", help="Number of ranks, and of the stages that costs are for.")],
    microbatches: Annotated[int, typer.Option("--microbatches", help="Number of micro-batches.")],
    costs: CostsFile = None,
    forward_us: Forward = None,
    backward_us: Backward = None,
    weight_us: Weight = None,
    overlapped_us: Overlapped = None,
    latency_us: Latency = None,
    first_stage_weight: FirstWeight = 1.0,
    last_stage_weight: LastWeight = 1.0,
    sweep: Annotated[
        Over | None, typer.Option("--sweep", help="How the steps change with the latency, or with the gain of F&B.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plot the sweep: an .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Set the schedules for one model side by side.

    Each is simulated, and stands beside the bubble by its published formula and beside a bound that no schedule
    can beat: first with as many stages for each, as published, then with as many devices.

    \b
    Example:
      counterflow compare --ranks 8 --microbatches 16 --overlapped-us 2.4
      counterflow compare --ranks 8 --microbatches 16 --sweep overlap -o overlap.svg
    """
    from counterflow import simulator

    prices = costs_of(costs, forward_us, backward_us, weight_us, overlapped_us, latency_us)
    if sweep is not None:
        swept = simulator.sweep(
            ranks,
            microbatches,
            prices,
            sweep.value,
            first_stage_weight=first_stage_weight,
            last_stage_weight=last_stage_weight,
        )
        _report_sweep(swept, f"{counted(ranks, 'device')}, {counted(microbatches, 'micro-batch')}", output, as_json)
        return
    if output is not None:
        raise CounterflowError(f"compare got -o {output} and nothing to plot; give --sweep latency or --sweep overlap")
    comparison = simulator.compare(
        ranks, microbatches, prices, first_stage_weight=first_stage_weight, last_stage_weight=last_stage_weight
    )
    if not comparison.schedules and not comparison.equal_devices:
        raise CounterflowError(next(iter(comparison.skipped.values())))
    if as_json:
        print_json(comparison.as_dict())
    else:
        _print_comparison(comparison, ranks)


# --- the two tables -----------------------------------------------------------------------------------------


def _print_comparison(comparison: Comparison, ranks: int) -> None:
    print(f"The published comparison, {counted(ranks, 'stage')} for each:\n")
    if comparison.schedules:
        _print_equal_stages(comparison.schedules)
    _print_skipped(comparison.skipped)
    print(f"\nThe same model on {counted(ranks, 'device')} for each:\n")
    if comparison.equal_devices:
        _print_equal_devices(comparison.equal_devices)
    _print_skipped(comparison.equal_devices_skipped)
    print("\n× bound: the step, as a multiple of one that no schedule beats with these costs on so many devices.")
    print("× own: as a multiple of one that no other order of the schedule's own actions beats.")


def _print_skipped(skipped: dict[str, str]) -> None:
    alike: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        alike.setdefault(reason.removeprefix(f"{name} "), []).append(name)
    for reason, names in alike.items():
        print(f"Left out: {', '.join(names)} {reason}.")


def _print_equal_stages(rows: Sequence[Row]) -> None:
    headings = ("schedule", "ranks", "step µs", "bubble µs", "formula", "µs", "exact", "activations", "parameters")
    print_table(
        (*headings, "× bound"),
        [
            (
                row.name,
                str(row.num_ranks),
                number(row.makespan_us),
                spread(row.bubble_us),
                row.bubble_formula or "-",
                "-" if row.bubble_formula_us is None else number(row.bubble_formula_us),
                {True: "yes", False: "no", None: "-"}[row.formula_exact],
                spread(row.peak_activations),
                counted(row.parameters_per_rank, "stage"),
                _times(row.makespan_us, row.bound_us),
            )
            for row in rows
        ],
    )
    print("\nThe formula is the published one, for the rank with the largest bubble; S is the number of stages, R of")
    print("ranks, and F, B, W and F&B are those of one stage.")
    for reason, names in _by_reason(rows):
        print(f"{names}: {reason}.")
    if half := [row.name for row in rows if row.num_ranks < row.num_stages]:
        print(f"On half as many devices, two stages on each: {', '.join(half)}.")


def _by_reason(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """For each reason why a formula is not exact, or is not there, the schedules."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.formula_reason is not None:
            names.setdefault(row.formula_reason, []).append(row.name)
    for reason, some in names.items():
        yield reason, ", ".join(some) if len(some) < len(rows) else "All"


def _print_equal_devices(rows: Sequence[Row]) -> None:
    headings = ("schedule", "stages", "parameters", "activations", "as shares", "step µs", "bubble µs")
    print_table(
        (*headings, "× bound", "× own"),
        [
            (
                row.label,
                _held(row),
                number(row.parameter_shares),
                spread(row.peak_activations),
                spread(row.activation_shares),
                number(row.makespan_us),
                spread(row.bubble_us),
                _times(row.makespan_us, row.bound_us),
                _times(row.makespan_us, row.own_bound_us),
            )
            for row in rows
        ],
    )
    print("\nParameters, and activations as shares, are in units of a device's even share of the model.")
    print(f"The shortest step: {_shortest(rows)}.")
    once = [row for row in rows if row.parameter_shares == 1]
    if once and _shortest(once) != _shortest(rows):
        print(f"Of those that hold every parameter once: {_shortest(once)}.")
    for usual in (row for row in rows if row.name == "1f1b"):
        most = max(usual.activation_shares)
        lean = [row for row in once if max(row.activation_shares) <= most]
        print(f"Of those within 1f1b's memory, {number(most)} activations: {_shortest(lean)}.")


def _shortest(rows: Sequence[Row]) -> str:
    least = min(row.makespan_us for row in rows)
    return f"{', '.join(row.label for row in rows if row.makespan_us == least)}, {number(least)} µs"


def _held(row: Row) -> str:
    """How many stages a device holds, and which part of a share each of them is."""
    pieces = row.num_stages // row.num_ranks
    return str(row.parameters_per_rank) if pieces == 1 else f"{row.parameters_per_rank} of 1/{pieces}"


def _times(step_us: float, bound_us: float) -> str:
    return f"{step_us / bound_us:.3f}" if bound_us else "-"


# --- a sweep ------------------------------------------------------------------------------------------------


def _report_sweep(sweep: Sweep, sizes: str, output: Path | None, as_json: bool) -> None:
    if output is not None:
        _plot(sweep, sizes, output)
    if as_json:
        print_json({**sweep.as_dict(), "plot": None if output is None else str(output)})
        return
    print(f"Step in µs on {sizes}, by the {_AXES[sweep.over]} in µs:\n")
    rows = [
        (name, *(_short(us) + ("*" if best == name else " ") for us, best in zip(steps, sweep.best, strict=True)))
        for name, steps in sweep.makespan_us.items()
    ]
    print_table(("schedule", *(f"{number(value)} " for value in sweep.values_us)), rows)
    print(f"\n* {_runs(sweep)}")
    _print_skipped(sweep.skipped)
    if output is not None:
        print(f"wrote {printable(str(output))}")


_AXES = {"latency": "latency of a transfer", "overlap": "duration of an F&B"}


def _short(us: float) -> str:
    """To five digits, so that a row of them stays on its line."""
    return number(float(f"{us:.5g}"))


def _runs(sweep: Sweep) -> str:
    """Where which schedule is the best, and so where that changes."""
    told = [
        f"{name} {'at' if first == last else f'from {number(first)} to'} {number(last)} µs"
        for name, first, last in sweep.runs()
    ]
    return f"The shortest step: {', '.join(told)}."


def _plot(sweep: Sweep, sizes: str, output: Path) -> None:
    from counterflow.files import write_text
    from counterflow.report.plot import line_plot

    if output.suffix != ".svg":
        raise CounterflowError(f"{output} ends in {output.suffix!r}; a sweep is plotted as .svg")
    title = f"Step by {_AXES[sweep.over]}: {sizes}"
    picture = line_plot(title, f"{_AXES[sweep.over]} (µs)", "step (µs)", sweep.values_us, sweep.makespan_us)
    with writing(output):
        write_text(output, picture)
