"""The schedule: frozen rows of actions, one row for each rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal

from counterflow.errors import ScheduleError
from counterflow.schedule.action import Action, Kind

Mode = Literal["train", "forward"]
Rows = tuple[tuple[Action, ...], ...]


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
        if not any(self.rows):
            raise ScheduleError("a schedule got no actions; it needs a row of actions for each rank")
        for rank, row in enumerate(self.rows):
            for step, action in enumerate(row):
                self._fits(action, rank, step)

    def _fits(self, action: Action, rank: int, step: int) -> None:
        for part in action.parts:
            if part.stage >= self.num_stages or part.microbatch >= self.num_microbatches:
                raise ScheduleError(
                    f"rank {rank}, step {step}: {action} is outside the schedule's {self.num_stages} stages "
                    f"and {self.num_microbatches} micro-batches; correct the action or the stated numbers"
                )
            if self.mode == "forward" and part.kind is not Kind.F:
                raise ScheduleError(
                    f"rank {rank}, step {step}: {action} is a backward in a schedule of mode 'forward'; "
                    "drop it or state mode 'train'"
                )

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[Action]], name: str = "custom") -> Schedule:
        """The schedule of these rows, its numbers and mode read off the actions."""
        frozen = tuple(tuple(row) for row in rows)
        parts = [part for row in frozen for action in row for part in action.parts]
        return cls(
            rows=frozen,
            num_stages=1 + max((part.stage for part in parts), default=-1),
            num_microbatches=1 + max((part.microbatch for part in parts), default=-1),
            mode="forward" if all(part.kind is Kind.F for part in parts) else "train",
            name=name,
        )

    @property
    def num_ranks(self) -> int:
        """The number of rows, R."""
        return len(self.rows)

    @cached_property
    def _stages(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted({part.stage for action in row for part in action.parts})) for row in self.rows)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose modules ``rank`` holds, in model order."""
        return self._stages[rank]

    def ranks_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of ``stage``."""
        return tuple(rank for rank, stages in enumerate(self._stages) if stage in stages)

    @property
    def twins(self) -> dict[int, tuple[int, ...]]:
        """For each stage with more than one copy, the ranks that hold one."""
        holders = {stage: self.ranks_of(stage) for stage in sorted({*chain.from_iterable(self._stages)})}
        return {stage: ranks for stage, ranks in holders.items() if len(ranks) > 1}

    def forward_only(self) -> Schedule:
        """The same schedule with its forwards alone, in their order: what evaluation runs.

        It cannot deadlock where the whole does not: it waits for less.
        """
        rows = ((part for action in row for part in action.parts if part.kind is Kind.F) for row in self.rows)
        frozen = tuple(tuple(row) for row in rows)
        return Schedule(frozen, self.num_stages, self.num_microbatches, "forward", self.name)

    def __str__(self) -> str:
        return "\n".join(" ".join(str(action) for action in row) for row in self.rows)
