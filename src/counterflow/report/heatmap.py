"""The load of every GPU in every layer as an SVG: where it is too hot, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from counterflow.errors import ReportError
from counterflow.experts.loads import Floats, Ints
from counterflow.report.drawing import Theme, draw_text, safe, style
from counterflow.report.plot import ticks

LEFT, TOP, BETWEEN = 72, 104, 56
FIELD, DEEP = 440, 480
"""Width and height that the cells of one panel fill, where they are not too large or small for it."""
SMALLEST, LARGEST = 2, 24
"""Side of a cell, in pixels."""
MANY = 10_000
"""With more cells than this they tell nothing under the pointer, for the file's size."""
SPANS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""How far from the mean the last colours may stand; beyond the largest, all are alike."""

# From the coldest over the mean to the hottest. Even steps of lightness, so that colour is not needed to see how far
# from the mean a cell is, and blue against orange, which all eyes tell apart.
COLOURS = (
    *("#105da0", "#3c76b2", "#5f8fc3", "#82a8d3", "#a5c1e2", "#c9dbee"),
    "#f1f2f4",
    *("#ecd2c5", "#ddb49d", "#cc9678", "#b97954", "#a65c2f", "#923f00"),
)
ON_DARK = (
    *("#7ac3ff", "#69a7e7", "#598cc0", "#4b729a", "#3d5975", "#314050"),
    "#26292d",
    *("#4e3a2f", "#704d39", "#936145", "#b77652", "#db8d60", "#ffa46e"),
)
_SIDE = len(COLOURS) // 2
"""Colours on each side of the mean's."""


def load_heatmap(title: str, panels: Mapping[str, Floats], *, theme: Theme | None = None) -> str:
    """The SVG of GPU loads [layers, gpus] over their layer's mean: a panel for each name, all on one scale.

    Blue is below the mean and orange above it, the darker (on dark ground the brighter) the further. Hovering over a
    cell tells its value, where there are not too many cells. A layer without load is even. ``theme`` fixes light or
    dark, which otherwise follows the viewer's preference.

    Raises:
        ReportError: no panel, panels of different sizes, a load that is negative or not finite, or an unknown theme.

    Example:
        >>> import numpy as np
        >>> before, after = np.array([[3.0, 1.0]]), np.array([[2.0, 2.0]])
        >>> load_heatmap("GPU loads", {"before": before, "after": after}).count("<title>")
        4

    Source: the colours are even steps in B. Ottosson's OKLab (2020).
    """
    _require_usable(panels)
    return "\n".join(_Heatmap(panels).drawn(title, theme)) + "\n"


def _require_usable(panels: Mapping[str, Floats]) -> None:
    if not panels:
        raise ReportError("a heatmap got no loads; give at least one panel")
    first = next(iter(panels.values())).shape
    for name, loads in panels.items():
        if loads.ndim != 2 or loads.size == 0 or loads.shape != first:
            raise ReportError(
                f"the panel {name!r} has shape {list(loads.shape)} and the first one {list(first)}; "
                f"give loads [layers, gpus] of one size"
            )
        if not (np.isfinite(loads).all() and (loads >= 0).all()):
            raise ReportError(f"the panel {name!r} has a load that is negative or not finite; give what GPUs had to do")


