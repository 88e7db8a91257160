"""How far the reading of large traces has come, and what could not be read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from counterflow.cli.output import warn

if TYPE_CHECKING:
    from counterflow.trace import Trace

_LONG_BYTES = 32 << 20


@contextmanager
def reading(files: list[Path]) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, for files that take a while; nothing in a pipe."""
    large = any(file.is_file() and os.stat(file).st_size >= _LONG_BYTES for file in files)
    if not large or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Without its own thread: reading forks, which a process with threads must not do.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("reading")

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            bar.refresh()

        yield tell


def warnings_of(traces: Sequence[Trace]) -> list[str]:
    """What the reader says of each file; that a trace of a CPU holds no GPU work is no fault of it."""
    return [f"{trace.file}: {text}" for trace in traces for text in trace.warnings if "holds no GPU work" not in text]


def warn_of(traces: Sequence[Trace]) -> None:
    """On standard error."""
    for warning in warnings_of(traces):
        warn(warning)
