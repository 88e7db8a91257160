"""An SVG of ours as a PNG."""

from __future__ import annotations

import re
from functools import cache

from counterflow.errors import ReportError
from counterflow.report.drawing import FAMILIES

_SHARP = 8_000
"""Pictures up to this width get two pixels for each of theirs, as sharp screens have."""
_LARGEST = 100_000_000
"""Pixels; each takes four bytes while it is rendered, and where there are too few the renderer ends the process."""
_PROBE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">'
    f'<text y="15" font-family="{FAMILIES}">{{}}</text></svg>'
)


def to_png(svg: str) -> bytes:
    """The PNG of a picture that ``schedule_svg`` or ``line_plot`` drew; give it a theme, for a PNG follows no viewer.

    Raises:
        ReportError: the package that renders is not installed, no font is, or the picture is too large.

    Example:
        >>> to_png('<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>')[:4]
        b'\\x89PNG'
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ReportError(
            "a PNG needs the package resvg_py, which is not installed; pip install 'counterflow[png]', or draw an .svg"
        ) from None
    if "<text" in svg and not has_font():
        raise ReportError(
            "a PNG needs a font such as DejaVu Sans, Liberation Sans or Arial and this machine has none; install one "
            "(on Debian: apt install fonts-dejavu-core), or draw an .svg"
        )
    size = re.search(r'width="(\d+)" height="(\d+)"', svg)
    assert size is not None
    width, height = map(int, size.groups())
    if width * height > _LARGEST:
        raise ReportError(
            f"a PNG of {width} × {height} pixels was asked for; it can have {_LARGEST / 1e6:.0f} million: draw an .svg"
        )
    sharp = width <= _SHARP and 4 * width * height <= _LARGEST
    return svg_to_bytes(svg_string=svg, zoom=2 if sharp else 1)


@cache
def has_font() -> bool:
    """Whether text appears in what is rendered here: resvg leaves it out, without a word, where it knows no font."""
    from resvg_py import svg_to_bytes

    return svg_to_bytes(svg_string=_PROBE.format("8")) != svg_to_bytes(svg_string=_PROBE.format(""))
