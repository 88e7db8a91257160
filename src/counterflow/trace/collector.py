"""Batches of events turned into columns, their times into int64 nanoseconds."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from counterflow.timeline import COMPUTE
from counterflow.trace.columns import (
    COMMUNICATION_SPAN,
    COMPUTE_SPAN,
    UNKNOWN,
    Annotations,
    Columns,
    GpuWork,
    Ints,
    Launches,
    column,
)
from counterflow.trace.events import (
    ANNOTATION,
    EXACT_US,
    FURTHEST_NS,
    LAUNCH,
    WANTED,
    WORK,
    Arguments,
    Event,
    Number,
    launches,
)

_SPAN = {COMPUTE: COMPUTE_SPAN}  # lane -> kind; all other lanes of our own timelines communicate
_FURTHEST_US = FURTHEST_NS // 2000
_NO_ARGUMENTS = Arguments()


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
        if _plain(start, EXACT_US) and _plain(length, EXACT_US) and (not len(length) or length.min() >= 0):
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
        return column([n if abs(n) < FURTHEST_NS else UNKNOWN for n in numbers])


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
