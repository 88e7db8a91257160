"""Cells and text as SVG elements, and their colours in light and dark."""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple

ROW = 26
"""Height of a cell."""
DIGIT = 7
"""Width of a digit."""

STYLE = """
text{font:12px Helvetica,Arial,sans-serif;fill:#1f2328}
.title{font-size:16px;font-weight:bold}.rank{font-weight:bold;text-anchor:end}
.note{fill:#59636e}.tick,.cell text{text-anchor:middle}
.page,.idle{fill:#fff}.idle,.axis{stroke:#d1d9e0}.edge{stroke:#1f2328;stroke-width:.8}.F_B>.edge{fill:none}
.F rect{fill:#f5b444}.B rect{fill:#63be5b}.I rect{fill:#b9e38d}.W rect{fill:#86bdf7}.cell text{fill:#1f2328}
.F.second rect{fill:#cc6c00}.B.second rect{fill:#237a31}.I.second rect{fill:#5d9122}.W.second rect{fill:#2a6cc0}
.cell .second text,.cell.second text{fill:#fff;font-weight:bold}
@media (prefers-color-scheme:dark){text{fill:#f0f6fc}.note{fill:#9198a1}.page{fill:#0d1117}
.idle{fill:#161b22}.idle,.axis{stroke:#3d444d}.edge{stroke:#0d1117}}
"""


class Part(NamedTuple):
    """A coloured piece of a cell: its classes in ``STYLE``, its text and its width."""

    shade: str
    text: str
    width: float


def draw_cell(parts: list[Part], left: float = 0.0, hover: str = "") -> str:
    """One part, or several side by side, inside one border."""
    title = f"<title>{safe(hover)}</title>" if hover else ""
    edge = _rect(left, sum(part.width for part in parts), "edge")
    if len(parts) == 1:
        return f'<g class="cell {parts[0].shade}">{title}{edge}{_id(parts[0], left)}</g>'
    drawn = ""
    for part in parts:
        drawn += f'<g class="{part.shade}">{_rect(left, part.width)}{_id(part, left)}</g>'
        left += part.width
    return f'<g class="cell F_B">{title}{drawn}{edge}</g>'


def draw_text(x: float, y: int, text: str, kind: str = "") -> str:
    """``text`` on the line ``y``, in the class ``kind`` of ``STYLE``."""
    return f'<text{_class(kind)} x="{px(x)}" y="{y}">{safe(text)}</text>'


def _id(part: Part, left: float) -> str:
    """The text in the middle of its part, or nothing where it does not fit."""
    if not part.text or part.width < DIGIT * len(part.text) + 2:
        return ""
    return draw_text(left + part.width / 2, 17, part.text)


def _rect(left: float, width: float, kind: str = "") -> str:
    return f'<rect{_class(kind)} x="{px(left)}" width="{px(width)}" height="{ROW}"/>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def px(value: float) -> str:
    """A length as short as it can be written to a hundredth of a pixel."""
    return f"{round(value, 2):g}"


_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def safe(text: str) -> str:
    """``text`` where XML wants text; a character that no XML may hold becomes a replacement character.

    Example:
        >>> safe("a < b"), safe("\\x1b[31m")
        ('a &lt; b', '\ufffd[31m')
    """
    return escape(_NOT_XML.sub("\ufffd", text))
