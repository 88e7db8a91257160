"""The columns of a file: by the block scan where it fits, on several processes where it is large, else in full."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_all_start_methods, get_context

from counterflow.errors import TraceError
from counterflow.trace.collector import Collector
from counterflow.trace.columns import Columns, Joiner
from counterflow.trace.scan import Opening, Scan, Unlike
from counterflow.trace.source import BLOCK, Source, is_packed, opened
from counterflow.trace.whole import Head, read_whole, recover_events

PARALLEL_FROM = 48 << 20
"""A plain file of so many bytes is worth starting processes for."""

STRETCH = 16 << 20
"""So many bytes of a large file are one task."""

LONGEST_HEAD = 4 << 20
"""The first slice stands in so many bytes, or the file is not scanned."""

Progress = Callable[[int, int], None]
"""Is told, now and then, how many bytes of how many have been read."""


def read_columns(file: str | os.PathLike[str], progress: Progress | None) -> tuple[Columns, Head, list[str]]:
    """What a file holds: its events in columns, what stands beside them, and sentences about what went wrong.

    Raises:
        TraceError: the file cannot be read, or holds no trace.
    """
    packed = is_packed(file)
    total = os.stat(file).st_size
    taken = _Taken(progress, total)
    found = None if packed or total < PARALLEL_FROM or not may_fork() else _by_processes(file, total, taken)
    warnings: list[str] = []
    if found is None:
        source = Source(file, taken.add)
        found = _by_blocks(source)
        if found is None:
            source = Source(file)
            found = _in_full(source)
        warnings += source.warnings
    taken.done()
    return *found, warnings


class _Taken:
    """Adds up what has been read, and tells."""

    def __init__(self, tell: Progress | None, total: int) -> None:
        self._tell, self._total, self._bytes = tell, total, 0

    def add(self, size: int) -> None:
        self._bytes = min(self._bytes + size, self._total)
        if self._tell:
            self._tell(self._bytes, self._total)

    def done(self) -> None:
        self.add(self._total)


def _by_blocks(source: Source) -> tuple[Columns, Head] | None:
    """What the block scan finds, or None where it does not fit."""
    collector = Collector()
    blocks = source.blocks()
    beginning = b""
    known = None
    for block in blocks:
        beginning += block
        known = Opening.of(beginning)
        if known is not None or len(beginning) >= LONGEST_HEAD:
            break
    if known is None:
        return None
    opening, before = known
    scan = Scan(opening, collector)
    try:
        scan.feed(beginning)
        for block in blocks:
            scan.feed(block)
    except Unlike:
        return None
    return _rest(scan.tail, collector, before)


def _rest(tail: bytes, collector: Collector, before: bytes) -> tuple[Columns, Head]:
    """What was collected, with the last slice, and what stands beside the events."""
    head = recover_events(tail, collector)
    head.precede(before)
    return collector.columns(), head


def _in_full(source: Source) -> tuple[Columns, Head]:
    text = b"".join(source.blocks())
    if not text and source.warnings:
        raise TraceError(f"{source.warnings[0]}, and that is nothing; give a trace as the PyTorch profiler writes it")
    collector = Collector()
    head = read_whole(text, collector)
    return collector.columns(), head


def may_fork() -> bool:
    """Forking a process with threads may hang, and other ways to start one run the caller's script again."""
    return "fork" in get_all_start_methods() and threading.active_count() == 1


def pool_of(most: int) -> AbstractContextManager[Executor]:
    """As many processes as there are cores, and no more than ``most``."""
    return ProcessPoolExecutor(min(most, os.cpu_count() or 1), mp_context=get_context("fork"))


def _by_processes(path: str | os.PathLike[str], total: int, taken: _Taken) -> tuple[Columns, Head] | None:
    """As ``_by_blocks``, each process taking stretches of the file."""
    known = Opening.of(_beginning(path))
    if known is None:
        return None
    opening, before = known
    begins = range(0, total, STRETCH)
    tasks = [(os.fspath(path), opening.text, begin, begin + STRETCH < total) for begin in begins]
    joiner, tail = Joiner(), b""
    try:
        with pool_of(len(tasks)) as pool:
            futures = deque(pool.submit(_stretch, *task) for task in tasks)
            try:
                while futures:  # each result is let go once it is taken
                    columns, left = futures.popleft().result()
                    joiner.add(columns)
                    tail = left or tail
                    taken.add(STRETCH)
            finally:
                pool.shutdown(cancel_futures=True)
    except (Unlike, BrokenExecutor, OSError):  # also where no process can be started, or one is killed
        return None
    last, head = _rest(tail, Collector(), before)
    joiner.add(last)
    return joiner.columns(), head


def _beginning(path: str | os.PathLike[str]) -> bytes:
    with opened(path) as file:
        beginning: bytes = file.read(LONGEST_HEAD)
    return beginning


def _stretch(path: str, opening: bytes, begin: int, bounded: bool) -> tuple[Columns, bytes]:
    """The slices that begin in one stretch; and, where the file ends in it, what the last one leaves."""
    collector = Collector()
    scan = Scan(Opening(opening), collector, length=STRETCH if bounded else None, within=begin > 0)
    with opened(path) as file:
        file.seek(begin)
        while not scan.ended and (block := file.read(BLOCK)):
            scan.feed(block)
    return collector.columns(), b"" if scan.ended or not scan.begun else scan.tail
