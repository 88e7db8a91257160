"""The verb trace diff: two runs side by side, by phase and kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterflow.cli.output import counted, number, print_json, print_table, printable, short, warn
from counterflow.cli.trace.options import RulesFile
from counterflow.cli.trace.progress import reading

if TYPE_CHECKING:
    from counterflow.trace.diff import Change, Difference, Pair, Run

_ROWS = 12
_TOTALS = {
    "window": "window_us",
    "compute": "compute_us",
    "communication": "communication_us",
    "  hidden under compute": "overlapped_us",
    "  exposed": "exposed_us",
    "  waiting for peers": "waiting_us",
    "other": "other_us",
    "idle": "idle_us",
}
_VIEWS = {"kernels": ("kernel", "kind"), "phases": ("phase",), "classes": ("kind",), "streams": ("stream",)}


def diff(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A trace, a folder with the traces of all ranks, or - for a pipe.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same of the run to compare with it.")],
    rules: RulesFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare two runs by phase and kernel: what takes longer in B than in A, and what less.

    Figures are means over the GPUs of each run and, where the runs hold different numbers of profiler steps, of one
    step. What changed most comes first.

    \b
    Example:
      counterflow trace diff before.json.gz after.json.gz
      counterflow trace diff monday/ tuesday/ --json
    """
    from counterflow.trace import Rules, difference, open_traces

    chosen = Rules.read(rules) if rules is not None else None
    with reading([a, b]) as progress:
        traces = [open_traces(path, progress=progress) for path in (a, b)]
    for trace in [*traces[0], *traces[1]]:
        for warning in trace.warnings:
            warn(f"{trace.file}: {warning}")
    found = difference(traces[0], traces[1], chosen)
    if as_json:
        warnings = [[warning for trace in side for warning in trace.warnings] for side in traces]
        print_json(_entry(found, warnings))
    else:
        _show(found)


def _entry(found: Difference, warnings: list[list[str]]) -> dict[str, Any]:
    from counterflow.trace.diff import TOTALS

    return {
        **{
            name: {"files": list(run.files), "gpus": run.gpus, "steps": run.steps, "warnings": told}
            for name, run, told in zip("ab", (found.a, found.b), warnings, strict=True)
        },
        "per_step": found.per_step,
        "totals": {
            name: pair._asdict() | {"difference": pair.difference, "ratio": pair.ratio}
            for name, pair in ((name, found.totals[name]) for name in TOTALS)
        },
        **{view: [_row(change, columns) for change in found.by(*columns)] for view, columns in _VIEWS.items()},
        "changes": [_row(change, ("phase", "kind", "kernel", "stream")) for change in found.changes],
    }


def _row(change: Change, columns: Sequence[str]) -> dict[str, Any]:
    figures = zip("ab", change.count, change.total_us, change.mean_us, strict=True)
    return {
        **{name: getattr(change, name) for name in columns},
        **{side: {"count": count, "total_us": us, "mean_us": mean} for side, count, us, mean in figures},
        "difference_us": change.total_us.difference,
        "ratio": change.total_us.ratio,
        "only_in": change.only_in or None,
    }


# --- for people ----------------------------------------------------------------------------------------------


def _show(found: Difference) -> None:
    for name, run in (("A", found.a), ("B", found.b)):
        print(f"{name}: {_about(run)}")
    of = "the mean of the GPUs" if max(found.a.gpus, found.b.gpus) > 1 else "of one GPU"
    print(f"µs are {of}{', for each step' if found.per_step else ''}\n")
    print_table(
        ["", "A µs", "B µs", "B - A", "B / A"],
        [[name, *_figures(found.totals[key])] for name, key in _TOTALS.items()],
    )
    for columns in (("kernel", "kind"), ("phase",), ("stream",)):
        _show_changes(columns, found.by(*columns))


def _about(run: Run) -> str:
    files = printable(run.files[0]) + (f" and {len(run.files) - 1} more" if len(run.files) > 1 else "")
    steps = "" if run.steps is None else f", {counted(run.steps, 'step')}"
    return f"{files}: {counted(run.gpus, 'GPU')}{steps}"


def _show_changes(columns: tuple[str, ...], changes: list[Change]) -> None:
    if [change.phase for change in changes] == [""]:  # no phase is told in either run
        return
    headings = ["is" if name == "kind" else name for name in columns]
    print()
    print_table(
        [*headings, "calls A", "calls B", "A µs", "B µs", "B - A", "B / A", "each A µs", "each B µs"],
        [
            [
                *(short(str(getattr(change, name)) or "outside all") for name in columns),
                *(number(count) for count in change.count),
                *_figures(change.total_us),
                *(number(us) if count else "" for us, count in zip(change.mean_us, change.count, strict=True)),
            ]
            for change in changes[:_ROWS]
        ],
    )
    if len(changes) > _ROWS:
        print(f"and {len(changes) - _ROWS} more, which changed less")


def _figures(pair: Pair) -> list[str]:
    ratio = "" if pair.ratio is None else f"{pair.ratio:.3f}"
    only = "only in B" if pair.b and not pair.a else "only in A" if pair.a and not pair.b else ratio
    return [number(pair.a), number(pair.b), f"{'+' if pair.difference > 0 else ''}{number(pair.difference)}", only]
