"""What a trace holds, in columns: GPU work, the records that launched it, and annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

KERNEL, MEMCPY, MEMSET, COMPUTE_SPAN, COMMUNICATION_SPAN = range(5)
"""What a piece of GPU work is; the last two come from counterflow's own timelines, where the lane tells."""

UNKNOWN = -1
"""Stands where the trace names no correlation or stream."""


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of one length; every field is an int64 array of shape [rows]."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def rows(self, which: npt.NDArray[np.bool_] | Ints) -> Self:
        """The chosen rows, in the order in which they are named."""
        return type(self)(**{column.name: getattr(self, column.name)[which] for column in fields(self)})

    @classmethod
    def empty(cls) -> Self:
        """No rows."""
        return cls(**{column.name: np.zeros(0, dtype=np.int64) for column in fields(cls)})

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one after another."""
        if not parts:
            return cls.empty()
        names = [column.name for column in fields(cls)]
        return cls(**{n: np.concatenate([getattr(part, n) for part in parts], dtype=np.int64) for n in names})

    def compact(self) -> Self:
        """The same numbers, in int32 where they fit: for the way between processes only."""
        return type(self)(**{column.name: _compact(getattr(self, column.name)) for column in fields(self)})

    def tuples(self) -> list[tuple[int, ...]]:
        """Row by row, as plain numbers."""
        return list(zip(*(getattr(self, column.name).tolist() for column in fields(self)), strict=True))


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
    """Ranges that the program named; ``on_gpu`` is 1 for their image on a stream."""

    name: Ints
    thread: Ints
    on_gpu: Ints


@dataclass(frozen=True)
class Columns:
    """All that was read from one stretch of a file; ``unusable`` counts events without a usable time."""

    work: GpuWork
    launches: Launches
    annotations: Annotations
    names: tuple[str, ...]
    unusable: int = 0

    def compact(self) -> Columns:
        """The same, smaller: for the way between processes only."""
        work, launches, annotations = self.work.compact(), self.launches.compact(), self.annotations.compact()
        return Columns(work, launches, annotations, self.names, self.unusable)

    @classmethod
    def joined(cls, parts: list[Columns]) -> Columns:
        """One table of names for all parts, in their order; the list is emptied, for the parts may be large."""
        ids: dict[str, int] = {}
        to = [np.array([ids.setdefault(name, len(ids)) for name in part.names], dtype=np.int64) for part in parts]
        unusable = sum(part.unusable for part in parts)
        works = [_renamed(part.work, new, "name") for part, new in zip(parts, to, strict=True)]
        launches = [_renamed(part.launches, new, "thread") for part, new in zip(parts, to, strict=True)]
        annotations = [
            _renamed(_renamed(part.annotations, new, "name"), new, "thread")
            for part, new in zip(parts, to, strict=True)
        ]
        parts.clear()
        work = GpuWork.joined(works)
        works.clear()
        return cls(work, Launches.joined(launches), Annotations.joined(annotations), tuple(ids), unusable)


def _compact(column: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    small = column.astype(np.int32)
    return small if np.array_equal(small, column) else column


T = TypeVar("T", bound=Table)


def _renamed(table: T, to: Ints, column: str) -> T:
    columns = {c.name: getattr(table, c.name) for c in fields(table)}
    columns[column] = to[columns[column]] if len(table) else columns[column]
    return type(table)(**columns)
