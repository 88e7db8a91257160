"""The schedule: frozen rows of actions, one row for each rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from counterflow.errors import ScheduleError
from counterflow.schedule.action import Action
from counterflow.schedule.rows import F, Rows

Mode = Literal["train", "forward"]
MOST_RANKS = 2**16


@dataclass(frozen=True)
class Schedule:
    """What every rank of a pipeline computes, in order.

    ``rows[rank]`` are the rank's actions; stages count ``0 .. num_stages-1`` in model order,
    micro-batches ``0 .. num_microbatches-1`` across both directions. Which rank holds a stage
    is said by the rows alone: in DualPipe a stage stands on two ranks, its twins, each for one
    half of the micro-batches. Two schedules are equal when they do the same; the name is a label.

    A schedule may be built that would not run: ``check`` is the judge.

    Raises:
        ScheduleError: no rows, or an action outside the stated numbers of stages and micro-batches.

    Example:
        >>> from counterflow import dualpipe
        >>> schedule = dualpipe(2, 4)
        >>> schedule.num_ranks, schedule.num_stages, schedule.stages_of(0), schedule.twins
        (2, 2, (0, 1), {0: (0, 1), 1: (0, 1)})
        >>> print(schedule.forward_only())
        0F0 1F2 0F1 1F3
        0F2 1F0 0F3 1F1
    """

    rows: Rows
    num_stages: int
    num_microbatches: int
    mode: Mode = "train"
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        rows = Rows.of(self.rows)
        object.__setattr__(self, "rows", rows)
        if self.mode not in get_args(Mode):
            raise ScheduleError(f"a schedule got mode {self.mode!r}; it needs 'train' or 'forward'")
        if len(rows) > MOST_RANKS:
            raise ScheduleError(f"a schedule got {len(rows)} rows; it needs one for each of at most {MOST_RANKS} ranks")
        if not rows.num_actions:
            raise ScheduleError("a schedule got no actions; it needs a row of actions for each rank")
        outside = (rows.stage >= self.num_stages) | (rows.microbatch >= self.num_microbatches)
        if outside.any():
            raise ScheduleError(
                f"{self._cell(outside)} is outside the schedule's {self.num_stages} stages "
                f"and {self.num_microbatches} micro-batches; correct the action or the stated numbers"
            )
        backward = rows.kind > F
        if self.mode == "forward" and backward.any():
            raise ScheduleError(
                f"{self._cell(backward)} is a backward in a schedule of mode 'forward'; drop it or state mode 'train'"
            )

    def _cell(self, wrong: npt.NDArray[np.bool_]) -> str:
        """Where the first wrong action stands, and which one it is."""
        index = int(wrong.any(axis=1).argmax())
        rank, step = self.rows.place(index)
        return f"rank {rank}, step {step}: {self.rows.action(index)}"

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[Action]], name: str = "custom") -> Schedule:
        """The schedule of these rows, its numbers and mode read off the actions."""
        read = Rows.of(rows)
        return cls(
            rows=read,
            num_stages=1 + int(read.stage.max(initial=-1)),
            num_microbatches=1 + int(read.microbatch.max(initial=-1)),
            mode="train" if (read.kind > F).any() else "forward",
            name=name,
        )

    @property
    def num_ranks(self) -> int:
        """The number of rows, R."""
        return len(self.rows)

    @cached_property
    def _stages(self) -> tuple[tuple[int, ...], ...]:
        first = self.rows.first
        stages = (self.rows.stage[start:end] for start, end in zip(first, first[1:], strict=False))
        return tuple(tuple(int(stage) for stage in np.unique(some) if stage >= 0) for some in stages)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose modules ``rank`` holds, in model order."""
        return self._stages[rank]

    def ranks_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of ``stage``."""
        return tuple(rank for rank, stages in enumerate(self._stages) if stage in stages)

    @property
    def twins(self) -> dict[int, tuple[int, ...]]:
        """For each stage with more than one copy, the ranks that hold one."""
        holders: dict[int, list[int]] = {}
        for rank, stages in enumerate(self._stages):
            for stage in stages:
                holders.setdefault(stage, []).append(rank)
        return {stage: tuple(ranks) for stage, ranks in sorted(holders.items()) if len(ranks) > 1}

    def forward_only(self) -> Schedule:
        """The same schedule with its forwards alone, in their order: what evaluation runs.

        It cannot deadlock where the whole does not: it waits for less.
        """
        forwards = self.rows.kind[:, 0] == F  # an overlapped action has its forward first
        kept = np.concatenate(([0], np.cumsum(forwards)))
        columns = (np.stack([column[forwards, 0], np.full(kept[-1], -1)], axis=1) for column in self.rows.parts)
        rows = Rows(kept[self.rows.first], *columns)
        return Schedule(rows, self.num_stages, self.num_microbatches, "forward", self.name)

    def __str__(self) -> str:
        return "\n".join(" ".join(str(action) for action in row) for row in self.rows)
