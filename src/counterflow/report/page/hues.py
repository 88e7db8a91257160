"""The colours of phases: of forward, backward and weights where the name tells, else one after another."""

from __future__ import annotations

import re
from collections.abc import Sequence

from counterflow.report.palette import ink, shade
from counterflow.schedule import Kind

_NONE = "#afb8c1"
_OTHERS = ("#8fb8de", "#e8b86d", "#7fc8b2", "#d99ac5", "#a3c76d", "#b3a2e0", "#e39a86", "#6fb7c9", "#c9b48a", "#93a1b5")
_TOLD = re.compile(r".*\(([FBIW])\)$", re.DOTALL)
_OF_A_SCHEDULE = {
    "forward": (Kind.F,),
    "backward": (Kind.B,),
    "backward for input": (Kind.I,),
    "backward for weights": (Kind.W,),
    "forward & backward": (Kind.F, Kind.B),
}


def hues(phases: Sequence[str]) -> list[list[str]]:
    """For each phase its colour, or the two of a forward and a backward in one.

    Phases whose name ends in (F), (B), (I) or (W), and those of a schedule, have the colours of its pictures.

    Example:
        >>> hues(["", "attn(F)", "mlp(F)", "attn(B)", "forward & backward", "loss"])
        [['#afb8c1'], ['#f5b444'], ['#b85c00'], ['#63be5b'], ['#f5b444', '#63be5b'], ['#8fb8de']]
    """
    told = [found[1] if (found := _TOLD.match(name)) else None for name in phases]
    counts = {letter: told.count(letter) for letter in told}
    seen: dict[str | None, int] = {}
    chosen = []
    for name, letter in zip(phases, told, strict=True):
        if not name:
            chosen.append([_NONE])
        elif name in _OF_A_SCHEDULE:
            chosen.append([shade(kind, 0, 1) for kind in _OF_A_SCHEDULE[name]])
        else:
            place = seen[letter] = seen.get(letter, -1) + 1
            other = _OTHERS[place % len(_OTHERS)]
            chosen.append([other if letter is None else shade(Kind(letter), place, counts[letter])])
    return chosen


def inks(colours: list[list[str]]) -> list[str]:
    """The colour of text on each."""
    return [ink(colour[0]) for colour in colours]
