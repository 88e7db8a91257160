"""Open traces: what a file holds, what is to be said of it, and the ranks of a folder in order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.errors import TraceError
from counterflow.trace.columns import UNKNOWN, Annotations, Columns, GpuWork, Ints, Launches
from counterflow.trace.cover import blocks
from counterflow.trace.source import is_packed, is_regular, rereadable
from counterflow.trace.ways import Progress, may_fork, pool_of, read_columns
from counterflow.trace.whole import MOST_FAULTS, Head

_TRACE_FILE = re.compile(r".*\.json(\.gz|\.zst|\.zstd)?$")


@dataclass(frozen=True, eq=False)
class Trace:
    """One file of a profiler, in columns sorted by time.

    ``rank`` is None where the file names none. ``names`` is the table that the columns' names and threads index;
    ``sms`` tells how many multiprocessors a device has. ``warnings`` are sentences about what could not be read; a
    ``damaged`` file lacks a part. A ``timeline`` is one that counterflow wrote: its GPUs are the ranks of a step.

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
        return _trace(os.fspath(path), *read_columns(file, progress))


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
    elif len(files) > 1 and all(map(_seems_packed, files)) and may_fork():
        with pool_of(len(files)) as pool:
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


def _trace(file: str, columns: Columns, head: Head, warnings: list[str]) -> Trace:
    base = head.data.get("baseTimeNanoseconds", 0)
    if type(base) is not int or not -(2**62) < base < 2**62:
        warnings.append("the trace's baseTimeNanoseconds is no time: times are counted from its own origin")
        base = 0
    work, launches, annotations = columns.work, columns.launches, columns.annotations
    for table in (work, launches, annotations):
        table.settle(base)
    launching = _among(launches.correlation, work.correlation) & (launches.correlation != UNKNOWN)
    launches = launches if launching.all() else launches.rows(launching)
    warnings += _about_reading(head, columns) + _about_work(work, launches, columns.names)
    damaged = bool(head.cut or head.broken or head.lost)
    about = _rank(head.data), work, launches, annotations, columns.names, _sms(head.data, work), tuple(warnings)
    return Trace(file, *about, damaged, timeline=type(head.data.get("format")) is int)


def _among(values: Ints, known: Ints) -> npt.NDArray[np.bool_]:
    # Not np.isin: it takes several times the memory of the columns.
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    ordered = np.sort(known)
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values)


def _about_reading(head: Head, columns: Columns) -> list[str]:
    told = []
    if head.lost:
        told.append("the file is broken before its events: what stands there, mostly its rank and GPUs, was not read")
    if head.cut:
        told.append("the file ends before its events do: figures are of what stands before the cut")
    if head.broken == MOST_FAULTS:
        told.append(f"the file is broken in {MOST_FAULTS} places: what follows the last of them was not read")
    elif head.broken:
        told.append(f"the file is broken in {counted(head.broken, 'place')}: the events there are missing")
    if columns.unusable:
        told.append(f"{counted(columns.unusable, 'event')} without a usable time and duration left out")
    return told


def _about_work(work: GpuWork, launches: Launches, names: Sequence[str]) -> list[str]:
    if not len(work):
        return ["the trace holds no GPU work: profile with ProfilerActivity.CUDA"]
    if not len(launches):
        return []  # its CPU side was not recorded, or it is counterflow's own
    told = []
    launch = launch_of(work, launches)
    orphans = int((launch < 0).sum())
    if orphans:
        told.append(f"{counted(orphans, 'piece')} of GPU work without a launch record: counted all the same")
    if _by_several_processes(launches, names):
        told.append(
            "several processes launched work under the same ids, as in a file of several ranks: its phases may be "
            "wrong, and so are figures of GPUs with the same number; give the file of each rank"
        )
    early = launches.start_ns[launch] - work.start_ns
    early = early[(launch >= 0) & (early > 0)]
    if len(early):
        told.append(
            f"{counted(len(early), 'piece')} of GPU work before the call that launched it, by up to "
            f"{early.max() / 1000:.3f} µs: the clocks of CPU and GPU differ"
        )
    return told


def _by_several_processes(launches: Launches, names: Sequence[str]) -> bool:
    """Whether launches of one id come from several processes: each process counts its ids for itself."""
    order = np.argsort(launches.correlation, kind="stable")
    ids, threads = launches.correlation[order], launches.thread[order]
    which = (ids[1:] == ids[:-1]) & (threads[1:] != threads[:-1])
    pairs = np.unique(np.stack([threads[:-1][which], threads[1:][which]]), axis=1).T.tolist()
    return any(len({names[thread].rpartition(" of process ")[2] for thread in pair}) > 1 for pair in pairs)


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


def _sms(head: dict[str, Any], work: GpuWork) -> dict[int, int]:
    """By the numbers that GPU work names: on AMD those are not the numbers of ``deviceProperties``."""
    told = head.get("deviceProperties")
    devices = [device for device in told if isinstance(device, dict)] if isinstance(told, list) else []
    pairs = [(device.get("id"), device.get("numSms")) for device in devices]
    known = {device: sms for device, sms in pairs if type(device) is int and type(sms) is int and sms > 0}
    if len(set(known.values())) != 1:
        return known
    return dict.fromkeys(np.unique(work.device).tolist(), next(iter(known.values()))) | known
