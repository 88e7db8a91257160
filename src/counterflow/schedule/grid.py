"""The cells of a schedule around those that are wrong, marked: what stands below an error."""

from __future__ import annotations

from collections.abc import Iterable

from counterflow.errors import ScheduleError
from counterflow.schedule.schedule import Schedule

Place = tuple[int, int]
"""Rank and step; both count from 0."""

_AROUND = 3
"""Cells shown on either side of a marked one."""
_MOST_ROWS = 8


def marked(error: ScheduleError, schedule: Schedule, places: Iterable[Place]) -> ScheduleError:
    """``error`` with a note that shows ``places`` in the rows they stand in, between > and <.

    Example:
        >>> from counterflow import one_f_one_b
        >>> from counterflow.errors import ScheduleError
        >>> from counterflow.schedule.grid import marked
        >>> print(marked(ScheduleError("no"), one_f_one_b(2, 4), [(1, 1), (0, 5)]).__notes__[0])
          rank 0, steps 2 to 7: 0B0  0F2  0B1 >0F3< 0B2  0B3
          rank 1, steps 0 to 4: 1F0 >1B0< 1F1  1B1  1F2  ...
    """
    steps: dict[int, list[int]] = {}
    for rank, step in sorted(set(places)):
        steps.setdefault(rank, []).append(step)
    shown = [_line(schedule, rank, some) for rank, some in list(steps.items())[:_MOST_ROWS]]
    if len(steps) > _MOST_ROWS:
        shown.append((f"  and {len(steps) - _MOST_ROWS} more ranks", ""))
    width = max((len(head) for head, cells in shown if cells), default=0)
    if shown:
        error.add_note("\n".join(f"{head.ljust(width)}{cells}".rstrip() for head, cells in shown))
    return error


def _line(schedule: Schedule, rank: int, steps: list[int]) -> tuple[str, str]:
    """What the line is about, and its cells: each marked one with its neighbours."""
    row = schedule.rows[rank]
    marks = set(steps)
    near = [step for step in range(len(row)) if any(abs(step - mark) <= _AROUND for mark in marks)]
    if not near:
        return f"  rank {rank}:", f" ends after step {len(row) - 1}" if row else " no actions"
    cells = ""
    for index, step in enumerate(near):
        if index and step != near[index - 1] + 1:
            cells += " ..."
        cells += f">{row[step]}<" if step in marks else f" {row[step]} "
    return f"  rank {rank}, steps {near[0]} to {near[-1]}:", cells + (" ..." if near[-1] < len(row) - 1 else "")
