"""The colours of actions: a hue for each kind, a shade for each of a rank's stages or directions."""

from __future__ import annotations

from counterflow.schedule import Kind

DARK_INK, LIGHT_INK = "#1f2328", "#ffffff"

_RAMPS = {
    Kind.F: ("#fde3b3", "#f5b444", "#b85c00", "#7d3c00"),
    Kind.B: ("#c6eac1", "#63be5b", "#237a31", "#0e4a1b"),
    Kind.I: ("#e6f6d2", "#b9e38d", "#4a7a14", "#355a0c"),
    Kind.W: ("#d3e7fd", "#86bdf7", "#2a6cc0", "#143f7d"),
}
"""From the lightest to the darkest; one shade is the second of these, two are the second and the third."""


def shade(kind: Kind, index: int, count: int) -> str:
    """The colour of the ``index``-th of ``count`` shades of ``kind`` (F, B, I or W), light to dark.

    Example:
        >>> [shade(Kind.F, index, 2) for index in range(2)]
        ['#f5b444', '#b85c00']
    """
    ramp = _RAMPS[kind]
    at = index / (count - 1) * (len(ramp) - 1) if count > 2 else 1.0 + index
    below = min(int(at), len(ramp) - 2)
    mixed = (
        round(low + (high - low) * (at - below))
        for low, high in zip(_channels(ramp[below]), _channels(ramp[below + 1]), strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def darker(colour: str) -> str:
    """``colour`` with a sixth of black, to tell two cells of one colour apart.

    Example:
        >>> darker("#f5b444")
        '#cc9639'
    """
    return "#" + "".join(f"{round(channel * 5 / 6):02x}" for channel in _channels(colour))


def ink(fill: str) -> str:
    """The colour of text on ``fill``: dark or white, whichever stands out more.

    Example:
        >>> ink("#f5b444"), ink("#237a31")
        ('#1f2328', '#ffffff')

    Source: the contrast ratio of WCAG 2.2.
    """
    dark, light = (contrast(text, fill) for text in (DARK_INK, LIGHT_INK))
    return DARK_INK if dark > light else LIGHT_INK


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21.

    Example:
        >>> contrast("#000000", "#ffffff")
        21.0
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (n / 255 for n in _channels(colour)))
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
