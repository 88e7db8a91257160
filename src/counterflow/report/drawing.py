"""Shapes and text as SVG elements, and their colours in light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Literal, NamedTuple

from counterflow.errors import ReportError
from counterflow.report.palette import DARK_INK, ink, shade
from counterflow.schedule import Kind

Theme = Literal["light", "dark"]

ABOVE, BELOW = 17, 9
"""A cell reaches this far above and below the line on which its text stands."""
ROW = ABOVE + BELOW
"""Height of a cell."""
DIGIT = 7
"""Width of a digit."""

FAMILIES = "Helvetica,Arial,'Liberation Sans','DejaVu Sans','Noto Sans',sans-serif"
"""Fonts that look alike, one of which most machines have."""

# The ground of the svg itself is what a browser shows around a picture that is smaller than its window.
_LIGHT = f"""
svg{{background:#fff;color-scheme:light}}
text{{font:12px {FAMILIES};fill:{DARK_INK}}}
.title{{font-size:16px;font-weight:bold}}.rank{{font-weight:bold;text-anchor:end}}
.tick,.cells text{{text-anchor:middle}}
.note{{fill:#59636e}}.page{{fill:#fff}}.axis{{stroke:#d1d9e0;fill:none}}
"""
_DARK = """svg{background:#0d1117;color-scheme:dark}
text{fill:#f0f6fc}.note{fill:#9198a1}.page{fill:#0d1117}.axis{stroke:#3d444d}"""

_LIGHT_CELLS = f"""
.gap{{fill:#f1f4f7;stroke:#d1d9e0}}.gap:hover{{fill:#d8e0e8}}.cells text{{fill:{DARK_INK};pointer-events:none}}
.F path,.B path,.I path,.W path,.edge{{stroke:{DARK_INK};stroke-width:.8}}.pair path{{stroke:none}}
.pair .edge{{fill:none;stroke:{DARK_INK}}}
.sum{{fill:#afb8c1;stroke:{DARK_INK};stroke-width:.8}}
.held{{fill:#8250df;fill-opacity:.3;stroke:#8250df}}
"""
_DARK_CELLS = """.gap{fill:#1c2128;stroke:#3d444d}.gap:hover{fill:#343b44}
.F path,.B path,.I path,.W path,.pair .edge{stroke:#0d1117}.pair .F path,.pair .B path,.pair .I path{stroke:none}
.sum{fill:#57606a;stroke:#0d1117}.held{fill:#a371f7;stroke:#a371f7}"""


def style(theme: Theme | None, more_light: str = "", more_dark: str = "") -> str:
    """The style sheet of a picture: of one theme, or of the one that the viewer prefers.

    Raises:
        ReportError: a theme that is none.
    """
    dark = {None: f"@media (prefers-color-scheme:dark){{{_DARK}{more_dark}}}", "light": "", "dark": _DARK + more_dark}
    if theme not in dark:
        raise ReportError(f"a picture got theme {theme!r}; it needs light or dark, or none to follow the viewer")
    return f"{_LIGHT.strip()}{more_light}{dark[theme]}"


def cell_style(theme: Theme | None, num_shades: int, stay_px: int) -> str:
    """The style sheet of a schedule: kinds in ``num_shades`` shades, and names that stay where a browser can.

    ``stay_px`` is how wide the page is: names move along while it is scrolled sideways.
    """
    colours = ""
    for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
        for index in range(num_shades):
            fill = shade(kind, index, num_shades)
            chosen = f".{kind.name}" + (f".s{index}" if index else "")
            colours += f"{chosen} path{{fill:{fill}}}"
            if ink(fill) != DARK_INK:
                colours += f".cells {chosen} text{{fill:{ink(fill)};font-weight:bold}}"
    stay = (
        f"\n@keyframes stay{{to{{transform:translateX(calc({stay_px + 15}px - 100vw))}}}}"  # 15: a scrollbar
        "@supports (animation-timeline:scroll()){.stay{animation:stay linear both;"
        "animation-timeline:scroll(root inline)}}\n"
    )
    return style(theme, f"{_LIGHT_CELLS}{colours}{stay}", _DARK_CELLS)


class Part(NamedTuple):
    """A coloured piece of a cell: its kind, shade, text, and where it starts and ends."""

    kind: Kind
    shade: int
    text: str
    start: float
    end: float


def draw_cell(parts: list[Part], hover: str = "") -> str:
    """One part, or several side by side, inside one border; text stands where it fits."""
    title = f"<title>{safe(hover)}</title>" if hover else ""
    if len(parts) == 1:
        return f'<g class="{_class(parts[0])}">{title}{_filled(parts[0])}</g>'
    drawn = "".join(f'<g class="{_class(part)}">{_filled(part)}</g>' for part in parts)
    return f'<g class="pair">{title}{drawn}<path class="edge" d="{box(parts[0].start, parts[-1].end)}"/></g>'


def draw_plain(what: str, start: float, end: float, hover: str = "") -> str:
    """A stretch of a row that is no action (an idle ``gap``, a ``sum`` over twins), with what the pointer is told."""
    title = f"<title>{safe(hover)}</title>" if hover else ""
    return f'<path class="{what}" d="{box(start, end)}">{title}</path>'


def draw_text(x: float, y: float, text: str, kind: str = "") -> str:
    """``text`` on the line ``y``, in the class ``kind`` of the style sheet."""
    chosen = f' class="{kind}"' if kind else ""
    line = f' y="{px(y)}"' if y else ""
    return f'<text{chosen} x="{px(x)}"{line}>{safe(text)}</text>'


def _class(part: Part) -> str:
    return f"{part.kind.name} s{part.shade}" if part.shade else part.kind.name


def _filled(part: Part) -> str:
    path = f'<path d="{box(part.start, part.end)}"/>'
    if not part.text or part.end - part.start < DIGIT * len(part.text) + 2:
        return path
    return path + draw_text((part.start + part.end) / 2, 0, part.text)


def box(start: float, end: float) -> str:
    """The path round a cell from ``start`` to ``end``."""
    return f"M{px(start)}-{ABOVE}H{px(end)}V{BELOW}H{px(start)}z"


def steps(points: Iterable[tuple[float, float]]) -> str:
    """The path along ``points`` (x, y), level up to the next x and then straight up or down."""
    path = ""
    for x, y in points:
        path += f"H{px(x)}V{px(y)}" if path else f"M{px(x)} {px(y)}"
    return path


def px(value: float) -> str:
    """A length as short as it can be written to a tenth of a pixel.

    Example:
        >>> px(22.04), px(12345.67)
        ('22', '12345.7')
    """
    return f"{value:.1f}".removesuffix(".0")


_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def safe(text: str) -> str:
    """``text`` where XML wants text; a character that no XML may hold becomes a replacement character.

    Example:
        >>> safe("a < b"), safe("\\x1b[31m")
        ('a &lt; b', '\ufffd[31m')
    """
    return escape(_NOT_XML.sub("\ufffd", text))
