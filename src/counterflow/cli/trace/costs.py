"""The verb trace costs: what the simulator reads, out of traces."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from counterflow.cli.options import Json
from counterflow.cli.output import number, print_json, print_table, printable, writing
from counterflow.cli.trace.options import RulesFile
from counterflow.cli.trace.progress import reading, warn_of, warnings_of

ScheduleFile = Annotated[
    Path | None, typer.Option("--schedule", help="The schedule that ran, where one trace has all ranks.")
]


def costs(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Traces, one for each rank, or one folder.")],
    schedule: ScheduleFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a costs.json.")] = None,
    rules: RulesFile = None,
    as_json: Json = False,
) -> None:
    """Read off traces what actions cost, for simulate and compare.

    Reads what counterflow's executor and torch's pipeline runtime name; else the phases of one chunk, annotated as
    attn(F), mlp(B), mlp(W).

    \b
    Example:
      counterflow trace costs rank0.json rank1.json -o costs.json
      counterflow compare --ranks 2 --microbatches 8 --costs costs.json
    """
    from counterflow.schedule import read_schedule
    from counterflow.simulator import write_costs
    from counterflow.trace import Rules, open_traces, trace_costs

    ran = None if schedule is None else read_schedule(schedule)
    own = None if rules is None else Rules.read(rules)
    with reading(files) as progress:
        traces = open_traces(files[0] if len(files) == 1 else files, progress=progress)
    found = trace_costs(traces, ran, own)
    warn_of(traces)
    if output is not None:
        with writing(output, files):
            write_costs(found.costs, output)
    fields = asdict(found.costs)
    if as_json:
        print_json(
            {"costs": fields, "source": found.source, "not_told": list(found.not_told), "warnings": warnings_of(traces)}
        )
        return
    print(f"from {printable(found.source)}\n")
    print_table(
        ["", "µs, for each stage"], [[_LABELS[name], _stages(fields[name])] for name in _LABELS if fields[name]]
    )
    if any(sizes := fields["transfer_bytes"] if isinstance(fields["transfer_bytes"], tuple) else ()):
        print(f"bytes of a message, behind each stage: {_stages(sizes)}")
    print("\nnot told:")
    for line in found.not_told:
        print(f"  {printable(line)}")
    if output is not None:
        print(f"\nwrote {printable(str(output))}")


_LABELS = {
    "forward_us": "F",
    "backward_us": "B",
    "input_us": "I",
    "weight_us": "W",
    "overlapped_us": "F&B",
    "twins_us": "sum over twins",
    "latency_us": "latency",
}


def _stages(value: float | tuple[float | None, ...]) -> str:
    if not isinstance(value, tuple):
        return number(value)
    return ", ".join("none" if one is None else number(one) for one in value)
