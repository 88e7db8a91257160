"""A small plot of lines as an SVG: how a figure changes with a size or a cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import ceil, floor, isfinite, log10

from counterflow.errors import ReportError
from counterflow.report.drawing import Theme, draw_text, px, safe, style

WIDTH, HEIGHT = 640, 320
"""Size of the field between the axes."""
LEFT, TOP = 72, 70
_LINE = 16
"""Distance of two labels."""
_WIDEST = 32
"""Room for a number on the x axis."""

# Okabe and Ito's colours, their yellow left out; on dark ground those that would sink are lighter.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1f2328")
_ON_DARK = ("#4ba3dd", "#ff8a4c", "#2ec79a", "#e3a0c5", "#8fd0f5", "#f5bf4f", "#f0f6fc")
_DASHES = ("", "7 3", "2 3")
"""For the lines beyond the first seven."""

Point = tuple[float, float]


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    *,
    marks: Mapping[str, float] | None = None,
    theme: Theme | None = None,
) -> str:
    """The SVG of one line for each name, with a point for each value of ``x``.

    ``marks`` are places on the x axis, each told by an upright rule with its name. A value of None leaves a hole in
    its line; a name without any value is told below the plot. Each line is named at its end; hovering over a point
    tells its name and values. The y axis holds zero, unless all values lie in the upper half of what it would then
    show.

    Raises:
        ReportError: no x, a line of another length, a number that is not finite, or a mark beside the x axis.

    Example:
        >>> plot = line_plot("bubble", "micro-batches", "µs", [8, 16], {"1f1b": [21, 21], "zb1p": [7, None]})
        >>> plot.count("<title>")
        3

    Source: the colours are those of M. Okabe and K. Ito, Color Universal Design (2008).
    """
    _require_usable(x, lines, marks or {})
    return "\n".join(_Plot(x, lines, marks or {}).drawn(title, x_label, y_label, theme)) + "\n"


def _require_usable(
    x: Sequence[float], lines: Mapping[str, Sequence[float | None]], marks: Mapping[str, float]
) -> None:
    if not x:
        raise ReportError("a plot got no x values; it needs at least one")
    for name, values in {"x": x, **lines}.items():
        if len(values) != len(x):
            raise ReportError(f"the line {name!r} has {len(values)} values and x has {len(x)}; give one for each x")
        for value in values:
            if value is not None and not isfinite(value):
                raise ReportError(f"the line {name!r} has the value {value}; give a finite number, or None for a hole")
    for name, at in marks.items():
        if not min(x) <= at <= max(x):
            raise ReportError(f"the mark {name!r} is at {at}, and x goes from {min(x)} to {max(x)}; mark a place there")


class _Plot:
    """The two scales, the lines with values, and what is marked."""

    def __init__(
        self, x: Sequence[float], lines: Mapping[str, Sequence[float | None]], marks: Mapping[str, float]
    ) -> None:
        self.marks = marks
        self.lines: dict[str, list[Point | None]] = {}
        self.empty = [name for name, values in lines.items() if all(value is None for value in values)]
        for name, values in lines.items():
            pairs = sorted(zip(x, values, strict=True), key=lambda pair: pair[0])
            if name not in self.empty:
                self.lines[name] = [None if value is None else (at, value) for at, value in pairs]
        heights = [point[1] for line in self.lines.values() for point in line if point] or [0.0]
        # From zero, unless that would leave more than half of the field empty.
        from_zero = [] if min(heights) > max(heights) / 2 else [0.0]
        self.y_ticks = ticks(min(heights + from_zero), max(heights + from_zero), outward=True)
        self.x_low, self.x_high = min(x), max(x)
        known = sorted({*x})
        closest = min((right - left for left, right in zip(known, known[1:], strict=False)), default=1.0)
        has_room = closest * WIDTH >= _WIDEST * (self.x_high - self.x_low)
        self.x_ticks = known if has_room else ticks(self.x_low, self.x_high)
        self.right = 60 + max((7 * len(name) for name in self.lines), default=0)

    def at(self, point: Point) -> Point:
        """Where a point stands on the page."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        across = (point[0] - self.x_low) / (self.x_high - self.x_low) if self.x_high > self.x_low else 0.5
        return LEFT + WIDTH * across, TOP + HEIGHT * (high - point[1]) / (high - low)

    def drawn(self, title: str, x_label: str, y_label: str, theme: Theme | None) -> Iterator[str]:
        """The elements of the file."""
        width, height = LEFT + WIDTH + self.right, TOP + HEIGHT + 58 + (20 if self.empty else 0)
        yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img"'
        yield f' viewBox="0 0 {width} {height}" aria-label="{safe(title)}">'
        yield f"<style>\n{style(theme, _colours(_COLOURS) + _LINES, _colours(_ON_DARK))}\n</style>"
        yield f'<rect class="page" width="{width}" height="{height}"/>'
        yield draw_text(LEFT, 28, title, "title")
        yield draw_text(LEFT, TOP - 14, y_label, "note")
        yield from self.axes()
        yield draw_text(LEFT + WIDTH / 2, TOP + HEIGHT + 44, x_label, "note tick")
        yield from self.rules()
        for index, line in enumerate(self.lines.items()):
            yield from self.line(index, *line)
        yield from self.labels()
        if self.empty:
            yield draw_text(LEFT, height - 14, f"without a value: {', '.join(self.empty)}", "note")
        yield "</svg>"

    def axes(self) -> Iterator[str]:
        """A rule at every round value of y, a mark at every one of x."""
        for value in self.y_ticks:
            _, y = self.at((self.x_low, value))
            yield f'<path class="axis" d="M{LEFT} {px(y)}H{LEFT + WIDTH}"/>'
            yield draw_text(LEFT - 8, y + 4, _number(value), "note y")
        for value in self.x_ticks:
            x, _ = self.at((value, 0))
            yield f'<path class="axis" d="M{px(x)} {TOP + HEIGHT}v6"/>'
            yield draw_text(x, TOP + HEIGHT + 22, _number(value), "note tick")

    def rules(self) -> Iterator[str]:
        """Every mark; those on the right name themselves to their left, each below the one before."""
        for index, (name, at) in enumerate(sorted(self.marks.items(), key=lambda mark: mark[1])):
            x, _ = self.at((at, 0))
            left = x > LEFT + WIDTH / 2
            yield f'<path class="axis mark" d="M{px(x)} {TOP}v{HEIGHT}"/>'
            height = TOP + HEIGHT - 8 - _LINE * (len(self.marks) - 1 - index)
            yield draw_text(x - 6 if left else x + 6, height, name, "note y" if left else "note")

    def pen(self, index: int) -> tuple[str, str]:
        """A line's class and dashes; one equal to an earlier line is dashed, so that both are seen."""
        dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        points = list(self.lines.values())
        if equal := points[:index].count(points[index]):
            dash = f"8 {8 * equal}"
        return f"l{index % len(_COLOURS)}", f' stroke-dasharray="{dash}"' if dash else ""

    def line(self, index: int, name: str, points: Sequence[Point | None]) -> Iterator[str]:
        """One line with its holes, and its points."""
        colour, dashes = self.pen(index)
        yield f'<g class="{colour}">'
        for there, run in groupby(points, key=lambda point: point is not None):
            if there:
                path = "L".join(" ".join(map(px, self.at(point))) for point in run if point)
                yield f'<path class="line"{dashes} d="M{path}"/>'
        for point in points:
            if point:
                x, y = self.at(point)
                told = f"{name}: {_number(point[0])}, {_number(point[1])}"
                yield f'<circle cx="{px(x)}" cy="{px(y)}" r="3"><title>{safe(told)}</title></circle>'
        yield "</g>"

    def labels(self) -> Iterator[str]:
        """Each line's name at its end with a piece of it, moved apart where ends are close, and led to."""
        ends = [next(self.at(point) for point in reversed(points) if point) for points in self.lines.values()]
        heights = apart([y for _, y in ends], _LINE, TOP - 4, TOP + HEIGHT + 30)
        right = LEFT + WIDTH
        for index, (name, (x, end), y) in enumerate(zip(self.lines, ends, heights, strict=True)):
            colour, dashes = self.pen(index)
            lead = f'<path class="lead" d="M{px(x + 4)} {px(end)}L{right + 24} {px(y)}"/>'
            piece = f'<path class="line"{dashes} d="M{right + 24} {px(y)}h24"/>'
            yield f'<g class="{colour}">{lead}{piece}</g>{draw_text(right + 54, y + 4, name, "name")}'


