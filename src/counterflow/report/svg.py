"""A schedule in time as an SVG, in the manner of the figure published with DualPipe."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from math import floor, log10
from statistics import median

from counterflow.errors import ReportError
from counterflow.report.drawing import DIGIT, ROW, STYLE, Part, draw_cell, draw_text, px, safe
from counterflow.report.text import microseconds
from counterflow.schedule import Action, Kind, Schedule
from counterflow.timeline import COMPUTE, Span, Timeline

LEFT, RIGHT, TOP = 68, 66, 70
SHORTEST = 22
"""Width of the shortest action: two digits and some air."""
LONGEST = 12_000
"""Rows are not stretched beyond this width; ids are left out where they do not fit then."""

KINDS = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward for input",
    Kind.W: "backward for weights",
    Kind.F_B: "overlapped forward & backward",
}

Row = list[tuple[Action, Span]]


def schedule_svg(schedule: Schedule, timeline: Timeline) -> str:
    """The picture of ``schedule`` in the time of ``timeline``: one step, simulated or measured.

    Every action is a cell with its micro-batch; hovering tells action, stage and times. Where a rank works for
    two directions, or on two stages, the second is darker. Light or dark follows the viewer's preference.

    Raises:
        ReportError: the timeline does not hold exactly the actions of the schedule.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> schedule = one_f_one_b(4, 8)
        >>> schedule_svg(schedule, simulate(schedule, Costs())).count("<title>")
        64

    Source: the figures in the README of the published DualPipe.
    """
    picture = _Picture(schedule, timeline)
    return "\n".join(picture.lines()) + "\n"


class _Picture:
    """What its parts share: the rows, the scale of time, the two directions."""

    def __init__(self, schedule: Schedule, timeline: Timeline) -> None:
        self.schedule = schedule
        self.rows = _rows(schedule, timeline)
        spans = [span for row in self.rows for _, span in row]
        self.origin_ns = min(span.start_ns for span in spans)
        self.makespan_ns = max(span.end_ns for span in spans) - self.origin_ns
        self.unit = "ms" if self.makespan_ns >= 10_000_000 else "µs"
        shortest_ns = min((span.duration_ns for span in spans if span.duration_ns), default=1)
        widest_id = DIGIT * len(str(schedule.num_microbatches - 1))
        self.px_per_ns = min(max(SHORTEST, widest_id + 8) / shortest_ns, LONGEST / max(self.makespan_ns, 1))
        self.width = self.makespan_ns * self.px_per_ns
        self.forward_shares = _forward_shares(self.rows)
        self.has_twins = bool(schedule.twins)
        self.entry = {
            part.microbatch: rank
            for rank, row in enumerate(schedule.rows)
            for action in row
            for part in action.parts
            if part.kind is Kind.F and part.stage == 0
        }

    def lines(self) -> Iterator[str]:
        """The elements of the file."""
        width = round(LEFT + max(self.width, 400) + RIGHT)
        below = TOP + ROW * len(self.rows)
        legend, height = self.legend(width, below + 40)
        yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img"'
        yield f' viewBox="0 0 {width} {height}" aria-label="{safe(self.title())}"><style>{STYLE}</style>'
        yield f'<rect class="page" width="{width}" height="{height}"/>'
        yield from self.heading()
        for rank, row in enumerate(self.rows):
            yield from self.row(rank, row)
        yield from self.axis(below)
        yield from legend
        yield "</svg>"

    def title(self) -> str:
        """Name, mode and sizes."""
        schedule = self.schedule
        name = schedule.name if len(schedule.name) <= 40 else f"{schedule.name[:39]}…"
        mode = ", forward only" if schedule.mode == "forward" else ""
        ranks, ids = schedule.num_ranks, schedule.num_microbatches
        return f"{name}: {ranks} rank{'s' * (ranks > 1)}, {ids} micro-batch{'es' * (ids > 1)}{mode}"

    def heading(self) -> Iterator[str]:
        """Title, and the figures of the whole step."""
        bubbles = [self.bubble_ns(row) for row in self.rows]
        least, most = self.time(min(bubbles)), self.time(max(bubbles))
        bubble = f"{most} {self.unit} on every rank" if least == most else f"{least} to {most} {self.unit}"
        yield draw_text(LEFT, 28, self.title(), "title")
        yield draw_text(LEFT, 50, f"step {self.time(self.makespan_ns)} {self.unit}, bubble {bubble}", "note")
        yield draw_text(LEFT + self.width + 10, TOP - 8, "bubble", "note")

    def bubble_ns(self, row: Row) -> int:
        """The time in which a rank computes nothing; it does one action at a time."""
        return self.makespan_ns - sum(span.duration_ns for _, span in row)

    def row(self, rank: int, row: Row) -> Iterator[str]:
        """One rank: its name, its cells on the idle ground, and its share of bubble."""
        share = 100 * self.bubble_ns(row) / max(self.makespan_ns, 1)
        yield f'<g transform="translate({LEFT} {TOP + ROW * rank})">'
        yield draw_text(-10, 17, f"rank {rank}", "rank")
        yield f'<rect class="idle" width="{px(self.width)}" height="{ROW}"/>'
        for action, span in row:
            yield self.cell(rank, action, span)
        yield draw_text(self.width + 10, 17, f"{share:.1f} %", "note")
        yield "</g>"

    def cell(self, rank: int, action: Action, span: Span) -> str:
        """One action where it stands in time."""
        left, width = ((ns * self.px_per_ns) for ns in (span.start_ns - self.origin_ns, span.duration_ns))
        widths = [width]
        if action.pair is not None:
            # Nothing tells the two apart inside a pair, so they share it as they do when they stand alone.
            forward = width * self.forward_shares[action.pair[1].kind]
            widths = [forward, width - forward]
        parts = [
            Part(self.shade(rank, part), str(part.microbatch), wide)
            for part, wide in zip(action.parts, widths, strict=True)
        ]
        return draw_cell(parts, left, self.hover(action, span))

    def hover(self, action: Action, span: Span) -> str:
        """What a cell tells under the pointer."""
        what = " and ".join(f"stage {part.stage}, micro-batch {part.microbatch}" for part in action.parts)
        start, end = (self.time(ns - self.origin_ns) for ns in (span.start_ns, span.end_ns))
        return f"{action}: {what}, {start} to {end} {self.unit}"

    def time(self, ns: int) -> str:
        """``ns`` in the picture's unit: exactly where that is simulated microseconds, to a tenth in milliseconds."""
        return microseconds(ns) if self.unit == "µs" else f"{ns / 1e6:.1f}".removesuffix(".0")

    def shade(self, rank: int, part: Action) -> str:
        """The classes that colour a part: its kind, and whether it belongs to the second direction."""
        if self.has_twins:
            second = self.entry.get(part.microbatch) != self.entry.get(0)
        else:
            second = self.schedule.stages_of(rank).index(part.stage) % 2 == 1
        return f"{part.kind.name} second" if second else part.kind.name

    def axis(self, y: int) -> Iterator[str]:
        """Time, with a mark at every one, two or five units of ten."""
        yield draw_text(LEFT - 10, y + 22, "Time →", "rank")
        step_ns = _nice(60 / self.px_per_ns)
        for tick_ns in range(0, self.makespan_ns + 1, step_ns):
            x = LEFT + tick_ns * self.px_per_ns
            yield f'<path class="axis" d="M{px(x)} {y}v6"/>' + draw_text(x, y + 22, self.time(tick_ns), "note tick")
        yield draw_text(LEFT + self.width + 10, y + 22, self.unit, "note")

    def legend(self, page: int, y: int) -> tuple[list[str], int]:
        """What the colours mean, in as many lines as the page needs; and where the last of them ends."""
        lines: list[str] = []
        x = LEFT
        for parts, label in self.meanings():
            swatch = sum(part.width for part in parts)
            end = round(x + swatch + 8 + 6.3 * len(label))
            if x > LEFT and end > page:
                x, y, end = LEFT, y + 34, LEFT + end - x
            lines.append(f'<g transform="translate({x} {y})">{draw_cell(parts)}</g>')
            lines.append(draw_text(x + swatch + 8, y + 17, label))
            x = end + 20
        return lines, y + ROW + 20

    def meanings(self) -> Iterator[tuple[list[Part], str]]:
        """Each kind that occurs, and how the two directions look where there are two."""
        occurring = {action.kind for row in self.rows for action, _ in row}
        for kind, label in KINDS.items():
            if kind in occurring:
                shades = ("F", "B") if kind is Kind.F_B else (kind.name,)
                yield [Part(shade, "", SHORTEST * (2 if shade == "B" else 1)) for shade in shades], label
        if self.has_twins:
            for rank in sorted(set(self.entry.values())):
                first = min(microbatch for microbatch, entry in self.entry.items() if entry == rank)
                shade = "F" if rank == self.entry.get(0) else "F second"
                yield [Part(shade, str(first), SHORTEST)], f"entered at rank {rank}"
        elif any(len(self.schedule.stages_of(rank)) > 1 for rank in range(len(self.rows))):
            yield [Part("F", "0", SHORTEST)], "at a rank's first stage"
            yield [Part("F second", "0", SHORTEST)], "at its second stage"


