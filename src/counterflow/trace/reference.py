"""The slow and obvious way to read a whole trace and to find what was exposed; the fast one is held to it."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from decimal import Decimal
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from counterflow.trace.events import ANNOTATION, LAUNCH, WORK
from counterflow.trace.events import launches as launches_work


class Work(NamedTuple):
    """One piece of GPU work."""

    start_ns: int
    end_ns: int
    name: str
    kind: int
    device: int
    stream: int
    correlation: int
    blocks: int
    threads: int


class Launch(NamedTuple):
    """One call that launched."""

    start_ns: int
    end_ns: int
    correlation: int


class Range(NamedTuple):
    """One annotation."""

    start_ns: int
    end_ns: int
    name: str
    on_gpu: int


def read_reference(path: str | os.PathLike[str]) -> tuple[list[Work], list[Launch], list[Range]]:
    """All that is wanted of a well-formed trace, each sorted by start and else as in the file."""
    data = Path(path).read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    trace = json.loads(data, parse_float=Decimal)
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    base = trace.get("baseTimeNanoseconds", 0) if isinstance(trace, dict) else 0
    work, launches, ranges = [], [], []
    for event in events:
        if event.get("ph") != "X" or "ts" not in event or "dur" not in event:
            continue
        start = base + round(event["ts"] * 1000)
        end = start + round(event["dur"] * 1000)
        cat, name, arguments = event.get("cat"), event.get("name", ""), event.get("args", {})
        if cat in WORK:
            device = arguments.get("device", event.get("pid", 0))
            stream = arguments.get("stream", _number_in(event.get("tid", 0)))
            correlation = arguments.get("correlation", -1)
            sizes = (prod(arguments.get(key) or [0]) for key in ("grid", "block"))
            work.append(Work(start, end, name, WORK[cat], device, stream, correlation, *sizes))
        elif cat in LAUNCH and launches_work(name) and "correlation" in arguments:
            launches.append(Launch(start, end, arguments["correlation"]))
        elif cat in ANNOTATION:
            ranges.append(Range(start, end, name, ANNOTATION[cat]))
    launched = {one.correlation for one in work}
    launches = [launch for launch in launches if launch.correlation in launched]
    by_start: Any = lambda row: row.start_ns  # noqa: E731
    return sorted(work, key=by_start), sorted(launches, key=by_start), sorted(ranges, key=by_start)


def _number_in(label: int | str) -> int:
    return int(str(label).removeprefix("stream "))


def exposure_reference(pieces: Iterable[tuple[int, int, str]], start_ns: int, end_ns: int) -> dict[str, int]:
    """Nanoseconds of each kind in a window, instant by instant; a piece is start, end, and the kind of work it is."""
    pieces = list(pieces)
    found = dict.fromkeys(("compute", "communication", "overlapped", "exposed", "other", "idle"), 0)
    inside = {t for start, end, _ in pieces for t in (start, end) if start_ns < t < end_ns}
    times = sorted({start_ns, end_ns, *inside})
    for one, two in zip(times, times[1:], strict=False):
        running = {kind for start, end, kind in pieces if start <= one and end >= two}
        computes, talks = "compute" in running, "communication" in running
        found["compute"] += (two - one) * computes
        found["communication"] += (two - one) * talks
        found["overlapped"] += (two - one) * (computes and talks)
        found["exposed"] += (two - one) * (talks and not computes)
        found["other"] += (two - one) * (bool(running) and not computes and not talks)
        found["idle"] += (two - one) * (not running)
    return found


def hiding_reference(
    talks: Iterable[tuple[int, int, str]], computes: Iterable[tuple[int, int, str]]
) -> dict[tuple[str, str | None], int]:
    """Nanoseconds of each kind of communication under each kind of compute, instant by instant; None: under none.

    A piece is start, end, and its kind. Where several compute, the one that started first counts.
    """
    talks, computes = list(talks), list(computes)
    found: dict[tuple[str, str | None], int] = {}
    times = sorted({t for start, end, _ in [*talks, *computes] for t in (start, end)})
    for one, two in zip(times, times[1:], strict=False):
        above = [(start, kind) for start, end, kind in computes if start <= one and end >= two]
        column = min(above, key=lambda pair: pair[0])[1] if above else None
        for kind in {kind for start, end, kind in talks if start <= one and end >= two}:
            found[kind, column] = found.get((kind, column), 0) + two - one
    return found
