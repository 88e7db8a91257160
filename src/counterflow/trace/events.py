"""One event of a trace, and batches of them turned into columns.

Times are microseconds in the file, whole or with a fraction, and int64 nanoseconds here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from math import nan, prod
from typing import Any, cast

import msgspec
import numpy as np

from counterflow.timeline import COMPUTE, LANE
from counterflow.trace.columns import (
    COMMUNICATION_SPAN,
    COMPUTE_SPAN,
    KERNEL,
    MEMCPY,
    MEMSET,
    UNKNOWN,
    Annotations,
    Columns,
    GpuWork,
    Ints,
    Launches,
    column,
)

WORK = {
    "kernel": KERNEL,
    "Kernel": KERNEL,
    "gpu_memcpy": MEMCPY,
    "Memcpy": MEMCPY,
    "gpu_memset": MEMSET,
    "Memset": MEMSET,
}
_SPAN = {COMPUTE: COMPUTE_SPAN}  # lane -> kind; all other lanes of our own timelines communicate
LAUNCH = frozenset({"cuda_runtime", "cuda_driver", "hip_runtime", "xpu_runtime", "Runtime"})
ANNOTATION = {"user_annotation": 0, "gpu_user_annotation": 1}
LAUNCHING = ("aunch", "emcpy", "emset")
"""A call on the CPU launches GPU work if its name has one of these in it; the other calls are most of a trace."""
NEVER_LAUNCHING = (
    *("cudaDevi", "cudaEven", "cudaFunc", "cudaGetD", "cudaOccu", "cudaPeek", "cudaPoin", "cudaStre", "cuStream"),
    *("hipDevic", "hipEvent", "hipFuncG", "hipGetDe", "hipGetLa", "hipPoint", "hipStrea"),
)
"""How the names of the other calls begin, in eight letters; it decides before what is in the name."""
WANTED = frozenset({*WORK, *LAUNCH, *ANNOTATION})
"""The categories (``cat``) that are read; "Kernel", "Runtime" and their like are those of 2021."""

_FURTHEST_NS = 2**62  # int64 holds the difference of any two such times
_FURTHEST_US = _FURTHEST_NS // 2000
_EXACT_US = 2.0**42  # from here on a double no longer tells the nanoseconds of a time in microseconds

Number = int | float | Decimal


class Arguments(msgspec.Struct, gc=False, rename={"lane": LANE}):
    """What is read of an event's ``args``; only counterflow's own timelines tell a lane."""

    device: int | None = None
    stream: int | None = None
    correlation: int = UNKNOWN
    grid: list[int] | None = None
    block: list[int] | None = None
    lane: str | None = None


class Event(msgspec.Struct, gc=False):
    """What is read of an event."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: int | float | None = None
    dur: int | float | None = None
    pid: int | str = 0
    tid: int | str = 0
    args: Arguments | None = None


