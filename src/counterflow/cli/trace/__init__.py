"""The verbs of trace: where the time of a profiled run went."""

from __future__ import annotations

import typer

from counterflow.cli.trace.costs import costs
from counterflow.cli.trace.diff import diff
from counterflow.cli.trace.overlap import overlap
from counterflow.cli.trace.pipeline import pipeline
from counterflow.cli.trace.report import report

app = typer.Typer(rich_markup_mode=None)
app.command(short_help="Show how much communication compute hid.")(overlap)
app.command()(report)
app.command(short_help="Rebuild a pipeline's step, and who waited for whom.")(pipeline)
app.command(short_help="Read costs off traces, for simulate and compare.")(costs)
app.command(short_help="Compare two runs by phase and kernel.")(diff)


@app.callback(invoke_without_command=True)
def _trace(context: typer.Context) -> None:
    """Read profiler traces: where the time went."""
    if context.invoked_subcommand is None:
        print(context.get_help())
