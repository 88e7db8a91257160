"""From a rank's steps to its actions: a generator says what comes when, the micro-batches number themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from counterflow.schedule.rows import B, F, I, Ints, Rows, W
from counterflow.schedule.schedule import Schedule

Step = tuple[str] | tuple[str, int] | tuple[str, int, int]
"""What a rank does next: ``("F", stage)``, and so B, I and W; ``("F&B", stage, stage)`` with the forward's first,
and so F&I; and ``("W",)``, the W of the oldest I of this rank that has none yet."""

_PARTS = {"F": (F,), "B": (B,), "I": (I,), "W": (W,), "F&B": (F, B), "F&I": (F, I)}


def from_steps(
    name: str,
    rows: Iterable[Sequence[Step]],
    num_stages: int,
    num_microbatches: int,
    first_ids: Sequence[Mapping[int, int]] | None = None,
) -> Schedule:
    """The schedule in which rank r takes the steps ``rows[r]``.

    In a pipeline micro-batches pass a stage in the order in which they come, so no step says which: the k-th forward
    of a stage is for its k-th micro-batch, so is the k-th B or I, and the k-th W is for that of the k-th I.
    ``first_ids[rank]`` names the first micro-batch of the stages that do not begin with 0.

    Example:
        >>> from counterflow.schedule.generators.steps import from_steps
        >>> print(from_steps("one", [[("F", 0)] * 2 + [("I", 0), ("W",)] * 2], num_stages=1, num_microbatches=2))
        0F0 0F1 0I0 0W0 0I1 0W1
    """
    columns = [_number(steps, first_ids[rank] if first_ids else {}) for rank, steps in enumerate(rows)]
    first = np.cumsum([0, *(len(row) for row in columns)])
    kind, stage, microbatch = np.moveaxis(np.concatenate(columns), 2, 0)
    return Schedule(Rows(first, kind, stage, microbatch), num_stages, num_microbatches, name=name)


def _number(steps: Sequence[Step], first_ids: Mapping[int, int]) -> Ints:
    """Kind, stage and micro-batch of both parts of every step, shape [steps, 2, 3]."""
    different = {step: code for code, step in enumerate(dict.fromkeys(steps))}
    cells = np.array([_cell(step) for step in different], dtype=np.int64).reshape(-1, 2, 3)
    table = cells[np.fromiter(map(different.__getitem__, steps), np.int64, len(steps))]
    parts = table.reshape(-1, 3)  # a view: what is written into it stands in the table
    kind, stage, microbatch = parts.T
    for one in np.unique(cells[:, :, 1][cells[:, :, 0] >= 0]):
        here = stage == one
        for some in (here & (kind == F), here & ((kind == B) | (kind == I))):
            microbatch[some] = first_ids.get(int(one), 0) + np.arange(some.sum())
    halves = kind == I
    oldest = parts[halves]
    for one in np.unique(stage[kind == W]):
        mine = oldest if one < 0 else oldest[oldest[:, 1] == one]
        late = (kind == W) & (stage == one)
        parts[late, 1:] = mine[: late.sum(), 1:]
    return table


def _cell(step: Step) -> list[tuple[int, int, int]]:
    what, *stages = step
    codes = _PARTS[what]
    cell = [(code, stage, 0) for code, stage in zip(codes, stages or [-1], strict=True)]
    return [*cell, (-1, -1, -1)][:2]