class _Heatmap:
    """What the panels share: the size of a cell, and the scale of colours."""

    def __init__(self, panels: Mapping[str, Floats]) -> None:
        self.ratios = {name: _over_mean(loads) for name, loads in panels.items()}
        self.layers, self.gpus = next(iter(panels.values())).shape
        self.wide = max(SMALLEST, min(LARGEST, FIELD // self.layers))
        self.high = max(SMALLEST, min(LARGEST, DEEP // self.gpus))
        furthest = max(float(np.abs(ratio - 1.0).max()) for ratio in self.ratios.values())
        self.span = next((span for span in SPANS if furthest <= span), SPANS[-1])
        self.clipped = furthest > self.span
        self.tells = len(panels) * self.layers * self.gpus <= MANY
        captions = (7.5 * len(text) for name, ratio in self.ratios.items() for text in (name, _hottest(ratio)))
        self.pitch = round(max(self.layers * self.wide, *captions)) + BETWEEN
        self.below = TOP + self.gpus * self.high

    def drawn(self, title: str, theme: Theme | None) -> Iterator[str]:
        """The elements of the file."""
        scale = _SIDE * 2 * LARGEST + LARGEST
        width = LEFT + max(self.pitch * len(self.ratios), scale + 120, round(9.5 * len(title)) + BETWEEN)
        height = self.below + 132
        yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img"'
        yield f' viewBox="0 0 {width} {height}" aria-label="{safe(title)}">'
        yield f"<style>\n{style(theme, _STYLE + _fills(COLOURS), _fills(ON_DARK))}\n</style>"
        yield f'<rect class="page" width="{width}" height="{height}"/>'
        yield draw_text(LEFT, 28, title, "title")
        for index, (name, ratio) in enumerate(self.ratios.items()):
            yield from self.panel(LEFT + index * self.pitch, name, ratio)
        for gpu in _numbers(self.gpus):
            yield draw_text(LEFT - 10, TOP + (gpu + 0.5) * self.high + 4, str(gpu), "note row")
        yield draw_text(LEFT - 10, TOP - 8, "GPU", "note row")
        yield from self.legend(self.below + 76)
        yield "</svg>"

    def panel(self, left: int, name: str, ratio: Floats) -> Iterator[str]:
        """One field of cells, those of one colour together, with its name above and its layers below."""
        yield draw_text(left, 64, name, "name")
        yield draw_text(left, 82, _hottest(ratio), "note")
        colour = self.colour(ratio)
        for index in np.unique(colour).tolist():
            cells = np.argwhere(colour == index).tolist()
            boxes = [self.box(left, layer, gpu) for layer, gpu in cells]
            if self.tells:
                told = (f"GPU {gpu}, layer {layer}: {ratio[layer, gpu]:.3f} × mean" for layer, gpu in cells)
                paths = "".join(
                    f'<path d="{box}"><title>{text}</title></path>' for box, text in zip(boxes, told, strict=True)
                )
            else:
                paths = f'<path d="{"".join(boxes)}"/>'
            yield f'<g class="cell h{index}">{paths}</g>'
        right = left + self.layers * self.wide
        yield f'<path class="axis" d="M{left - 1} {TOP - 1}H{right + 1}V{self.below + 1}H{left - 1}z"/>'
        for layer in _numbers(self.layers):
            yield draw_text(left + (layer + 0.5) * self.wide, self.below + 18, str(layer), "note tick")
        yield draw_text(left, self.below + 38, "layer →", "note")

    def box(self, left: int, layer: int, gpu: int) -> str:
        """The path round a cell."""
        return f"M{left + layer * self.wide} {TOP + gpu * self.high}h{self.wide}v{self.high}h-{self.wide}z"

    def colour(self, ratio: Floats) -> Ints:
        """The number of each cell's colour, [layers, gpus]."""
        return np.rint(_SIDE * (1.0 + ((ratio - 1.0) / self.span).clip(-1.0, 1.0))).astype(np.int64)

    def legend(self, y: int) -> Iterator[str]:
        """All colours side by side, with the values of their ends and of the middle."""
        yield draw_text(LEFT, y - 10, "load of a GPU over the mean of its layer", "note")
        for index in range(len(COLOURS)):
            box = f"M{LEFT + index * LARGEST} {y}h{LARGEST}v14h-{LARGEST}z"
            yield f'<g class="cell h{index}"><path d="{box}"/></g>'
        more = " and more" if self.clipped else ""
        for index, text in ((0, f"{1 - self.span:g} ×"), (_SIDE, "mean"), (2 * _SIDE, f"{1 + self.span:g} ×{more}")):
            kind = "note tick" if index < 2 * _SIDE else "note"
            shift = LARGEST / 2 if index < 2 * _SIDE else 0
            yield draw_text(LEFT + index * LARGEST + shift, y + 32, text, kind)


def _numbers(count: int) -> list[int]:
    """Which of ``count`` rows or columns have their number beside them."""
    return [int(value) for value in ticks(0, count - 1) if value == int(value)]


def _over_mean(loads: Floats) -> Floats:
    mean = np.broadcast_to(loads.mean(axis=1, keepdims=True), loads.shape)
    ratio: Floats = np.divide(loads, mean, out=np.ones(loads.shape), where=mean > 0)
    return ratio


def _hottest(ratio: Floats) -> str:
    layer, gpu = np.unravel_index(ratio.argmax(), ratio.shape)
    return f"at most {ratio.max():.2f} × mean: GPU {gpu}, layer {layer}"


def _fills(colours: tuple[str, ...]) -> str:
    return "".join(f".h{index} path{{fill:{colour}}}" for index, colour in enumerate(colours))


_STYLE = """
.row{text-anchor:end}.name{font-weight:bold}.cell{shape-rendering:crispEdges}.cell path:hover{opacity:.7}
"""
