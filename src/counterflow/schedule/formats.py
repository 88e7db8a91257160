"""Schedules as text, CSV and JSON, there and back without loss.

CSV is what ``torch.distributed.pipelining`` reads and writes (as ``compute_only``): a row for each rank, an action in
each cell. Text is the same with spaces. Neither holds the name, which the reader is given, nor the numbers and the
mode, which a whole schedule shows; JSON holds all.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any

from counterflow.errors import ScheduleError
from counterflow.schedule.action import Action
from counterflow.schedule.schedule import Schedule

FORMAT = 1


def to_text(schedule: Schedule) -> str:
    """One line for each rank, actions with spaces between."""
    return f"{schedule}\n"


def from_text(text: str, name: str = "custom") -> Schedule:
    """The opposite of ``to_text``.

    Raises:
        ScheduleError: with row and column (from 1, counting actions) of the first cell that is no action.
    """
    return _parse([line.split() for line in text.splitlines()], name)


def to_csv(schedule: Schedule) -> str:
    """One row for each rank, an action in each cell, as torch pipelining writes it."""
    return "".join(",".join(str(action) for action in row) + "\n" for row in schedule.rows)


def from_csv(text: str, name: str = "custom") -> Schedule:
    """The opposite of ``to_csv``, and a reader of both formats that torch writes.

    What torch writes beside the actions is left out: empty cells, for idle slots, and in ``compute_comms`` its own
    sends, receives, reductions and (un)shardings. What is sent when, ``lower`` decides.

    Raises:
        ScheduleError: with row and column (from 1, as a spreadsheet counts) of the first bad cell.

    Example:
        >>> from counterflow.schedule import from_csv
        >>> print(from_csv("0F0,,0B0\\n1F0,1B0\\n"))
        0F0 0B0
        1F0 1B0
    """
    cells = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return _parse([["" if _TORCHS_OWN.fullmatch(cell) else cell for cell in line] for line in cells], name)


_TORCHS_OWN = re.compile("[0-9]{1,6}(?:(?:SEND|RECV)_[FB][0-9]{1,6}|UNSHARD|RESHARD|REDUCE_GRAD)")


def _parse(cells: list[list[str]], name: str) -> Schedule:
    rows = []
    for row, line in enumerate(cells, start=1):
        actions = []
        for column, cell in enumerate(line, start=1):
            if not cell.strip():
                continue
            try:
                actions.append(Action.parse(cell.strip()))
            except ScheduleError as error:
                raise ScheduleError(f"row {row}, column {column}: {error}") from None
        rows.append(actions)
    return Schedule.from_rows(rows, name)


def as_dict(schedule: Schedule) -> dict[str, Any]:
    """Plain data with stable keys: what ``counterflow schedule --json`` prints."""
    return {
        "format": FORMAT,
        "name": schedule.name,
        "mode": schedule.mode,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "ranks": [[str(action) for action in row] for row in schedule.rows],
    }


def to_json(schedule: Schedule) -> str:
    """The JSON text of ``as_dict``."""
    return json.dumps(as_dict(schedule)) + "\n"


def from_json(text: str) -> Schedule:
    """The opposite of ``to_json``; ``format``, ``name`` and ``mode`` may be missing, nothing else.

    Raises:
        ScheduleError: not JSON, not a schedule, or numbers that the rows contradict.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"the schedule is not JSON ({error}); write it with counterflow schedule --json") from None
    if not isinstance(data, dict) or not _is_rows(data.get("ranks")):
        raise ScheduleError(
            'a schedule in JSON needs "ranks", a list with one list of actions (text) for each rank; '
            "write one with counterflow schedule --json"
        )
    if data.get("format", FORMAT) != FORMAT:
        raise ScheduleError(
            f"the schedule has format {reprlib.repr(data['format'])}; this version reads format {FORMAT}"
        )
    name = data.get("name", "custom")
    if not isinstance(name, str):
        raise ScheduleError(f"the schedule has the name {reprlib.repr(name)}; a name is text")
    read = _parse(data["ranks"], name)
    if data.get("num_ranks", read.num_ranks) != read.num_ranks:
        raise ScheduleError(
            f'the schedule states "num_ranks": {reprlib.repr(data["num_ranks"])} and has {read.num_ranks} rows; '
            "make them agree"
        )
    return Schedule(
        rows=read.rows,
        num_stages=_count(data, "num_stages"),
        num_microbatches=_count(data, "num_microbatches"),
        mode=_mode(data.get("mode", read.mode)),
        name=read.name,
    )


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(isinstance(cell, str) for cell in row) for row in value
    )


def _count(data: dict[str, Any], key: str) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ScheduleError(
            f'a schedule in JSON needs "{key}", a whole number of at least 1; it has {reprlib.repr(value)}'
        )
    return value


def _mode(value: object) -> Any:
    if value not in ("train", "forward"):
        raise ScheduleError(f"the schedule has mode {reprlib.repr(value)}; a mode is 'train' or 'forward'")
    return value


_READERS = {
    ".json": lambda text, name: from_json(text),
    ".csv": from_csv,
    ".txt": from_text,
}


def read_schedule(path: str | os.PathLike[str]) -> Schedule:
    """The schedule in a .json, .csv or .txt file.

    Raises:
        ScheduleError: another ending, an unreadable file, or contents that are no schedule; with the path.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ScheduleError(f"{path} ends in {path.suffix!r}; a schedule is read from .json, .csv or .txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(
            f"{path} cannot be read as a schedule ({why}); give one as counterflow schedule writes it"
        ) from None
    try:
        return reader(text, path.stem)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
