"""A measured step over the simulated one: the same actions on one axis, and where the two differ most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from counterflow.report.drawing import (
    ABOVE,
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
)
from counterflow.report.gaps import explain, gaps
from counterflow.report.step import KINDS, Step, nice
from counterflow.report.svg import LEFT, LONGEST, RIGHT, SHORTEST, TOP
from counterflow.schedule import Action, Kind, Schedule
from counterflow.timeline import Timeline

WORST = 8
"""So many deviations stand below the picture."""
_PITCH = 2 * ROW + 10
_LOOK = ".ghost{opacity:.55}.side{text-anchor:end}"
_SIDE = 68  # two labels for each rank stand beside its own


class Deviation(NamedTuple):
    """An action of ``rank`` measured and simulated: when it started after its step did, and how long it took."""

    rank: int
    action: Action
    measured_start_ns: int
    measured_ns: int
    simulated_start_ns: int
    simulated_ns: int

    @property
    def longer_ns(self) -> int:
        """How much longer it took than simulated; below 0 where it was shorter."""
        return self.measured_ns - self.simulated_ns

    @property
    def later_ns(self) -> int:
        """How much later it started."""
        return self.measured_start_ns - self.simulated_start_ns


def deviations(schedule: Schedule, measured: Timeline, simulated: Timeline) -> list[Deviation]:
    """Every action measured and simulated, those first whose durations differ most.

    Raises:
        ReportError: a timeline does not hold exactly the actions of the schedule.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> schedule = one_f_one_b(2, 2)
        >>> slow, usual = simulate(schedule, Costs((2, 1), 2)), simulate(schedule, Costs(1, 2))
        >>> worst = deviations(schedule, slow, usual)[0]
        >>> str(worst.action), worst.longer_ns, worst.later_ns
        ('0F0', 1000, 0)
    """
    return _deviations(Step(schedule, measured), Step(schedule, simulated))


def _deviations(measured: Step, simulated: Step) -> list[Deviation]:
    found = []
    for rank, (row, other) in enumerate(zip(measured.rows, simulated.rows, strict=True)):
        prices = dict(other)
        for action, span in row:
            ghost = prices[action]
            starts = span.start_ns - measured.origin_ns, ghost.start_ns - simulated.origin_ns
            found.append(Deviation(rank, action, starts[0], span.duration_ns, starts[1], ghost.duration_ns))
    return sorted(found, key=lambda one: -abs(one.longer_ns))


def overlay_svg(schedule: Schedule, measured: Timeline, simulated: Timeline, *, theme: Theme | None = None) -> str:
    """The picture of a measured step with the simulated one beneath it, rank by rank on one axis.

    Both count from their own first action. Hovering an action tells both of its times; the largest differences stand
    below. ``theme`` fixes light or dark, which otherwise follows the viewer's preference.

    Raises:
        ReportError: a timeline does not hold exactly the actions of the schedule, or the theme is none.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> schedule = one_f_one_b(2, 4)
        >>> picture = overlay_svg(schedule, simulate(schedule, Costs(1.1, 2)), simulate(schedule, Costs()))
        >>> picture.count(": measured "), "0F0 took 0.1 µs longer" in picture
        (32, True)
    """
    return "\n".join(_Overlay(Step(schedule, measured), Step(schedule, simulated), theme).lines()) + "\n"


class _Overlay:
    """What its parts share: the two steps, one scale of time, the sizes of the page."""

    def __init__(self, measured: Step, simulated: Step, theme: Theme | None) -> None:
        self.measured, self.simulated, self.theme = measured, simulated, theme
        self.longest_ns = max(measured.makespan_ns, simulated.makespan_ns)
        self.unit = measured if measured.makespan_ns >= simulated.makespan_ns else simulated
        shortest = max(SHORTEST, DIGIT * len(str(measured.schedule.num_microbatches - 1)) + 8)
        usual_ns = min(measured.usual_shortest_ns(), simulated.usual_shortest_ns())
        self.px_per_ns = min(shortest / max(usual_ns, 1), LONGEST / max(self.longest_ns, 1))
        self.width = self.longest_ns * self.px_per_ns
        self.left = LEFT + _SIDE
        self.below = TOP + _PITCH * len(measured.rows)
        self.page = round(self.left + max(self.width, 560) + RIGHT)
        self.differing = _deviations(measured, simulated)
        self.told = {(one.rank, one.action): one for one in self.differing}

    def lines(self) -> Iterator[str]:
        """The elements of the file."""
        worst = list(self.worst())
        height = self.below + 96 + 18 * (len(worst) + 1)
        title = f"{self.measured.title()}, measured over simulated"
        yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.page}" height="{height}" role="img"'
        yield f' viewBox="0 0 {self.page} {height}" aria-label="{safe(title)}">'
        yield f"<style>\n{cell_style(self.theme, self.measured.num_shades, self.page)}{_LOOK}</style>"
        yield f'<rect class="page" width="{self.page}" height="{height}"/>'
        yield draw_text(self.left, 24, title, "title")
        yield draw_text(self.left, 42, f"measured: {self.measured.figures()}", "note")
        yield draw_text(self.left, 58, f"simulated: {self.simulated.figures()}", "note")
        for step, label, offset, look in (
            (self.measured, "measured", 0, ""),
            (self.simulated, "simulated", ROW, " ghost"),
        ):
            yield from self.rows(step, label, offset, look)
        for rank in self.measured.ranks:
            yield draw_text(LEFT - 10, TOP + _PITCH * rank + ABOVE + ROW / 2, f"rank {rank}", "rank")
        yield from self.axis()
        yield from self.legend()
        y = self.below + 78
        if worst:
            yield draw_text(self.left, y, "durations that differ most", "note")
        for line, text in enumerate(worst):
            yield draw_text(self.left, y + 18 * (line + 1), text)
        yield "</svg>"

    def rows(self, step: Step, label: str, offset: int, look: str) -> Iterator[str]:
        """One of the two steps: every rank's cells and gaps in their half of its row."""
        idle: list[list[str]] = [[] for _ in step.ranks]
        for gap in gaps(step):
            start, end = ((ns - step.origin_ns) * self.px_per_ns for ns in (gap.start_ns, gap.end_ns))
            idle[gap.rank].append(draw_plain("gap", start, end, explain(gap, step)))
        for rank in step.ranks:
            y = TOP + _PITCH * rank + ABOVE + offset
            yield draw_text(self.left - 8, y, label, "note side")
            yield f'<g class="cells{look}" transform="translate({self.left} {y})">'
            yield from idle[rank]
            for action, span in step.rows[rank]:
                parts = [
                    Part(
                        part.kind,
                        step.shade(rank, part),
                        str(part.microbatch),
                        start * self.px_per_ns,
                        end * self.px_per_ns,
                    )
                    for part, start, end in step.parts(action, span)
                ]
                yield draw_cell(parts, self.hover(self.told[rank, action]))
            yield "</g>"
            yield draw_text(self.left + self.width + 8, y, step.bubble_share(rank), "note")

    def hover(self, one: Deviation) -> str:
        """Both times of an action."""
        measured, simulated = self.time(one.measured_ns), self.time(one.simulated_ns)
        return f"{one.action}: measured {measured}, simulated {simulated}, {self.when(one)}"

    def worst(self) -> Iterator[str]:
        """Sentences on the largest differences."""
        for one in self.differing[:WORST]:
            if one.longer_ns:
                how = "longer" if one.longer_ns > 0 else "shorter"
                share = f" ({one.longer_ns / one.simulated_ns:+.0%})" if one.simulated_ns else ""
                yield (
                    f"rank {one.rank}: {one.action} took {self.time(abs(one.longer_ns))} {how} than simulated{share}, "
                    f"{self.when(one)}"
                )

    def when(self, one: Deviation) -> str:
        """How its start compares."""
        if not one.later_ns:
            return "and started when simulated"
        return f"and started {self.time(abs(one.later_ns))} {'later' if one.later_ns > 0 else 'earlier'}"

    def time(self, ns: int) -> str:
        """A time in a unit that shows it."""
        return f"{ns / 1e6:.3f} ms" if self.unit.unit == "ms" else f"{self.unit.time(ns)} µs"

    def axis(self) -> Iterator[str]:
        """Time, with a mark at every one, two or five units of ten."""
        for tick_ns in range(0, self.longest_ns + 1, nice(60 / self.px_per_ns)):
            x = self.left + tick_ns * self.px_per_ns
            yield f'<path class="axis" d="M{px(x)} {self.below}v6"/>'
            yield draw_text(x, self.below + 22, self.unit.time(tick_ns), "note tick")
        yield draw_text(self.left + self.width + 24, self.below + 22, self.unit.unit, "note")

    def legend(self) -> Iterator[str]:
        """What the colours mean."""
        x, y = self.left, self.below + 36 + ABOVE
        for kind, label in KINDS.items():
            if kind in self.measured.kinds:
                simple = [Kind.F, Kind.B] if kind is Kind.F_B else [kind]
                edges = [SHORTEST * at for at in range(len(simple) + 1)]
                parts = [Part(one, 0, "", edges[at], edges[at + 1]) for at, one in enumerate(simple)]
                yield f'<g class="cells" transform="translate({x} {y})">{draw_cell(parts)}</g>'
                yield draw_text(x + edges[-1] + 8, y, label)
                x += edges[-1] + 24 + round(6.2 * len(label))
