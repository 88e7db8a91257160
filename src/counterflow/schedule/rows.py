"""What every rank does, as integers beneath and as actions on the face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from counterflow.schedule.action import Action, Kind

Ints = npt.NDArray[np.int64]

SIMPLE = (Kind.F, Kind.B, Kind.I, Kind.W)
"""The kinds of a part; its integer is the place in here, and -1 where an action has no second part."""
CODE = {kind: code for code, kind in enumerate(SIMPLE)}
F, B, I, W = range(4)  # noqa: E741 - the field's own letters


@dataclass(frozen=True, eq=False)
class Rows(Sequence[tuple[Action, ...]]):
    """A schedule's rows: ``rows[rank]`` is a tuple of ``Action``, made when it is asked for.

    Beneath are int64 columns, in which a million actions cost neither much time nor much memory. The actions of
    all ranks stand behind one another; rank r's are ``first[r]`` up to ``first[r + 1]``, so ``first`` has shape
    [ranks + 1]. ``kind``, ``stage`` and ``microbatch`` have shape [actions, 2]: an overlapped action has a
    forward and a backward, any other has one part and a second of kind -1.

    Example:
        >>> from counterflow import one_f_one_b
        >>> rows = one_f_one_b(2, 2).rows
        >>> [str(action) for action in rows[0]], rows.first.tolist(), rows.kind[:4, 0].tolist()
        (['0F0', '0F1', '0B0', '0B1'], [0, 4, 8], [0, 0, 1, 1])
    """

    first: Ints
    kind: Ints
    stage: Ints
    microbatch: Ints

    @classmethod
    def of(cls, rows: Iterable[Iterable[Action]]) -> Rows:
        """The rows of these actions."""
        if isinstance(rows, Rows):
            return rows
        lengths = [0]
        cells: list[tuple[int, ...]] = []
        for row in rows:
            cells += map(_cell, row)
            lengths.append(len(cells))
        table = np.array(cells, dtype=np.int64).reshape(-1, 2, 3)
        return cls(np.array(lengths, dtype=np.int64), table[:, :, 0], table[:, :, 1], table[:, :, 2])

    def __post_init__(self) -> None:
        for name in ("first", "kind", "stage", "microbatch"):
            column = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            column.setflags(write=False)
            object.__setattr__(self, name, column)

    @property
    def parts(self) -> tuple[Ints, Ints, Ints]:
        """Kind, stage and micro-batch, each of shape [actions, 2]."""
        return self.kind, self.stage, self.microbatch

    @property
    def num_actions(self) -> int:
        """The actions of all ranks."""
        return len(self.kind)

    @property
    def rank(self) -> Ints:
        """For each action its rank, shape [actions]."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    def action(self, index: int) -> Action:
        """The action at ``index`` of all actions."""
        one, two = (
            Action(SIMPLE[kind], stage, microbatch) if kind >= 0 else None
            for kind, stage, microbatch in zip(*(column[index].tolist() for column in self.parts), strict=True)
        )
        assert one is not None
        return one if two is None else Action.overlap(one, two)

    def place(self, index: int) -> tuple[int, int]:
        """Rank and step of the action at ``index``."""
        rank = int(np.searchsorted(self.first, index, side="right")) - 1
        return rank, index - int(self.first[rank])

    def __len__(self) -> int:
        return len(self.first) - 1

    @overload
    def __getitem__(self, rank: int) -> tuple[Action, ...]: ...

    @overload
    def __getitem__(self, rank: slice) -> tuple[tuple[Action, ...], ...]: ...

    def __getitem__(self, rank: int | slice) -> tuple[Action, ...] | tuple[tuple[Action, ...], ...]:
        if isinstance(rank, slice):
            return tuple(self[one] for one in range(len(self))[rank])
        one = range(len(self))[rank]
        return tuple(self._between(int(self.first[one]), int(self.first[one + 1])))

    def _between(self, start: int, end: int) -> Iterator[Action]:
        columns = (column[start:end].tolist() for column in self.parts)
        for kinds, stages, microbatches in zip(*columns, strict=True):
            action = Action(SIMPLE[kinds[0]], stages[0], microbatches[0])
            if kinds[1] >= 0:
                action = Action.overlap(action, Action(SIMPLE[kinds[1]], stages[1], microbatches[1]))
            yield action

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rows):
            names = ("first", "kind", "stage", "microbatch")
            return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)
        if isinstance(other, Sequence):
            return list(self) == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self.first.tobytes(), self.kind.tobytes(), self.stage.tobytes(), self.microbatch.tobytes()))

    def __repr__(self) -> str:
        return f"<{self.num_actions} actions on {len(self)} ranks>"


def _cell(action: Action) -> tuple[int, ...]:
    if action.pair is None:
        return CODE[action.kind], action.stage, action.microbatch, -1, -1, -1
    forward, backward = action.pair
    return (F, forward.stage, forward.microbatch, CODE[backward.kind], backward.stage, backward.microbatch)


class ActionNames(Sequence[str]):
    """The text of every action, written when it is asked for, and ``more`` behind it: what labels a timeline."""

    def __init__(self, rows: Rows, more: Sequence[str] = ()) -> None:
        self.rows, self._more = rows, more

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        one = range(len(self))[index]
        actions = self.rows.num_actions
        return str(self.rows.action(one)) if one < actions else self._more[one - actions]

    def __len__(self) -> int:
        return self.rows.num_actions + len(self._more)
