"""Which transfer a communication kernel belongs to where nobody annotated any: by what makes it and what needs it.

Names alone lie: the backward of a combine is a dispatch, and runs the dispatch kernel. But every block of compute
takes what a transfer brought and leaves what the next one carries:

    attention(F) → dispatch(F) → experts(F) → combine(F) → attention(F) of the layer above
    attention(B) → combine(B) of the layer below → experts(B) → dispatch(B) → attention(B)

So a transfer is launched between the block that makes what it carries and the block that needs it; where it can be
one of several, it is the one that is needed first.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import Ints
from counterflow.trace.kernel_phases import ATTENTION_B, ATTENTION_F, EXPERTS_B, EXPERTS_F
from counterflow.trace.parts import COMBINE, DISPATCH, Part

Bools = npt.NDArray[np.bool_]

_LEAVES = {
    ATTENTION_F: Part(DISPATCH, "F"),
    EXPERTS_F: Part(COMBINE, "F"),
    EXPERTS_B: Part(DISPATCH, "B"),
    ATTENTION_B: Part(COMBINE, "B"),
}
_NEEDS = {
    EXPERTS_F: Part(DISPATCH, "F"),
    ATTENTION_F: Part(COMBINE, "F"),
    ATTENTION_B: Part(DISPATCH, "B"),
    EXPERTS_B: Part(COMBINE, "B"),
}
ANY = tuple(_LEAVES.values())
_DISPATCHES, _COMBINES = (Part(DISPATCH, "F"), Part(COMBINE, "B")), (Part(COMBINE, "F"), Part(DISPATCH, "B"))
_NO_EXPERTS = re.compile(
    r"all_?reduce|reduce_?scatter|all_?gather|broadcast|multimem|cross_device_reduce", re.IGNORECASE
)
_MICRO_BATCHES = 2  # so many of one direction are under way at once
_FRESH = re.compile(r"notify_dispatch|dispatch_layout", re.IGNORECASE)
_CACHED = re.compile(r"cached_notify", re.IGNORECASE)


def kinds_of(function: str, prepared: str = "") -> tuple[Part, ...]:
    """The parts that a communication kernel can serve; ``prepared``: the functions that made it ready.

    Example:
        >>> [str(part) for part in kinds_of("deep_ep::internode::combine")]
        ['combine(F)', 'dispatch(B)']
        >>> [str(part) for part in kinds_of("deep_ep::internode::dispatch", "deep_ep::internode::notify_dispatch")]
        ['dispatch(F)']
        >>> kinds_of("ncclDevKernel_AllReduce_Sum_bf16_RING_LL")
        ()
    """
    if _NO_EXPERTS.search(function):
        return ()
    lower = function.lower()
    if "combine" in lower:
        return _COMBINES
    if "dispatch" not in lower:
        return ANY
    # Where the tokens go is counted once, for the forward; the way back through a combine knows it.
    if _FRESH.search(prepared):
        return _DISPATCHES[:1]
    return _DISPATCHES[::-1] if _CACHED.search(prepared) else _DISPATCHES


@dataclass(eq=False)
class Block:
    """Compute of one state that was launched on end.

    ``routed``: some of it only experts behind a router run; then it is that which takes what a transfer brought, from
    the ``first`` to the ``last`` place in the order of launch, and shared experts may stand before and after it.
    ``core``: attention itself is in it; ``projected``: a product stands before that, or anywhere where it is not.
    ``part``: what it is of a layer, None where unknown. ``rows``: the places of all its kernels.
    """

    state: int
    first: int
    last: int
    routed: bool
    core: bool
    projected: bool
    part: Part | None
    rows: Ints


@dataclass(eq=False)
class Gap:
    """A transfer to be found: launched after ``made`` began, best after it ended, and before ``needed`` begins."""

    part: Part
    made: Block | None
    needed: Block | None
    served: bool = False

    @property
    def opens(self) -> int:
        """Where it may be launched at the earliest."""
        return -1 if self.made is None else self.made.first

    def urgency(self, place: int, latest: int) -> tuple[bool, int, int]:
        """The least is served first; ``latest``: where the last block began before that place.

        What nothing in the trace needs comes first right after it was made, and last from then on.
        """
        going_on = self.made is not None and self.made.last > place
        if self.needed is not None:
            return going_on, 1, self.needed.first
        return going_on, 0 if self.opens == latest else 2, self.opens


def gaps_of(blocks: Iterable[Block]) -> list[Gap]:
    """The transfers between these blocks, each with what makes it and what needs it, in the order of launch.

    Several micro-batches of one direction take turns: what was made first is needed first. Experts that are not
    behind a router take and leave no transfer, where others in the trace are (shared experts, dense layers). Attention
    that is cut before its core, as in a decode of two micro-batches, takes one with its first half and leaves one with
    its second.
    """
    blocks = list(blocks)
    halves = _halves(blocks)
    first, second = {id(one) for one, _ in halves}, {id(other) for _, other in halves}
    routed = {block.state for block in blocks if block.routed}
    open_gaps: dict[Part, deque[Gap]] = {part: deque() for part in ANY}
    gaps: list[Gap] = []
    for block in blocks:
        if block.state not in _LEAVES or (block.state in routed and not block.routed):
            continue
        waiting = open_gaps[_NEEDS[block.state]]
        if id(block) not in second and waiting:
            waiting.popleft().needed = block
        elif id(block) not in second and not any(gap.part == _NEEDS[block.state] for gap in gaps):
            gaps.append(Gap(_NEEDS[block.state], None, block))
        if id(block) in first:
            continue
        gap = Gap(_LEAVES[block.state], block, None)
        waiting = open_gaps[gap.part]
        waiting.append(gap)
        gaps.append(gap)
        if len(waiting) > _MICRO_BATCHES:
            gaps.remove(waiting.popleft())
    return gaps


def _halves(blocks: list[Block]) -> list[tuple[Block, Block]]:
    """Attention without a core, and the next attention, where that begins with its core."""
    attention = [block for block in blocks if block.state == ATTENTION_F]
    return [(one, two) for one, two in pairwise(attention) if not one.core and two.core and not two.projected]


class Transfers:
    """Gives each transfer its gap, in the order of launch; ``backward``: whether anything in the trace runs one."""

    def __init__(self, gaps: list[Gap], backward: bool) -> None:
        self._coming = deque(sorted(gaps, key=lambda gap: gap.opens))
        self._open: list[Gap] = []
        self._latest = -1
        self._backward = backward
        self._since = -1
        self._last: Gap | None = None

    def serve(self, place: int, kinds: Sequence[Part], joined: bool) -> Gap | None:
        """The gap of the transfer launched at this place, of these kinds; None where nothing tells.

        ``joined``: it came at once after the one before, as several copies do that move one exchange together. Where
        another block was done since that exchange began, it may as well be the next one, that had to wait.
        """
        joined = joined and kinds == ANY
        kinds = [kind for kind in kinds if self._backward or kind.direction == "F"]
        while self._coming and self._coming[0].opens < place:
            self._open.append(self._coming.popleft())
            self._latest = self._open[-1].opens
        self._open = [gap for gap in self._open if gap.needed is None or place < gap.needed.first]
        fitting = [gap for gap in self._open if gap.part in kinds]
        waiting = [gap for gap in fitting if not gap.served]
        if joined and not any(gap.made and self._since < gap.made.last < place for gap in waiting):
            return self._last
        self._since = place
        if waiting:
            self._last = min(waiting, key=lambda gap: gap.urgency(place, self._latest))
            self._last.served = True
        elif fitting:
            self._last = max(fitting, key=lambda gap: gap.opens)
        else:
            self._last = Gap(kinds[0], None, None, served=True) if len(kinds) == 1 else None
        return self._last
