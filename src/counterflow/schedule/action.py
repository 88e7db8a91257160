"""One cell of a schedule: what a rank computes next, and how that is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from counterflow.errors import ScheduleError


class Kind(StrEnum):
    """What an action computes; the values are torch pipelining's own."""

    F = "F"
    """forward"""
    B = "B"
    """full backward: I, then W"""
    I = "I"  # noqa: E741 - the field's own letter
    """backward for the stage's input"""
    W = "W"
    """backward for the stage's weights"""
    F_B = "OVERLAP_F_B"
    """a forward and a backward of different micro-batches, overlapped"""

    @property
    def sends_gradient(self) -> bool:
        """Whether the action produces the gradient of the stage's input."""
        return self in (Kind.B, Kind.I)


BEYOND = 1_000_000
"""No stage and no micro-batch has this number: a file must not make us count to one that no pipeline has."""
_NUMBER = "(?:0|[1-9][0-9]{0,5})"
_SIMPLE = re.compile(f"({_NUMBER})([FBIW])({_NUMBER})")
_OVERLAP = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True)
class Action:
    """One forward, backward, half backward, or overlapped pair of one stage.

    An overlapped action carries its forward and its backward in ``pair``; its own stage
    and micro-batch are the forward's. ``parts`` treats both sorts alike.

    Raises:
        ScheduleError: the pair is not a forward and a backward of different micro-batches.

    Example:
        >>> from counterflow import Action
        >>> action = Action.parse("(0F4;7B1)OVERLAP_F_B")
        >>> [str(part) for part in action.parts], str(action)
        (['0F4', '7B1'], '(0F4;7B1)OVERLAP_F_B')

    The text is the one that ``torch.distributed.pipelining`` reads and writes.
    """

    kind: Kind
    stage: int
    microbatch: int
    pair: tuple[Action, Action] | None = None

    def __post_init__(self) -> None:
        if (self.pair is not None) != (self.kind is Kind.F_B):
            raise ScheduleError(
                f"an action of kind {self.kind.value} got {self.pair!r} as its pair; "
                "only OVERLAP_F_B has one: build it with Action.overlap(forward, backward)"
            )
        if not (0 <= self.stage < BEYOND and 0 <= self.microbatch < BEYOND):
            raise ScheduleError(
                f"an action got stage {self.stage} and micro-batch {self.microbatch}; both count from 0 and stay "
                f"below {BEYOND:,}"
            )
        if self.pair is not None:
            forward, backward = self.pair
            fits = forward.kind is Kind.F and backward.kind.sends_gradient
            if not fits or forward.microbatch == backward.microbatch:
                raise ScheduleError(
                    f"an overlapped action got {forward} and {backward}; it needs a forward, then a backward "
                    "(B or I) of another micro-batch"
                )

    @classmethod
    def overlap(cls, forward: Action, backward: Action) -> Action:
        """An F&B: ``forward`` and ``backward`` (B or I) hide each other's communication."""
        return cls(Kind.F_B, forward.stage, forward.microbatch, (forward, backward))

    @property
    def parts(self) -> tuple[Action, ...]:
        """The simple actions in it, in the order in which they run when not overlapped."""
        return self.pair if self.pair is not None else (self,)

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action written as ``text``; the opposite of ``str(action)``.

        Raises:
            ScheduleError: anything but the exact text of one action, also when more follows it.
        """
        if match := _SIMPLE.fullmatch(text):
            stage, kind, microbatch = match.groups()
            return cls(Kind(kind), int(stage), int(microbatch))
        if match := _OVERLAP.fullmatch(text):
            return cls.overlap(cls.parse(match[1]), cls.parse(match[2]))
        raise ScheduleError(
            f"{text!r} is not an action; write stage, one of F B I W, micro-batch, as in 3F12, or "
            "(0F4;7B1)OVERLAP_F_B, with numbers below a million"
        )

    def __str__(self) -> str:
        if self.pair is not None:
            forward, backward = self.pair
            return f"({forward};{backward}){self.kind.value}"
        return f"{self.stage}{self.kind.value}{self.microbatch}"
