"""A schedule in time as plain text: the staircase of docstrings and terminals."""

from __future__ import annotations

from counterflow.errors import ReportError, ScheduleError
from counterflow.schedule import Action
from counterflow.timeline import COMPUTE, Span, Timeline


def staircase(timeline: Timeline, unit_us: float) -> str:
    """The actions of every rank in time, a line for each rank and ``unit_us`` microseconds for each cell.

    An action stands as its kind and micro-batch, without its stage; an overlapped pair as ``F3&B1``. One that
    takes several units is filled with ``-`` up to the last of them, an idle unit is a dot.

    Raises:
        ReportError: a time that is no whole number of units, a span that is no action, or two at once on a rank.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> print(staircase(simulate(one_f_one_b(2, 2), Costs(1, 2)), unit_us=1))
        F0 F1 .  .  B0--- .  B1---
        .  F0 B0--- F1 B1--- .  .
    """
    if not 0.001 <= unit_us < float("inf"):
        raise ReportError(f"a staircase got a unit of {unit_us} µs; it needs at least 0.001 µs")
    unit_ns = round(unit_us * 1000)
    spans = [span for span in timeline if span.lane == COMPUTE]
    origin_ns = min((span.start_ns for span in spans), default=0)
    rows: list[list[tuple[int, int, str]]] = [[] for _ in range(timeline.num_ranks)]
    for span in spans:
        rows[span.rank].append(_cell(span, origin_ns, unit_ns))
    cells = [cell for row in rows for cell in row]
    # As wide as the text with least room needs, a space behind it; three while ids are below ten.
    width = max([3, *(-(-(len(text) + 1) // (end - start)) for start, end, text in cells)])
    last = max((end for _, end, _ in cells), default=0)
    return "\n".join(_line(rank, row, width, last) for rank, row in enumerate(rows))


def _cell(span: Span, origin_ns: int, unit_ns: int) -> tuple[int, int, str]:
    """First unit, the unit behind the last one, and the text."""
    start, rest_of_start = divmod(span.start_ns - origin_ns, unit_ns)
    duration, rest = divmod(span.duration_ns, unit_ns)
    if rest_of_start or rest or not duration:
        raise ReportError(
            f"rank {span.rank}: {span.name} starts {microseconds(span.start_ns - origin_ns)} µs into the step and "
            f"takes {microseconds(span.duration_ns)} µs; a staircase needs whole multiples of its unit, here "
            f"{microseconds(unit_ns)} µs: give a unit that divides every time, or draw an SVG"
        )
    try:
        parts = Action.parse(span.name).parts
    except ScheduleError as error:
        raise ReportError(f"rank {span.rank}: a staircase draws actions alone: {error}") from None
    return start, start + duration, "&".join(f"{part.kind.value}{part.microbatch}" for part in parts)


def _line(rank: int, row: list[tuple[int, int, str]], width: int, last: int) -> str:
    idle = ".".ljust(width)
    line, now = "", 0
    for start, end, text in row:
        if start < now:
            raise ReportError(
                f"rank {rank}: {text} starts before the action ahead of it has ended; a staircase shows one at a time"
            )
        # A single unit is padded, a longer span is drawn through to its end.
        fill = "-" if end - start > 1 else " "
        line += idle * (start - now) + text.ljust((end - start) * width - 1, fill) + " "
        now = end
    return (line + idle * (last - now)).rstrip()


def microseconds(ns: int) -> str:
    """Nanoseconds as microseconds, exactly and without a tail of zeros.

    Example:
        >>> microseconds(1500), microseconds(2_000_000)
        ('1.5', '2000')
    """
    return f"{ns // 1000}.{ns % 1000:03d}".rstrip("0").rstrip(".")