_LINES = """
.y{text-anchor:end}.line{fill:none;stroke-width:2;stroke-linejoin:round}.lead{fill:none;stroke-dasharray:1 3}
circle:hover{r:6px}.mark{stroke-dasharray:4 3}
"""


def _colours(colours: Sequence[str]) -> str:
    return "".join(
        f".l{index} path{{stroke:{colour}}}.l{index} circle{{fill:{colour}}}" for index, colour in enumerate(colours)
    )


def ticks(low: float, high: float, outward: bool = False) -> list[float]:
    """Round values from ``low`` to ``high``, about six; ``outward`` starts and ends with those around them.

    Example:
        >>> ticks(8, 64), ticks(0, 21, outward=True), ticks(0, 0, outward=True)
        ([10, 20, 30, 40, 50, 60], [0, 5, 10, 15, 20, 25], [0, 1])
    """
    if low == high:
        return [low, low + 1] if outward else [low]
    rough = (high - low) / 6
    unit = 10.0 ** floor(log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.99)
    first, last = low / step, high / step
    bounds = (floor(first + 1e-9), ceil(last - 1e-9)) if outward else (ceil(first - 1e-9), floor(last + 1e-9))
    # As a decimal of the step, so that 3 × 0.1 is 0.3; a whole number stays one.
    decimals = max(-floor(log10(step)), 0)
    values = [round(index * step, decimals) for index in range(bounds[0], bounds[1] + 1)]
    return [int(value) if value == int(value) else value for value in values]


def apart(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Places as near to the ``wanted`` ones as keeps their order and the ``distance``, within bounds if they fit.

    Example:
        >>> apart([50, 10, 12], 16, 0, 100)
        [50, 3.0, 19.0]

    Source: the pool-adjacent-violators algorithm for isotonic regression.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    pools: list[tuple[float, int]] = []  # mean and number of labels that touch, each less the room before it
    for place, index in enumerate(order):
        pools.append((wanted[index] - place * distance, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, count), (other, more) = pools[-2:]
            pools[-2:] = [((mean * count + other * more) / (count + more), count + more)]
    highest = high - (len(wanted) - 1) * distance
    places = [max(min(mean, highest), low) for mean, count in pools for _ in range(count)]
    placed = dict(zip(order, (at + place * distance for place, at in enumerate(places)), strict=True))
    return [placed[index] for index in range(len(wanted))]


def _number(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
