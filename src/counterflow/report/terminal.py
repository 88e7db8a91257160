"""A schedule in time on a terminal: coloured cells to scale, or in a pipe plain text that nothing cuts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import groupby
from math import ceil, gcd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from counterflow.report.curve import HELD, Memory, amount
from counterflow.report.palette import darker, ink, shade
from counterflow.report.step import KINDS, SUMS, Step, nice
from counterflow.schedule import Action, Kind, Schedule
from counterflow.timeline import Timeline

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_NARROWEST = 20
_LONGEST_LINE = 5_000
_TICKS = 8
"""Columns from one mark of time to the next, at least."""
_LEVELS = " ▁▂▃▄▅▆▇█"
_HELD = "#a371f7"
_SUM = "#8c959f"


def print_schedule(
    schedule: Schedule, timeline: Timeline, *, memory: Memory | None = None, console: Console | None = None
) -> None:
    """Print ``schedule`` in the time of ``timeline``: a line for each rank, and one below it for ``memory``.

    On a terminal with colours the step is scaled to its width; elsewhere each action stands as its kind and
    micro-batch, however long the lines become, without any escape code.

    Raises:
        ReportError: the timeline does not hold exactly the actions of the schedule.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> schedule = one_f_one_b(2, 2)
        >>> print_schedule(schedule, simulate(schedule, Costs()))
        1f1b: 2 ranks, 2 micro-batches
        step 9 µs, bubble 3 µs on every rank; one column is 0.333 µs
        <BLANKLINE>
        rank 0  F0 F1 .  .  B0--- .  B1---   33.3 %
        rank 1  .  F0 B0--- F1 B1--- .  .    33.3 %
        <BLANKLINE>
        F forward, B backward, . idle
    """
    from rich.console import Console

    console = console or Console(highlight=False)
    step = Step(schedule, timeline)
    if console.is_terminal and console.color_system and not console.no_color:
        for line in _Coloured(step, memory, console.width).lines():
            console.print(line, no_wrap=True, crop=True)
    else:
        for text in _Plain(step, memory).lines():
            # Not through the console: it wraps at a width that a pipe does not have.
            print(text, file=console.file)


class _View:
    """What both views share: the scale, and the lines around the rows."""

    def __init__(self, step: Step, memory: Memory | None) -> None:
        self.step, self.memory = step, memory
        self.label_width = len(f"rank {len(step.rows) - 1}") + 2

    def quantum_ns(self) -> int:
        """The longest time of which every start and end is a whole multiple."""
        edges = (ns - self.step.origin_ns for row in self.step.rows for _, span in row for ns in span[2:4])
        return reduce(gcd, edges, 0) or 1

    def heading(self, column_ns: float) -> Iterator[str]:
        """Title, figures and scale."""
        unit_ns = 1e6 if self.step.unit == "ms" else 1e3
        yield "".join(c if c.isprintable() else " " for c in self.step.title())
        yield f"{self.step.figures()}; one column is {column_ns / unit_ns:.3g} {self.step.unit}"
        yield ""

    def held(self, memory: Memory, rank: int, columns: int, column_ns: float) -> tuple[str, str]:
        """A bar for the most that ``rank`` holds in each column, all ranks on one scale; and its peak."""
        times, held = memory.curves[rank]
        starts = self.step.origin_ns + column_ns * np.arange(columns + 1)
        first = np.maximum(np.searchsorted(times, starts[:-1], side="right") - 1, 0)
        last = np.searchsorted(times, starts[1:], side="left")
        most = (int(held[a:b].max(initial=0)) for a, b in zip(first.tolist(), last.tolist(), strict=True))
        bars = "".join(_LEVELS[ceil((len(_LEVELS) - 1) * value / max(memory.most, 1))] for value in most)
        return bars, amount(int(held.max(initial=0)), memory.unit, short=True)


class _Cell(NamedTuple):
    """A coloured stretch of a row, in half columns, and the text that stands in it where it fits."""

    start: int
    end: int
    fill: str
    text: str


class _Coloured(_View):
    """Cells in the colours of the picture, on a grid of half columns."""

    def __init__(self, step: Step, memory: Memory | None, width: int) -> None:
        super().__init__(step, memory)
        halves = 2 * max(width - self.label_width - len("  100.0 %"), _NARROWEST)
        quantum_ns = self.quantum_ns()
        each = halves * quantum_ns // step.makespan_ns if step.makespan_ns else 0
        # Where every edge can stand on the grid, equal durations get equal widths; whole columns read best.
        each -= each % 2 if each > 3 else 0
        self.halves_per_ns = each / quantum_ns if each else halves / max(step.makespan_ns, 1)
        self.in_whole_columns = each > 0 and each % 2 == 0
        self.columns = ceil(step.makespan_ns * self.halves_per_ns / 2)
        self.column_ns = 2 / self.halves_per_ns
        self.width = width
        # Where even the longest action has no room for an id, a stray one here and there would only distract.
        longest_ns = max(span.duration_ns for row in step.rows for _, span in row)
        self.shows_ids = longest_ns >= self.column_ns * len(str(step.schedule.num_microbatches - 1))

    def lines(self) -> Iterator[Text]:
        """The whole view."""
        from rich.text import Text

        title, *rest = self.heading(self.column_ns)
        yield Text(title, style="bold")
        yield from (Text(line, style="dim") for line in rest)
        for rank in self.step.ranks:
            name = (f"rank {rank}".ljust(self.label_width), "bold")
            yield Text.assemble(name, self.row(rank), (f"  {self.step.bubble_share(rank):>7}", "dim"))
            if self.memory is not None:
                bars, peak = self.held(self.memory, rank, self.columns, self.column_ns)
                yield Text.assemble(" " * self.label_width, (bars, _HELD), (f"  {peak:>7}", "dim"))
        yield self.axis()
        yield Text("")
        yield from self.legend()

    def row(self, rank: int) -> Text:
        """The cells of one rank."""
        from rich.text import Text

        owner: list[_Cell | None] = [None] * (2 * self.columns)
        letters: dict[int, str] = {}
        for cell in self.cells(rank):
            owner[cell.start : cell.end] = [cell] * (cell.end - cell.start)
            first = -(-cell.start // 2)
            room = cell.end // 2 - first
            if self.shows_ids and self.fits(cell):
                letters.update(enumerate(cell.text, start=first + (room - len(cell.text)) // 2))
        row = Text()
        columns = [
            _column(owner[2 * column], owner[2 * column + 1], letters.get(column)) for column in range(self.columns)
        ]
        for style, run in groupby(columns, key=lambda drawn: drawn[1]):
            row.append("".join(letter for letter, _ in run), style=style)
        return row

    def fits(self, cell: _Cell) -> bool:
        """Whether its id can stand in a cell; off the grid it needs some air, or it reads as one with the next."""
        needed = len(cell.text) if self.in_whole_columns else len(cell.text) + 1
        return 2 * needed <= cell.end - cell.start

    def cells(self, rank: int) -> Iterator[_Cell]:
        """The parts of a rank's actions; of two alike side by side the second is a little darker."""
        last = _Cell(0, 0, "", "")
        for action, span in self.step.rows[rank]:
            for part, start_ns, end_ns in self.step.parts(action, span):
                start, end = (round(ns * self.halves_per_ns) for ns in (start_ns, end_ns))
                fill = shade(part.kind, self.step.shade(rank, part), self.step.num_shades)
                if self.shows_ids and last.end == start and last.fill == fill:
                    fill = darker(fill)
                last = _Cell(start, end, fill, str(part.microbatch))
                yield last
        for span in self.step.sums[rank]:
            start, end = (round((ns - self.step.origin_ns) * self.halves_per_ns) for ns in span[2:4])
            yield _Cell(start, end, _SUM, "")

    def axis(self) -> Text:
        """Time, at every one, two or five units of ten."""
        from rich.text import Text

        line = ""
        for tick_ns in range(0, self.step.makespan_ns + 1, nice(_TICKS * self.column_ns)):
            column = round(tick_ns / self.column_ns)
            line = line.ljust(column) + self.step.time(tick_ns)
        return Text(f"{self.step.unit} →".ljust(self.label_width) + line, style="dim")

    def legend(self) -> Iterator[Text]:
        """What the colours mean, in as many lines as the width needs."""
        from rich.text import Text

        margin = " " * self.label_width
        line = Text(margin)
        for item in self.meanings():
            if len(line) > len(margin) and len(line) + len(item) > self.width:
                yield line
                line = Text(margin)
            line = Text.assemble(line, item, "   ")
        yield line

    def meanings(self) -> Iterator[Text]:
        """The items of the legend."""
        from rich.text import Text

        for kind, label in KINDS.items():
            if kind in self.step.kinds:
                simple = (Kind.F, Kind.B) if kind is Kind.F_B else (kind,)
                swatches = [("  ", f"on {shade(one, 0, self.step.num_shades)}") for one in simple]
                yield Text.assemble(*swatches, f" {label}")
        fills = [shade(Kind.F, index, self.step.num_shades) for index in range(self.step.num_shades)]
        swatches = []
        for fill, (text, label) in zip(fills, self.step.meaning_of_shades(), strict=False):
            swatches.append((text.center(3), f"{ink(fill)} on {fill}"))
            if label:
                yield Text.assemble(*swatches, f" {label}")
                swatches = []
        yield Text.assemble(("··", "dim"), " idle")
        if any(self.step.sums):
            yield Text.assemble(("  ", f"on {_SUM}"), f" {SUMS}")
        if self.memory is not None:
            yield Text.assemble((_LEVELS[-5::2], _HELD), f" {HELD}, at the right its peak")


