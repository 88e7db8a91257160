"""The parts of a layer, and what a name like ``mlp(B)``, ``ATTN-a1`` or ``DISPATCH(F)`` says of them."""

from __future__ import annotations

import re
from typing import NamedTuple

ATTENTION, EXPERTS, SHARED, MLP = "attention", "experts", "shared", "mlp"
DISPATCH, COMBINE, PIPELINE = "dispatch", "combine", "pipeline"

_PARTS = {
    "attn": ATTENTION,
    "attention": ATTENTION,
    "tail": ATTENTION,  # what takes the last combine's rows; in other layers attention begins with it
    "mlp": EXPERTS,
    "ffn": EXPERTS,
    "moe": EXPERTS,
    "expert": EXPERTS,
    "experts": EXPERTS,
    "shared": SHARED,
    "dispatch": DISPATCH,
    "combine": COMBINE,
    "pp": PIPELINE,
}
_ANY_PART = "|".join(sorted(_PARTS, reverse=True))
_NAME = re.compile(
    rf"({_ANY_PART})(?:[-_ ]?experts?)?(?:-(?:[ab]|recv))?\d{{0,6}}(?:\(([FBIW])\))?",
    re.IGNORECASE,
)


class Part(NamedTuple):
    """A part of a layer and its direction: "F", "B", "I" or "W"; without one a name means a forward."""

    part: str
    direction: str

    def __str__(self) -> str:
        return f"{self.part}({self.direction})"


def part_of(name: str) -> Part | None:
    """The part that a name tells; None where it tells none.

    Example:
        >>> part_of("mlp(B)"), part_of("ATTN-a1")
        (Part(part='experts', direction='B'), Part(part='attention', direction='F'))
        >>> str(part_of("DISPATCH0")), part_of("## forward ##")
        ('dispatch(F)', None)
    """
    found = _NAME.fullmatch(name.strip())
    return found and Part(_PARTS[found[1].lower()], (found[2] or "F").upper())
