"""The verb trace report: one page to look at where the time of a profiled run went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from counterflow.cli.options import Json
from counterflow.cli.output import counted, print_json, printable, writing
from counterflow.cli.trace.options import RulesFile, Within
from counterflow.cli.trace.progress import reading, warn_of, warnings_of
from counterflow.errors import CounterflowError, TraceError


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Traces or timelines, or one folder of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write, an .html.")],
    within: Within = None,
    rules: RulesFile = None,
    as_json: Json = False,
) -> None:
    """Write one page that shows where the time went.

    Lanes to zoom and search, the communication that no compute hid in red, and tables. The page needs no network and
    nothing beside it: open it in any browser, or send it on.

    \b
    Example:
      counterflow trace report rank0.json.gz rank1.json.gz -o page.html
    """
    from counterflow.files import write_text
    from counterflow.report import trace_page
    from counterflow.trace import Rules, open_traces

    if output.suffix not in (".html", ".htm"):
        raise CounterflowError(f"{output} ends in {output.suffix!r}; a report is a page: give an .html")
    chosen = Rules.read(rules) if rules is not None else None
    with reading(files) as progress:
        traces = open_traces(files[0] if len(files) == 1 else files, progress=progress)
    page = trace_page(traces, chosen, within)
    if not page.num_gpus:
        raise TraceError(f"{files[0]}: there is no GPU work to draw; give a trace that has some")
    warn_of(traces)
    with writing(output, files):
        write_text(output, page.html)
    if as_json:
        drawn = {
            "gpus": page.num_gpus,
            "slices": page.num_slices,
            "left_out": page.num_left_out,
            "warnings": warnings_of(traces),
        }
        print_json({"file": str(output), **drawn})
        return
    gpus = counted(page.num_gpus, "rank" if page.is_timeline else "GPU")
    slices = f"{page.num_slices:,} slice" + ("" if page.num_slices == 1 else "s")
    left_out = f", {page.num_left_out:,} left out" if page.num_left_out else ""
    print(f"wrote {printable(str(output))}: {gpus}, {slices}{left_out}: open it in a browser")