def _column(left: _Cell | None, right: _Cell | None, letter: str | None) -> tuple[str, str]:
    """The character of two half columns, and its style."""
    if left is right:
        return ("·", "dim") if left is None else (letter or " ", f"{ink(left.fill)} on {left.fill}")
    if left is None:
        assert right is not None
        return "▐", right.fill
    return "▌", left.fill if right is None else f"{left.fill} on {right.fill}"


class _Plain(_View):
    """Actions as text, in the manner of the staircase."""

    def __init__(self, step: Step, memory: Memory | None) -> None:
        super().__init__(step, memory)
        needed = max(
            (
                (len(_text(action)) + 1) / span.duration_ns
                for row in step.rows
                for action, span in row
                if span.duration_ns
            ),
            default=1.0,
        )
        quantum_ns = self.quantum_ns()
        self.idle_every = max(ceil(needed * quantum_ns), 3)
        self.columns_per_ns = self.idle_every / quantum_ns
        if step.makespan_ns * self.columns_per_ns > _LONGEST_LINE:
            self.columns_per_ns = min(needed, _LONGEST_LINE / step.makespan_ns)

    def lines(self) -> Iterator[str]:
        """The whole view."""
        columns = round(self.step.makespan_ns * self.columns_per_ns)
        yield from self.heading(1 / self.columns_per_ns)
        for rank in self.step.ranks:
            name = f"rank {rank}".ljust(self.label_width)
            yield f"{name}{self.row(rank, columns)}  {self.step.bubble_share(rank)}"
            if self.memory is not None:
                bars, peak = self.held(self.memory, rank, columns, 1 / self.columns_per_ns)
                yield f"{' ' * self.label_width}{bars}  {peak}"
        yield ""
        simple = [kind for kind in KINDS if kind in self.step.kinds and kind is not Kind.F_B]
        pairs = [f"F&B {KINDS[Kind.F_B]}"] * (Kind.F_B in self.step.kinds)
        held = [f"{_LEVELS[-5::2]} {HELD}, at the right its peak"] * (self.memory is not None)
        sums = [f"= {SUMS}"] * any(self.step.sums)
        yield ", ".join([*(f"{kind.value} {KINDS[kind]}" for kind in simple), *pairs, ". idle", *sums, *held])

    def row(self, rank: int, columns: int) -> str:
        """The actions of one rank."""
        line = "".join("." if column % self.idle_every == 0 else " " for column in range(columns))
        now = 0
        for action, span in self.step.rows[rank]:
            start, end = (round((ns - self.step.origin_ns) * self.columns_per_ns) for ns in span[2:4])
            start = max(start, now)
            now = max(start, end)
            text, room = _text(action), now - start - 1
            text = text.ljust(room, "-") if len(text) <= room else "-" * max(room, 0)
            line = line[:start] + (text + " ")[: now - start] + line[now:]
        for span in self.step.sums[rank]:
            start, end = (round((ns - self.step.origin_ns) * self.columns_per_ns) for ns in span[2:4])
            line = line[:start] + "=" * (end - start) + line[end:]
        return line


def _text(action: Action) -> str:
    return "&".join(f"{part.kind.value}{part.microbatch}" for part in action.parts)
