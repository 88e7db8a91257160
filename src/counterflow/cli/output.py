"""How verbs hand out their results: sentences that steer no terminal, tables that a pipe takes whole, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from counterflow.errors import CounterflowError


def printable(text: str) -> str:
    """``text`` on one line and without control characters, wherever it came from.

    Example:
        >>> printable("two\\nlines, one \\x1b[31mred")
        'two lines, one [31mred'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def short(text: str) -> str:
    """A name that may be anybody's, as it fits into a table: printable, and no longer than 60 letters.

    Example:
        >>> short("mlp(F)"), short("void " + "a" * 30 + "b" * 30)
        ('mlp(F)', 'void aaaaaaaaaaaaaaaaaaaaaaa…abbbbbbbbbbbbbbbbbbbbbbbbbbbbbb')
    """
    text = printable(text)
    return text if len(text) <= 60 else text[:28] + "…" + text[-31:]


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Names to the left, numbers to the right, under their headings; plain and never cut in a pipe.

    Example:
        >>> print_table(["rank", "busy µs"], [["0", "60"], ["1", "7.5"]])
        rank  busy µs
        0          60
        1         7.5
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # However narrow the terminal is, a line that runs over reads better than folded cells.
    console = Console(markup=False, highlight=False, emoji=False, width=1_000)
    heads = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=heads, padding=(0, 0, 0, 2), pad_edge=False, show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def counted(number: int, what: str) -> str:
    """``1 rank`` or ``8 ranks``.

    Example:
        >>> counted(1, "stage"), counted(20, "micro-batch")
        ('1 stage', '20 micro-batches')
    """
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number} {what}{ending}"


def spread(values: Sequence[float]) -> str:
    """The least and the largest value, or the one that all share.

    Example:
        >>> spread([6.0, 6.0]), spread([18, 21.5])
        ('6', '18 to 21.5')
    """
    least, most = number(min(values)), number(max(values))
    return most if least == most else f"{least} to {most}"


def number(value: float) -> str:
    """To three decimals, which for microseconds is exact, and without a tail of zeros.

    Example:
        >>> number(66.0), number(1234567.125)
        ('66', '1234567.125')
    """
    return f"{value:.3f}".rstrip("0").rstrip(".")


def warn(text: str) -> None:
    """A sentence beside the result: on standard error, so that a pipe does not take it for data."""
    print(f"counterflow: warning: {printable(text)}", file=sys.stderr)


def print_json(data: object) -> None:
    """Plain data on one line."""
    print(json.dumps(data))


@contextmanager
def about(what: object) -> Iterator[None]:
    """An error inside it says first that it is about ``what``, for the rooms below know no files.

    Raises:
        CounterflowError: the error, with that in front.
    """
    try:
        yield
    except CounterflowError as error:
        longer = CounterflowError(f"{what}: {error}")
        for note in getattr(error, "__notes__", ()):
            longer.add_note(note)
        raise longer from None


def refuse_loss(path: Path, inputs: Iterable[Path]) -> None:
    """What was read is not written over.

    Raises:
        CounterflowError: ``path`` is one of the ``inputs``.
    """
    if path.exists() and any(one.exists() and path.samefile(one) for one in inputs):
        raise CounterflowError(f"{path} is what was read, and would be lost; write to another file")


@contextmanager
def writing(path: Path, inputs: Iterable[Path] = ()) -> Iterator[None]:
    """A failure to write ``path`` inside it is bad input, not a crash; none of the ``inputs`` is written over.

    Raises:
        CounterflowError: naming the path and what the system said.
    """
    refuse_loss(path, inputs)
    try:
        yield
    except OSError as error:
        raise CounterflowError(
            f"{path} cannot be written ({error.strerror}); give a file in a folder that you may write to"
        ) from None
