"""Timelines as traces in the dialect of PyTorch's profiler, which Perfetto and chrome://tracing open; in without loss.

A rank is a process, a lane one of its threads; viewers drop slices that overlap on one thread, so what runs at the
same time as another span of its lane stands on a further thread of the same name. Times are microseconds with three
decimals, counted from ``baseTimeNanoseconds``. Every slice is a "kernel" of a device (the rank) and a stream (the
lane), so that tools for such traces find it, and tells its lane, by which counterflow's own reader knows it.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.errors import TimelineError
from counterflow.files import write_text
from counterflow.timeline.intervals import Ns, tracks
from counterflow.timeline.timeline import Span, Timeline

FORMAT = 1
LANE = "counterflow_lane"
"""The argument of a slice that tells its lane."""
_LONGEST_NS = 2**42 * 1000  # beyond it (50 days) microseconds in a double no longer tell nanoseconds apart


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """The trace as plain data.

    Raises:
        TimelineError: the timeline is longer than 50 days.
    """
    if timeline.makespan_ns > _LONGEST_NS:
        raise TimelineError(
            f"the timeline is {timeline.makespan_ns} ns long; a Chrome trace keeps nanoseconds up to {_LONGEST_NS} ns "
            "(50 days): split it"
        )
    base = int(timeline.start_ns.min()) if len(timeline) else 0
    track = _tracks(timeline)
    # The threads of a lane follow each other, in every rank at the same numbers.
    depth = [int(track[timeline.lane == lane].max(initial=0)) + 1 for lane in range(len(timeline.lanes))]
    first = [sum(depth[:lane]) for lane in range(len(depth))]
    lanes = timeline.lane.tolist()
    threads = [first[lane] + below for lane, below in zip(lanes, track.tolist(), strict=True)]
    names = [name for name, size in zip(timeline.lanes, depth, strict=True) for _ in range(size)]
    used = {*zip(timeline.rank.tolist(), threads, strict=True)}
    used |= {(rank, thread) for rank in range(timeline.num_ranks) for thread in first}
    return {
        "format": FORMAT,
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base,
        "traceEvents": [
            *_names(names, sorted(used)),
            *(_event(*row, base) for row in zip(timeline, lanes, threads, strict=True)),
        ],
    }


def _tracks(timeline: Timeline) -> Ns:
    """On which thread of its rank's lane each span stands, shape [spans]."""
    track = np.zeros(len(timeline), dtype=np.int64)
    key = timeline.rank * len(timeline.lanes) + timeline.lane
    order = np.lexsort((timeline.end_ns, timeline.start_ns, key))
    for group in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        track[group] = tracks(timeline.start_ns[group], timeline.end_ns[group])
    return track


def _names(names: list[str], used: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for rank in sorted({rank for rank, _ in used}):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for rank, thread in used:
        track = {"pid": rank, "tid": thread}
        yield {"ph": "M", "name": "thread_name", **track, "args": {"name": names[thread]}}
        yield {"ph": "M", "name": "thread_sort_index", **track, "args": {"sort_index": thread}}


def _event(span: Span, lane: int, thread: int, base_ns: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "kernel",
        "name": span.name,
        "pid": span.rank,
        "tid": thread,
        "ts": (span.start_ns - base_ns) / 1000,
        "dur": span.duration_ns / 1000,
        "args": {"device": span.rank, "stream": lane, LANE: span.lane},
    }


def from_chrome(data: object) -> Timeline:
    """The opposite of ``to_chrome``.

    Raises:
        TimelineError: the data is no Chrome trace with complete ("X") events of whole-number processes.
    """
    events = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(events, list):
        raise TimelineError('this is no Chrome trace: it needs an object with a list "traceEvents"')
    if data.get("format", FORMAT) != FORMAT:
        raise TimelineError(f"the trace has format {reprlib.repr(data['format'])}; this version reads format {FORMAT}")
    base = data.get("baseTimeNanoseconds", 0)
    if not isinstance(base, int):
        raise TimelineError(f"the trace has baseTimeNanoseconds {reprlib.repr(base)}; it needs a whole number")
    lanes: dict[tuple[int, int], str] = {}
    spans = []
    for position, event in enumerate(events):
        try:
            if event["ph"] == "M" and event["name"] == "thread_name":
                lanes[event["pid"], event["tid"]] = _text(event["args"]["name"])
            elif event["ph"] == "X":
                start = base + _ns(event["ts"])
                end = start + _ns(event["dur"])
                lane = lanes[event["pid"], event["tid"]]
                spans.append(Span(index(event["pid"]), _text(event["name"]), start, end, lane))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TimelineError(
                f"event {position} of the trace is not one that counterflow writes ({type(error).__name__}: {error}); "
                'an "X" event has name, pid, tid, ts and dur, and its thread a name'
            ) from None
    return Timeline.from_spans(spans)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name is text, not {type(value).__name__}")
    return value


def _ns(microseconds: object) -> int:
    if not isinstance(microseconds, int | float):
        raise TypeError(f"a time is a number, not {type(microseconds).__name__}")
    return round(microseconds * 1000)


def write_chrome(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write the trace to a .json file.

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> timeline = simulate(one_f_one_b(2, 4), Costs())
        >>> write_chrome(timeline, path)
        >>> read_chrome(path) == timeline
        True
    """
    write_text(path, json.dumps(to_chrome(timeline)) + "\n")


def read_chrome(path: str | os.PathLike[str]) -> Timeline:
    """The timeline that ``write_chrome`` wrote to ``path``.

    Raises:
        TimelineError: the file cannot be read or holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TimelineError(f"{path} cannot be read as a Chrome trace: {error}") from None
    try:
        return from_chrome(data)
    except TimelineError as error:
        raise TimelineError(f"{path}: {error}") from None
