"""A schedule in time as an SVG, in the manner of the figure published with DualPipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from counterflow.errors import ReportError
from counterflow.report.curve import HELD, Memory, amount, without_dips
from counterflow.report.drawing import (
    ABOVE,
    BELOW,
    DIGIT,
    ROW,
    Part,
    Theme,
    cell_style,
    draw_cell,
    draw_plain,
    draw_text,
    px,
    safe,
    steps,
)
from counterflow.report.gaps import explain, gaps
from counterflow.report.step import KINDS, SUMS, Step, nice
from counterflow.schedule import Action, Kind, Schedule
from counterflow.timeline import Span, Timeline

LEFT, RIGHT, TOP = 68, 66, 70
SHORTEST = 22
"""Width of the shortest usual action: two digits and some air."""
LONGEST = 40_000
"""Rows are not stretched beyond this width; ids are left out where they do not fit then."""
MANY = 10_000
"""With more actions than this a cell's hover text leaves out what the action's text says, for the file's size."""
CURVE, PEAK = 26, 40
"""Height of a memory curve with the air above it, and the room that its peak needs beside it."""


def schedule_svg(
    schedule: Schedule, timeline: Timeline, *, memory: Memory | None = None, theme: Theme | None = None
) -> str:
    """The picture of ``schedule`` in the time of ``timeline``: one step, simulated or measured.

    Every action is a cell with its micro-batch, every idle stretch a gap; hovering tells action, stage and
    times, and what a gap waited for. Where a rank works for two directions, or on several stages, the later
    ones are darker. ``memory`` adds a curve below each row. ``theme`` fixes light or dark, which otherwise
    follows the viewer's preference.

    Raises:
        ReportError: the timeline does not hold exactly the actions of the schedule, ``memory`` is not of its
            ranks, or the theme is none.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> schedule = one_f_one_b(4, 8)
        >>> schedule_svg(schedule, simulate(schedule, Costs())).count("<title>")
        79

    Source: the figures in the README of the published DualPipe.
    """
    picture = _Picture(Step(schedule, timeline), memory, theme)
    return "\n".join(picture.lines()) + "\n"


