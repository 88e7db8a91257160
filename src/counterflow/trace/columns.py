"""What a trace holds, in columns: GPU work, the records that launched it, and annotations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger[Any]]

KERNEL, MEMCPY, MEMSET, COMPUTE_SPAN, COMMUNICATION_SPAN = range(5)
"""What a piece of GPU work is; the last two come from counterflow's own timelines, where the lane tells."""

UNKNOWN = -1
"""Stands where the trace names no correlation or stream."""


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of one length; every field is an array of shape [rows].

    Times are int64. The other columns are int32 where all their numbers fit, which nearly all do: they are many, and
    half as large. Widen them before multiplying.
    """

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def rows(self, which: npt.NDArray[np.bool_] | Ints | slice) -> Self:
        """The chosen rows, in the order in which they are named."""
        return type(self)(**{column.name: getattr(self, column.name)[which] for column in fields(self)})

    @classmethod
    def empty(cls) -> Self:
        """No rows."""
        return cls(**{c.name: np.zeros(0, np.int64 if c.name.endswith("_ns") else np.int32) for c in fields(cls)})

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """The rows of all parts, one after another."""
        sink = _Sink(cls)
        for part in parts:
            sink.add(part)
        return sink.table()

    def tuples(self) -> list[tuple[int, ...]]:
        """Row by row, as plain numbers."""
        return list(zip(*(getattr(self, column.name).tolist() for column in fields(self)), strict=True))


T = TypeVar("T", bound=Table)


@dataclass(frozen=True, eq=False)
class TimedTable(Table):
    """Columns that begin with a start and an end."""

    start_ns: Ints
    end_ns: Ints

    def settle(self, base_ns: int) -> None:
        """Count from ``base_ns`` and put the rows in the order of time, in place: the columns may be large."""
        order = np.argsort(self.start_ns, kind="stable")
        for column in fields(self):
            values = getattr(self, column.name)
            values[:] = values[order]
        for times in (self.start_ns, self.end_ns):
            times += base_ns


@dataclass(frozen=True, eq=False)
class GpuWork(TimedTable):
    """Kernels, copies and fills.

    ``name`` indexes the trace's names; ``kind`` is KERNEL, MEMCPY, …; ``correlation`` is UNKNOWN where no launch is
    told. ``blocks`` and ``threads`` are a kernel's grid and block, multiplied out; 0 where not told.
    """

    name: Ints
    kind: Ints
    device: Ints
    stream: Ints
    correlation: Ints
    blocks: Ints
    threads: Ints


@dataclass(frozen=True, eq=False)
class Launches(TimedTable):
    """Calls on the CPU that launched GPU work; ``thread`` indexes the trace's names."""

    thread: Ints
    correlation: Ints


@dataclass(frozen=True, eq=False)
class Annotations(TimedTable):
    """Ranges that the program named; ``on_gpu`` is 1 for those on the GPU's own time, mostly images of others.

    ``device`` and ``stream`` are where those stand, UNKNOWN where not told, as it is of all ranges on the CPU.
    """

    name: Ints
    thread: Ints
    on_gpu: Ints
    device: Ints
    stream: Ints


@dataclass(frozen=True)
class Columns:
    """All that was read from one stretch of a file; ``unusable`` counts events without a usable time."""

    work: GpuWork
    launches: Launches
    annotations: Annotations
    names: tuple[str, ...]
    unusable: int = 0


class Joiner:
    """Takes the columns of one stretch of a file after another, each of which may be let go then."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._work, self._launches, self._annotations = _Sink(GpuWork), _Sink(Launches), _Sink(Annotations)
        self._unusable = 0

    def add(self, part: Columns) -> None:
        """Take the next part."""
        ids = self._ids
        to = column([ids.setdefault(name, len(ids)) for name in part.names])
        self._work.add(part.work, name=to)
        self._launches.add(part.launches, thread=to)
        self._annotations.add(part.annotations, name=to, thread=to)
        self._unusable += part.unusable

    def columns(self) -> Columns:
        """All that was taken, with one table of names; nothing can be added then."""
        tables = self._work.table(), self._launches.table(), self._annotations.table()
        return Columns(*tables, tuple(self._ids), self._unusable)


def column(numbers: Sequence[int]) -> Ints:
    """Numbers as a column: int32 where they fit.

    Raises:
        OverflowError: one of them does not fit int64 either.
    """
    try:
        return np.array(numbers, dtype=np.int32)
    except OverflowError:
        return np.array(numbers, dtype=np.int64)


class _Sink(Generic[T]):
    """Columns that grow in place: long traces are never held twice, as joining them at the end would do."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._bytes = {c.name: bytearray() for c in fields(kind)}
        self._types = {c.name: np.dtype(np.int64 if c.name.endswith("_ns") else np.int32) for c in fields(kind)}

    def add(self, part: T, **to: Ints) -> None:
        """Take the rows of a part; what indexes the part's names is translated."""
        for name, grown in self._bytes.items():
            values = getattr(part, name)
            values = to[name][values] if name in to and len(values) else values
            if values.dtype.itemsize > self._types[name].itemsize:
                wide = self._bytes[name] = bytearray(self._grown(name).astype(np.int64).tobytes())
                self._types[name], grown = values.dtype, wide
            grown += values.astype(self._types[name], copy=False).tobytes()

    def table(self) -> T:
        """All rows; nothing can be added then."""
        return self._kind(**{name: self._grown(name) for name in self._bytes})

    def _grown(self, name: str) -> Ints:
        return np.frombuffer(self._bytes[name], dtype=self._types[name])
