"""The command line: every verb is a thin face on the rooms, which it imports when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from counterflow import __version__
from counterflow.cli import schedules, trace
from counterflow.cli.compare import compare
from counterflow.cli.demo import demo
from counterflow.cli.draw import draw
from counterflow.cli.experts import balance
from counterflow.cli.output import printable
from counterflow.cli.replay import replay
from counterflow.errors import CounterflowError, LaunchError

# Without markup, help is the same in a pipe as on a terminal, and needs no import of rich.
app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(schedules.schedule)
app.command()(schedules.check)
app.command()(schedules.simulate)
app.command()(compare)
app.command()(draw)
app.command(short_help="Place experts so that all GPUs have as much to do.")(balance)
app.command(short_help="Serve recorded steps again under one policy or another.")(replay)
app.command()(demo)
app.add_typer(trace.app, name="trace")

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports only this child of it


@app.callback(invoke_without_command=True)
def _counterflow(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Plan, run and measure pipeline schedules for large Mixture-of-Experts models.

    \b
    Example:
      counterflow compare --ranks 8 --microbatches 20
    """
    if version:
        print(f"counterflow {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb, and return the exit code.

    It is 2 for bad input, which one sentence on stderr tells, and 1 when ranks that it started failed.

    Example:
        >>> from counterflow.cli import main
        >>> main(["schedule", "1f1b", "--ranks", "2", "--microbatches", "2"])
        0F0 0F1 0B0 0B1
        1F0 1B0 1F1 1B1
        0
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every encoding has a µ
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="counterflow", standalone_mode=False)
        sys.stdout.flush()
    except LaunchError as error:
        print("\n".join(f"counterflow: {printable(line)}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    except CounterflowError as error:
        return _refuse(str(error), getattr(error, "__notes__", ()))
    except _USAGE_ERROR as error:
        return _refuse(_usage(error))
    except (KeyboardInterrupt, typer.Abort):  # what typer makes of Ctrl-C depends on its version
        return 130
    except OSError as error:
        # Nobody takes the output; the interpreter flushes once more at its end and must not complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else _refuse(f"the output cannot be written: {error.strerror}")
    return code if isinstance(code, int) else 0


def _refuse(sentence: str, notes: Sequence[str] = ()) -> int:
    print(f"counterflow: {printable(sentence)}", file=sys.stderr)
    for line in (line for note in notes for line in note.splitlines()):
        print("  " + "".join(c if c.isprintable() else " " for c in line), file=sys.stderr)
    return 2


def _given(error: Any) -> str:
    """What cannot be read, which newer versions of typer leave out of their sentence."""
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    return repr(found[0]["input"]) if found else ""


def _usage(error: Any) -> str:
    sentence = error.format_message().rstrip(".")
    given = _given(error)
    if given not in sentence:
        sentence += f": it got {given}"
    return f"{sentence}; see {error.ctx.command_path} --help" if error.ctx else sentence