class _ExactEvent(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: Decimal | None = None
    dur: Decimal | None = None
    pid: int | str = 0
    tid: int | str = 0
    args: Arguments | None = None


_EVENTS = msgspec.json.Decoder(list[Event])
_EXACT_EVENTS = msgspec.json.Decoder(list[_ExactEvent])
_NO_ARGUMENTS = Arguments()


def decode_events(array: bytes) -> list[Event]:
    """The events of a JSON array, with all the digits that their times have.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError: the array is not one of well-formed events.
    """
    events = _EVENTS.decode(array)
    inexact = [type(event.ts) is float and not -_EXACT_US < event.ts < _EXACT_US for event in events]
    if any(inexact):
        return cast(list[Event], _EXACT_EVENTS.decode(array))
    return events


_SPACES = bytes(c if c >= 0x20 else 0x20 for c in range(256))


def repaired(text: bytes) -> str:
    """The text as a lenient reader takes it: control characters are blanks, broken UTF-8 is replaced."""
    return text.translate(_SPACES).decode("utf-8", errors="replace")


def launches(name: str) -> bool:
    """Whether a call of this name launches GPU work.

    Example:
        >>> launches("cudaGraphLaunch"), launches("hipMemcpyAsync"), launches("cudaEventRecord")
        (True, True, False)
    """
    return name[:8] not in NEVER_LAUNCHING and any(part in name for part in LAUNCHING)


def event_of(data: object) -> Event | None:
    """The event in a decoded object, read leniently; None if it is none that we want.

    What is malformed in it counts as not told.
    """
    if not isinstance(data, dict) or data.get("ph") != "X":
        return None
    cat, name = data.get("cat"), data.get("name")
    if not isinstance(cat, str) or cat not in WANTED:
        return None
    event = Event("X", cat, name if isinstance(name, str) else "")
    event.ts, event.dur = (_number(data.get(key)) for key in ("ts", "dur"))  # type: ignore[assignment]
    event.pid, event.tid = (v if type(v) in (int, str) else 0 for v in (data.get("pid"), data.get("tid")))  # type: ignore[assignment]
    arguments = data.get("args")
    if isinstance(arguments, dict):
        event.args = Arguments(
            device=_whole(arguments.get("device")),
            stream=_whole(arguments.get("stream")),
            correlation=_first(_whole(arguments.get("correlation")), UNKNOWN),
            grid=_sizes(arguments.get("grid")),
            block=_sizes(arguments.get("block")),
            lane=lane if isinstance(lane := arguments.get(LANE), str) else None,
        )
    return event


def lenient_event(text: bytes) -> Event | None:
    """As ``event_of``, of an event's own text.

    Raises:
        ValueError, RecursionError: it is not the text of one JSON value.
    """
    return event_of(json.loads(repaired(text), parse_float=exact))


def exact(text: str) -> Decimal | float:
    """A number with all its digits, or NaN where it has more than any time.

    Example:
        >>> exact("1699999999123456.789")
        Decimal('1699999999123456.789')
    """
    try:
        return Decimal(text)
    except ArithmeticError:
        return nan


def _number(value: Any) -> Number | None:
    return value if type(value) in (int, float, Decimal) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < _FURTHEST_NS else None


def _first(value: int | None, other: int) -> int:
    return other if value is None else value


def _sizes(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and all(_whole(size) is not None for size in value) else None


class Collector:
    """Takes events in batches and gives columns."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._threads: dict[tuple[int | str, int | str], int] = {}
        self._work: list[GpuWork] = []
        self._launches: list[Launches] = []
        self._annotations: list[Annotations] = []
        self._unusable = 0

    def add(self, events: Sequence[Event]) -> None:
        """Take what we want of these events."""
        wanted = [event for event in events if event.ph == "X" and event.cat in WANTED]
        kept, start_ns, end_ns = self._timed(wanted)
        cats = [event.cat for event in kept]
        for group, take in ((WORK, self._add_work), (LAUNCH, self._add_launches), (ANNOTATION, self._add_ranges)):
            which = [index for index, cat in enumerate(cats) if cat in group]
            if len(which) == len(kept):
                take(kept, start_ns, end_ns)
            elif which:
                take([kept[index] for index in which], start_ns[which], end_ns[which])

    def columns(self) -> Columns:
        """All that was taken."""
        return Columns(
            GpuWork.joined(self._work),
            Launches.joined(self._launches),
            Annotations.joined(self._annotations),
            tuple(self._ids),
            self._unusable,
        )

    def _timed(self, events: list[Event]) -> tuple[list[Event], Ints, Ints]:
        """The events whose times are usable, and the times."""
        try:
            start, length = np.array([event.ts for event in events]), np.array([event.dur for event in events])
        except (ValueError, OverflowError):
            start = length = np.array([None])
        if _plain(start, _EXACT_US) and _plain(length, _EXACT_US) and (not len(length) or length.min() >= 0):
            start_ns = _nanoseconds(start)
            return events, start_ns, start_ns + _nanoseconds(length)
        kept, rows = [], []
        for event in events:
            start_us, length_us = _microseconds(event.ts), _microseconds(event.dur)
            if start_us is None or length_us is None or length_us < 0:
                self._unusable += 1
                continue
            kept.append(event)
            rows.append((round(start_us * 1000), round(length_us * 1000)))
        times = np.array(rows, dtype=np.int64).reshape(-1, 2)
        return kept, times[:, 0], times[:, 0] + times[:, 1]

    def _named(self, names: Sequence[str]) -> Ints:
        ids = self._ids
        return column([ids.setdefault(name, len(ids)) for name in names])

    def _thread(self, event: Event) -> int:
        key = (event.pid, event.tid)
        known = self._threads.get(key)
        if known is None:
            name = f"thread {event.tid} of process {event.pid}"
            known = self._threads[key] = self._ids.setdefault(name, len(self._ids))
        return known

    def _add_work(self, events: Sequence[Event], start_ns: Ints, end_ns: Ints) -> None:
        arguments = [event.args or _NO_ARGUMENTS for event in events]
        devices, streams = [a.device for a in arguments], [a.stream for a in arguments]
        if None in devices or None in streams:  # old and AMD traces name them by their tracks only
            devices = [_id_in(e.pid) if known is None else known for e, known in zip(events, devices, strict=True)]
            streams = [_id_in(e.tid) if known is None else known for e, known in zip(events, streams, strict=True)]
        self._work.append(
            GpuWork(
                start_ns,
                end_ns,
                self._named([event.name for event in events]),
                _column(
                    [
                        WORK[e.cat] if a.lane is None else _SPAN.get(a.lane, COMMUNICATION_SPAN)
                        for e, a in zip(events, arguments, strict=True)
                    ]
                ),
                _column(devices),
                _column(streams),
                _column([a.correlation for a in arguments]),
                _column([prod(a.grid) if a.grid else 0 for a in arguments]),
                _column([prod(a.block) if a.block else 0 for a in arguments]),
            )
        )

    def _add_launches(self, events: Sequence[Event], start_ns: Ints, end_ns: Ints) -> None:
        correlation = _column([(event.args or _NO_ARGUMENTS).correlation for event in events])
        table = Launches(start_ns, end_ns, _column([self._thread(event) for event in events]), correlation)
        self._launches.append(table.rows(np.flatnonzero([launches(event.name) for event in events])))

    def _add_ranges(self, events: Sequence[Event], start_ns: Ints, end_ns: Ints) -> None:
        threads = _column([self._thread(event) for event in events])
        on_gpu = _column([ANNOTATION[event.cat] for event in events])
        names = self._named([event.name for event in events])
        places = [_place(event) if ANNOTATION[event.cat] else (UNKNOWN, UNKNOWN) for event in events]
        devices, streams = (_column([place[which] for place in places]) for which in (0, 1))
        self._annotations.append(Annotations(start_ns, end_ns, names, threads, on_gpu, devices, streams))


def _plain(times: np.ndarray[Any, Any], furthest: float) -> bool:
    """Whether these microseconds become nanoseconds by one multiplication."""
    if not len(times):
        return True
    if times.dtype.kind == "i":
        return int(abs(times).max()) < _FURTHEST_US
    return times.dtype.kind == "f" and float(abs(times).max()) < furthest


def _nanoseconds(times: np.ndarray[Any, Any]) -> Ints:
    if times.dtype.kind == "i":
        return np.asarray(times, dtype=np.int64) * 1000
    return np.asarray(np.rint(times * 1000), dtype=np.int64)


def _microseconds(time: Number | None) -> Number | None:
    # Compared, not measured: abs() of a decimal with a vast exponent fails.
    return time if time is not None and -_FURTHEST_US < time < _FURTHEST_US else None


def _column(numbers: Sequence[Any]) -> Ints:
    try:
        return column(numbers)
    except OverflowError:
        return column([n if abs(n) < _FURTHEST_NS else UNKNOWN for n in numbers])


def _place(event: Event) -> tuple[int, int]:
    """The device and the stream of what stands on the GPU's time; old and AMD traces name them by their tracks only."""
    a = event.args or _NO_ARGUMENTS
    return _id_in(event.pid) if a.device is None else a.device, _id_in(event.tid) if a.stream is None else a.stream


def _id_in(label: int | str) -> int:
    """The number of a stream or a device, which stands in a track's label: 7, "7" or "stream 7"."""
    if isinstance(label, int):
        return label
    digits = label.removeprefix("stream ")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else UNKNOWN
