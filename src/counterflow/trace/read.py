"""Open traces: by the block scan where it fits, on several processes where the file is large, else in full."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.errors import TraceError
from counterflow.trace.columns import Annotations, Columns, GpuWork, Ints, Joiner, Launches
from counterflow.trace.cover import blocks
from counterflow.trace.events import Collector
from counterflow.trace.scan import Opening, Scan, Unlike
from counterflow.trace.source import BLOCK, Source, is_packed, is_regular, opened, rereadable
from counterflow.trace.whole import MOST_FAULTS, Head, head_of, read_whole, recover_events

PARALLEL_FROM = 48 << 20
"""A plain file of so many bytes is worth starting processes for."""

STRETCH = 16 << 20
"""So many bytes of a large file are one task."""

LONGEST_HEAD = 4 << 20
"""The first slice stands in so many bytes, or the file is not scanned."""

_TRACE_FILE = re.compile(r".*\.json(\.gz|\.zst|\.zstd)?$")

Progress = Callable[[int, int], None]
"""Is told, now and then, how many bytes of how many have been read."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One file of a profiler, in columns sorted by time.

    ``rank`` is None where the file names none. ``names`` is the table that the columns' names and threads index;
    ``sms`` tells how many multiprocessors a device has. ``warnings`` are sentences about what could not be read; a
    ``damaged`` file lacks some events. A ``timeline`` is one that counterflow wrote: its GPUs are the ranks of a step.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> _ = path.write_text(
        ...     '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "gemm", "tid": 7, "ts": 1.5, "dur": 2}]}'
        ... )
        >>> trace = open_trace(path)
        >>> trace.names[trace.work.name[0]], trace.work.end_ns.tolist()
        ('gemm', [3500])
    """

    file: str
    rank: int | None
    work: GpuWork
    launches: Launches
    annotations: Annotations
    names: tuple[str, ...]
    sms: dict[int, int]
    warnings: tuple[str, ...]
    damaged: bool = False
    timeline: bool = False


def open_trace(path: str | os.PathLike[str], progress: Progress | None = None) -> Trace:
    """Read a trace of the PyTorch profiler, plain, gzip or zstd, or a timeline that counterflow wrote.

    ``path`` may be a pipe, and "-" is standard input: what comes through it is copied to a temporary file first.
    A large plain file is read by as many processes as there are cores, as long as this process has one thread only
    and its platform can fork. A broken or truncated file gives what could be read, with warnings.

    Raises:
        TraceError: the file cannot be read, or holds no trace.

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow import open_trace
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> _ = path.write_text('{"traceEvents": []}')
        >>> open_trace(path).warnings
        ('the trace holds no GPU work: profile with ProfilerActivity.CUDA',)
    """
    with _about(path), rereadable(path) as file:
        packed = is_packed(file)
        total = os.stat(file).st_size
        taken = _Taken(progress, total)
        found = None if packed or total < PARALLEL_FROM or not _may_fork() else _by_processes(file, total, taken)
        warnings: list[str] = []
        if found is None:
            source = Source(file, taken.add)
            found = _by_blocks(source)
            if found is None:
                source = Source(file)
                found = _in_full(source)
            warnings += source.warnings
        taken.done()
        return _trace(os.fspath(path), *found, warnings)


def open_traces(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> list[Trace]:
    """Read the traces of many ranks: files, or all traces in a folder, in the order of their ranks.

    ``executor`` is any ``concurrent.futures`` executor, also that of a cluster; each file is one task of it. Traces
    that name no rank come last, as they were given.

    Raises:
        TraceError: a file cannot be read or holds no trace, or there is none.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for rank in (1, 0):
        ...     text = '{"distributedInfo": {"rank": %d}, "traceEvents": []}' % rank
        ...     _ = (folder / f"trace{2 - rank}.json").write_text(text)
        >>> [trace.rank for trace in open_traces(folder)]
        [0, 1]
    """
    files = _files(paths)
    if executor is not None:
        traces = list(executor.map(open_trace, files))
    elif len(files) > 1 and all(map(_seems_packed, files)) and _may_fork():
        with _pool(len(files)) as pool:
            traces = list(pool.map(open_trace, files))
    else:
        traces = [open_trace(file, progress) for file in files]
    return sorted(traces, key=lambda trace: (trace.rank is None, trace.rank or 0))


def _seems_packed(path: str) -> bool:
    try:
        return is_regular(path) and is_packed(path)
    except TraceError:  # reading it will say so
        return False


def _files(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    if isinstance(paths, str | os.PathLike):
        if not Path(paths).is_dir():
            return [os.fspath(paths)]
        files = sorted(str(file) for file in Path(paths).iterdir() if _TRACE_FILE.match(file.name))
        if not files:
            raise TraceError(f"{paths}: the folder holds no .json, .json.gz or .json.zst; give a folder of traces")
        return files
    files = [os.fspath(path) for path in paths]
    if not files:
        raise TraceError("there is no trace to read; give at least one file")
    return files


@contextmanager
def _about(path: object) -> Iterator[None]:
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None


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


# --- one process ---------------------------------------------------------------------------------------------


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
    head.data = head_of(before) | head.data
    return collector.columns(), head


def _in_full(source: Source) -> tuple[Columns, Head]:
    text = b"".join(source.blocks())
    if not text and source.warnings:
        raise TraceError(f"{source.warnings[0]}, and that is nothing; give a trace as the PyTorch profiler writes it")
    collector = Collector()
    head = read_whole(text, collector)
    return collector.columns(), head


# --- several processes ---------------------------------------------------------------------------------------


def _may_fork() -> bool:
    """Forking a process with threads may hang, and other ways to start one run the caller's script again."""
    return "fork" in get_all_start_methods() and threading.active_count() == 1