def _rows(schedule: Schedule, timeline: Timeline) -> list[Row]:
    """The schedule's actions with their spans, each rank's in time."""
    actions = {(rank, str(action)): action for rank, row in enumerate(schedule.rows) for action in row}
    spans = [span for span in timeline if span.lane == COMPUTE]
    found = Counter((span.rank, span.name) for span in spans)
    wanted = Counter((rank, str(action)) for rank, row in enumerate(schedule.rows) for action in row)
    if different := (found - wanted) + (wanted - found):
        rank, name = min(different)
        raise ReportError(
            f"the timeline has {name!r} {found[rank, name]} times on rank {rank} and {schedule.name} has it "
            f"{wanted[rank, name]} times; give one step of this very schedule, as simulate returns it"
        )
    rows: list[Row] = [[] for _ in schedule.rows]
    for span in spans:
        rows[span.rank].append((actions[span.rank, span.name], span))
    return rows


def _forward_shares(rows: list[Row]) -> dict[Kind, float]:
    """For an overlapped B or I, the part of the pair that its forward is drawn with."""
    durations = defaultdict[Kind, list[int]](list)
    for row in rows:
        for action, span in row:
            durations[action.kind].append(span.duration_ns)
    shares = {Kind.B: 1 / 3, Kind.I: 1 / 2}
    for kind in shares:
        if durations[Kind.F] and durations[kind]:
            forward, backward = median(durations[Kind.F]), median(durations[kind])
            shares[kind] = forward / (forward + backward) if forward + backward else shares[kind]
    return shares


def _nice(ns: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ... nanoseconds that is not below ``ns``."""
    unit = int(10 ** max(floor(log10(ns)), 0))
    return next(step for step in (unit, 2 * unit, 5 * unit, 10 * unit) if step >= ns)
