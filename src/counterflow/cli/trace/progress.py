"""How far the reading of large traces has come."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