def _pool(most: int) -> AbstractContextManager[Executor]:
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
        with _pool(len(tasks)) as pool:
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


# --- the trace -----------------------------------------------------------------------------------------------


def _trace(file: str, columns: Columns, head: Head, warnings: list[str]) -> Trace:
    base = head.data.get("baseTimeNanoseconds", 0)
    if type(base) is not int or not -(2**62) < base < 2**62:
        warnings.append("the trace's baseTimeNanoseconds is no time: times are counted from its own origin")
        base = 0
    work, launches, annotations = columns.work, columns.launches, columns.annotations
    for table in (work, launches, annotations):
        table.settle(base)
    launching = _among(launches.correlation, work.correlation)
    launches = launches if launching.all() else launches.rows(launching)
    warnings += _about_reading(head, columns) + _about_work(work, launches)
    damaged = bool(head.cut or head.broken)
    about = _rank(head.data), work, launches, annotations, columns.names, _sms(head.data), tuple(warnings)
    return Trace(file, *about, damaged, timeline=type(head.data.get("format")) is int)


def _among(values: Ints, known: Ints) -> npt.NDArray[np.bool_]:
    # Not np.isin: it takes several times the memory of the columns.
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    ordered = np.sort(known)
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values)


def _about_reading(head: Head, columns: Columns) -> list[str]:
    told = []
    if head.cut:
        told.append("the file ends before its events do: figures are of what stands before the cut")
    if head.broken == MOST_FAULTS:
        told.append(f"the file is broken in {MOST_FAULTS} places: what follows the last of them was not read")
    elif head.broken:
        told.append(f"the file is broken in {counted(head.broken, 'place')}: the events there are missing")
    if columns.unusable:
        told.append(f"{counted(columns.unusable, 'event')} without a usable time and duration left out")
    return told


def _about_work(work: GpuWork, launches: Launches) -> list[str]:
    if not len(work):
        return ["the trace holds no GPU work: profile with ProfilerActivity.CUDA"]
    if not len(launches):
        return []  # its CPU side was not recorded, or it is counterflow's own
    told = []
    launch = launch_of(work, launches)
    orphans = int((launch < 0).sum())
    if orphans:
        told.append(f"{counted(orphans, 'piece')} of GPU work without a launch record: counted all the same")
    early = launches.start_ns[launch] - work.start_ns
    early = early[(launch >= 0) & (early > 0)]
    if len(early):
        told.append(
            f"{counted(len(early), 'piece')} of GPU work before the call that launched it, by up to "
            f"{early.max() / 1000:.3f} µs: the clocks of CPU and GPU differ"
        )
    return told


def launch_of(work: GpuWork, launches: Launches) -> Ints:
    """For each piece of GPU work the row of its launch record, the first one of several; -1 where there is none."""
    if not len(launches):
        return np.full(len(work), -1, dtype=np.int32)
    order = np.argsort(launches.correlation, kind="stable")
    ordered = launches.correlation[order]
    rows = np.empty(len(work), dtype=np.int32)
    for some in blocks(len(work)):
        place = np.minimum(np.searchsorted(ordered, work.correlation[some]), len(ordered) - 1)
        rows[some] = np.where(ordered[place] == work.correlation[some], order[place], -1)
    return rows


def graph_of(launch: Ints) -> Ints:
    """For each piece of GPU work the row of the launch record that it shares with others (a graph's); else -1."""
    if not len(launch):
        return launch
    count = np.bincount(launch + 1)
    return np.where(count[launch + 1] > 1, launch, -1)


def counted(number: int, what: str) -> str:
    """``1 place``, ``8 places``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _rank(head: dict[str, Any]) -> int | None:
    told = head.get("distributedInfo")
    rank = told.get("rank") if isinstance(told, dict) else None
    return rank if type(rank) is int and 0 <= rank < 2**31 else None


def _sms(head: dict[str, Any]) -> dict[int, int]:
    told = head.get("deviceProperties")
    devices = [device for device in told if isinstance(device, dict)] if isinstance(told, list) else []
    pairs = [(device.get("id"), device.get("numSms")) for device in devices]
    return {device: sms for device, sms in pairs if type(device) is int and type(sms) is int and sms > 0}
