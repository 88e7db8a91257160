"""The verbs of trace: where the time of a profiled run went."""

from __future__ import annotations

import typer

from counterflow.cli.trace.overlap import overlap

app = typer.Typer(rich_markup_mode=None, help="Read profiler traces: where the time went.", no_args_is_help=True)
app.command()(overlap)


@app.callback()
def _trace() -> None:
    """Keeps each verb a verb of its own, however few there are."""