class _Picture:
    """What its parts share: the step, the scale of time, the sizes of the page."""

    def __init__(self, step: Step, memory: Memory | None, theme: Theme | None) -> None:
        if memory is not None and len(memory.curves) != len(step.rows):
            raise ReportError(
                f"the memory has curves of {len(memory.curves)} ranks and the schedule has {len(step.rows)}; "
                "give one for each rank"
            )
        self.step, self.memory, self.theme = step, memory, theme
        widest_id = DIGIT * len(str(step.schedule.num_microbatches - 1))
        shortest = max(SHORTEST, widest_id + 8)
        self.px_per_ns = min(shortest / step.usual_shortest_ns(), LONGEST / max(step.makespan_ns, 1))
        self.width = step.makespan_ns * self.px_per_ns
        self.spells_out = sum(map(len, step.rows)) <= MANY
        self.pitch = ROW + (CURVE if memory else 0)
        self.below = TOP + self.pitch * len(step.rows)
        self.page = round(LEFT + max(self.width, 400) + RIGHT + (PEAK if memory else 0))

    def lines(self) -> Iterator[str]:
        """The elements of the file."""
        step, page = self.step, self.page
        legend, height = self.legend(self.below + 40)
        yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{page}" height="{height}" role="img"'
        yield f' viewBox="0 0 {page} {height}" aria-label="{safe(step.title())}">'
        yield f"<style>\n{cell_style(self.theme, step.num_shades, page)}</style>"
        yield f'<rect class="page" width="{page}" height="{height}"/>'
        yield draw_text(LEFT + self.width + 10, TOP - 8, "bubble", "note")
        found: list[list[str]] = [[] for _ in step.ranks]
        for gap in gaps(step):
            found[gap.rank].append(draw_plain("gap", self.x(gap.start_ns), self.x(gap.end_ns), explain(gap, step)))
        for rank in step.ranks:
            yield from self.row(rank, found[rank])
        yield from self.axis()
        yield from self.names(legend)
        yield "</svg>"

    def x(self, ns: int) -> float:
        """Where a moment of the timeline stands in its row."""
        return (ns - self.step.origin_ns) * self.px_per_ns

    def row(self, rank: int, idle: list[str]) -> Iterator[str]:
        """One rank: its gaps, its cells, its share of bubble, and below them its memory."""
        yield f'<g class="cells" transform="translate({LEFT} {TOP + self.pitch * rank + ABOVE})">'
        yield from idle
        for action, span in self.step.rows[rank]:
            yield self.cell(rank, action, span)
        for span in self.step.sums[rank]:
            start, end = (self.step.time(ns - self.step.origin_ns) for ns in (span.start_ns, span.end_ns))
            told = f"rank {rank} sums gradients, {span.name}, {start} to {end} {self.step.unit}"
            yield draw_plain("sum", self.x(span.start_ns), self.x(span.end_ns), told)
        yield "</g>"
        line = TOP + self.pitch * rank + ABOVE
        yield draw_text(LEFT + self.width + 10, line, self.step.bubble_share(rank), "note")
        if self.memory is not None:
            yield from self.curve(rank, self.memory, line + BELOW + CURVE - 3)

    def cell(self, rank: int, action: Action, span: Span) -> str:
        """One action where it stands in time."""
        parts = [
            Part(
                part.kind,
                self.step.shade(rank, part),
                str(part.microbatch),
                start * self.px_per_ns,
                end * self.px_per_ns,
            )
            for part, start, end in self.step.parts(action, span)
        ]
        return draw_cell(parts, self.hover(action, span))

    def hover(self, action: Action, span: Span) -> str:
        """What a cell tells under the pointer."""
        what = " and ".join(f"stage {part.stage}, micro-batch {part.microbatch}" for part in action.parts)
        told = f"{action}: {what}" if self.spells_out else str(action)
        start, end = (self.step.time(ns - self.step.origin_ns) for ns in (span.start_ns, span.end_ns))
        return f"{told}, {start} to {end} {self.step.unit}"

    def curve(self, rank: int, memory: Memory, base: int) -> Iterator[str]:
        """What a rank holds over time, all ranks on one scale; ``base`` is the line of nothing."""
        times, held = memory.curves[rank]
        height = (CURVE - 8) / max(memory.most, 1)
        points = [(0.0, 0.0), *((self.x(time), -height * value) for time, value in without_dips(times, held))]
        points += [(self.width, points[-1][1]), (self.width, 0.0)]
        most = int(held.max(initial=0))
        told = f"rank {rank} holds at most {amount(most, memory.unit)} at once"
        path = f'<path class="held" d="{steps(points)}"><title>{safe(told)}</title></path>'
        yield f'<g transform="translate({LEFT} {base})">{path}<path class="axis" d="M0 0H{px(self.width)}"/></g>'
        yield draw_text(
            LEFT + self.width + 10,
            base - 3,
            f"peak {amount(most, memory.unit, short=True)}",
            "note",
        )

    def axis(self) -> Iterator[str]:
        """Time, with a mark at every one, two or five units of ten."""
        y = self.below
        step_ns = nice(60 / self.px_per_ns)
        for tick_ns in range(0, self.step.makespan_ns + 1, step_ns):
            x = LEFT + tick_ns * self.px_per_ns
            yield f'<path class="axis" d="M{px(x)} {y}v6"/>' + draw_text(
                x, y + 22, self.step.time(tick_ns), "note tick"
            )
        yield draw_text(LEFT + self.width + 24, y + 22, self.step.unit, "note")

    def names(self, legend: Sequence[str]) -> Iterator[str]:
        """What stays in sight while the page is scrolled sideways: title, ranks, legend."""
        yield '<g class="stay">'
        yield f'<path class="page" d="M-20 {TOP - 1}H{LEFT - 1}V{self.below}h-8v30H-20z"/>'
        yield draw_text(LEFT, 28, self.step.title(), "title")
        yield draw_text(LEFT, 50, self.step.figures(), "note")
        for rank in self.step.ranks:
            yield draw_text(LEFT - 10, TOP + self.pitch * rank + ABOVE, f"rank {rank}", "rank")
        yield draw_text(LEFT - 10, self.below + 22, "Time →", "rank")
        yield from legend
        yield "</g>"

    def legend(self, y: int) -> tuple[list[str], int]:
        """What the colours mean, in as many lines as the page needs; and where the last of them ends."""
        lines: list[str] = []
        x, page = LEFT, min(self.page, 1500)
        for swatch, width, label in self.meanings():
            end = round(x + width + 8 + 5.9 * len(label))
            if x > LEFT and end > page:
                x, y, end = LEFT, y + 34, LEFT + end - x
            lines.append(f'<g class="cells" transform="translate({x} {y + ABOVE})">{swatch}</g>')
            lines.append(draw_text(x + width + 8, y + ABOVE, label))
            x = end + (18 if label else -8)
        return lines, y + ROW + 20

    def meanings(self) -> Iterator[tuple[str, int, str]]:
        """Each kind that occurs, how shades tell directions or stages, and what is no action: swatch, width, label."""
        for kind, label in KINDS.items():
            if kind in self.step.kinds:
                simple = [Kind.F, Kind.B] if kind is Kind.F_B else [kind]
                ends = [SHORTEST, 3 * SHORTEST] if kind is Kind.F_B else [SHORTEST * (1 + (kind is Kind.B))]
                starts = [0, *ends]
                parts = [Part(one, 0, "", start, end) for one, start, end in zip(simple, starts, ends, strict=False)]
                yield draw_cell(parts), ends[-1], label
        for index, (text, label) in enumerate(self.step.meaning_of_shades()):
            yield draw_cell([Part(Kind.F, index, text, 0, SHORTEST)]), SHORTEST, label
        if any(self.step.bubble_ns(rank) for rank in self.step.ranks):
            yield draw_plain("gap", 0, SHORTEST), SHORTEST, "idle"
        if any(self.step.sums):
            yield draw_plain("sum", 0, SHORTEST), SHORTEST, SUMS
        if self.memory is not None:
            yield f'<path class="held" d="M0 {BELOW}V-4H12V-12H22V{BELOW}z"/>', SHORTEST, HELD
