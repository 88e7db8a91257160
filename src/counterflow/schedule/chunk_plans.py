"""Chunk plans: the order in which the steps of two micro-batches are issued, so that each hides the other's transfers.

A micro-batch goes through a chunk (some blocks of one stage) as a *program*: named steps on two lanes, compute and
communication, each with the steps that it needs. A *plan* merges programs into one order. Steps of one lane run in
that order; a step waits for those it needs and for nothing else. So what a plan decides is what the compute lane does
while rows are under way.

Source: the orders are those of the published diagrams (training, prefill, decode) and of the published training trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from counterflow.errors import ScheduleError

COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass(frozen=True)
class Step:
    """One step of a program; ``needs`` are places in that program, ``layer`` is the chunk's block it belongs to."""

    name: str
    lane: str
    needs: tuple[int, ...]
    layer: int = 0

    def __str__(self) -> str:
        return f"{self.name} of layer {self.layer}"


Steps = tuple[Step, ...]
"""Those of one program, in an order in which they could be issued."""

TRAINING = (
    "combine(B) shared(B) tail(W) attn(F) mlp(B) dispatch(F) dispatch(B) "
    "mlp(W) shared(W) shared(F) mlp(F) combine(F) attn(B) attn(W)"
)
"""One layer of an F&B: F of one micro-batch with B of another."""

PREFILL = "attn0 dispatch0 shared1 attn1 dispatch1 mlp0 combine0 mlp1 combine1 shared0"
"""One layer of two prefills; 0 is the one that goes first."""

DECODE = (
    "shared1 attn-a0 dispatch-recv1 mlp1 combine1 attn-b0 combine-recv1 dispatch0 "
    "shared0 attn-a1 dispatch-recv0 mlp0 combine0 attn-b1 combine-recv0 dispatch1"
)
"""One layer of two decodes, where the compute lane itself sends and receives."""


def forward_steps(shared: Sequence[bool], mark: str = "(F)", *, halves: bool = False, receives: bool = False) -> Steps:
    """A forward through blocks, of which ``shared`` says whether each has work that needs no rows.

    With ``halves`` the part before dispatch comes as ``attn-a`` and ``attn-b``; with ``receives`` the wait for rows is
    a step of its own, ``dispatch-recv`` and ``combine-recv``. ``tail`` is what follows the last block's rows.

    Example:
        >>> [step.name for step in forward_steps([False])]
        ['attn(F)', 'dispatch(F)', 'mlp(F)', 'combine(F)', 'tail(F)']
    """
    steps: list[Step] = []

    def add(name: str, lane: str, *needs: int) -> int:
        steps.append(Step(f"{name}{mark}", lane, needs, layer))
        return len(steps) - 1

    def transfer(name: str, what: int) -> int:
        sent = add(name, COMMUNICATION, what)
        return add(f"{name}-recv", COMPUTE, sent) if receives else sent

    ready: tuple[int, ...] = ()
    layer = 0
    for layer in range(len(shared)):
        before = add("attn-b", COMPUTE, add("attn-a", COMPUTE, *ready)) if halves else add("attn", COMPUTE, *ready)
        received = transfer("dispatch", before)
        beside = (add("shared", COMPUTE, before),) if shared[layer] else ()
        ready = (transfer("combine", add("mlp", COMPUTE, received)), *beside)
    add("tail", COMPUTE, *ready)
    return tuple(steps)


def backward_steps(shared: Sequence[bool], *, weights: bool = True) -> Steps:
    """A backward through the same blocks, the last one first; without ``weights`` what only they need is left out.

    Example:
        >>> [step.name for step in backward_steps([False], weights=False)]
        ['tail(B)', 'combine(B)', 'mlp(B)', 'dispatch(B)', 'attn(B)']
    """
    steps: list[Step] = []

    def add(name: str, lane: str, *needs: int) -> int:
        steps.append(Step(name, lane, needs, layer))
        return len(steps) - 1

    def compute(name: str, *needs: int) -> int:
        gradient = add(f"{name}(B)", COMPUTE, *needs)
        if weights:
            add(f"{name}(W)", COMPUTE, gradient)
        return gradient

    layer = len(shared) - 1
    ready = compute("tail")
    for layer in reversed(range(len(shared))):
        returned = add("combine(B)", COMMUNICATION, ready)
        beside = (compute("shared", ready),) if shared[layer] else ()
        ready = compute("attn", add("dispatch(B)", COMMUNICATION, compute("mlp", returned)), *beside)
    return tuple(steps)


@dataclass(frozen=True)
class ChunkPlan:
    """Programs and one order for all their steps: pairs (program, place in it)."""

    programs: tuple[Steps, ...]
    order: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        """A plan is legal, or is none.

        Raises:
            ScheduleError: a step comes before one that it needs, twice, or not at all.
        """
        issued: set[tuple[int, int]] = set()
        for program, place in self.order:
            if not (0 <= program < len(self.programs) and 0 <= place < len(self.programs[program])):
                raise ScheduleError(f"a plan has step {place} of program {program}, which do not exist; number from 0")
            step = self.programs[program][place]
            if (program, place) in issued:
                raise ScheduleError(f"a plan issues {step} twice; issue each step once")
            for needed in step.needs:
                if (program, needed) not in issued:
                    raise ScheduleError(
                        f"a plan issues {step} before {self.programs[program][needed]}, whose result it reads; issue "
                        "that one first"
                    )
            issued.add((program, place))
        for program, steps in enumerate(self.programs):
            for place, step in enumerate(steps):
                if (program, place) not in issued:
                    raise ScheduleError(f"a plan leaves out {step}; issue every step once")

    @property
    def names(self) -> tuple[str, ...]:
        """What is issued, in order."""
        return tuple(self.programs[program][place].name for program, place in self.order)


def lay_out(pattern: str, *programs: Steps) -> ChunkPlan:
    """The plan that repeats ``pattern``, the names of one layer's steps, until every step has been issued.

    A name whose next step still needs another one is passed over until the next round, so one pattern serves from the
    first layer to the last, and for programs of different lengths. Steps that it does not name come between the rounds.

    Raises:
        ScheduleError: two programs have a step of the same name, or steps need each other.

    Example:
        >>> print(*lay_out(TRAINING, forward_steps([False]), backward_steps([False], weights=False)).names)
        tail(B) combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(F) combine(F) attn(B) tail(F)
    """
    owner: dict[str, int] = {}
    for program, steps in enumerate(programs):
        for name in dict.fromkeys(step.name for step in steps):
            if owner.setdefault(name, program) != program:
                raise ScheduleError(f"two programs of a plan have the step {name}; give them different marks")
    named = pattern.split()
    waiting = {
        name: [place for place, step in enumerate(programs[program]) if step.name == name]
        for name, program in owner.items()
    }
    unnamed = [name for name in owner if name not in named]
    order: list[tuple[int, int]] = []
    issued: set[tuple[int, int]] = set()

    def issue(name: str) -> None:
        program, places = owner.get(name, 0), waiting.get(name, [])
        if places and all((program, needed) in issued for needed in programs[program][places[0]].needs):
            place = places.pop(0)
            issued.add((program, place))
            order.append((program, place))

    while any(waiting.values()):
        before = len(order)
        for name in (*unnamed, *named):
            issue(name)
        if len(order) == before:
            stuck = ", ".join(name for name, places in waiting.items() if places)
            raise ScheduleError(f"the steps {stuck} need each other or a later one of their name; order them by need")
    return ChunkPlan(programs, tuple(order))


def one_after_the_other(*programs: Steps) -> ChunkPlan:
    """The plan that hides nothing: every program in its own order, the next one behind it."""
    return ChunkPlan(
        programs, tuple((program, place) for program, steps in enumerate(programs) for place in range(len(steps)))
    )


def in_a_row(*plans: ChunkPlan) -> ChunkPlan:
    """The plans behind each other, without a break: what waits for the last transfers of one comes behind the first
    compute of the next.

    Example:
        >>> pair = lay_out(PREFILL, forward_steps([False], "0"), forward_steps([False], "1"))
        >>> print(*in_a_row(pair, pair).names[8:13])
        attn0 dispatch0 tail0 tail1 attn1
    """
    programs: list[Steps] = []
    order: list[tuple[int, int]] = []
    waiting: list[tuple[int, int]] = []
    for plan in plans:
        own = [(program + len(programs), place) for program, place in plan.order]
        transfers = [
            number
            for number, (program, place) in enumerate(plan.order)
            if plan.programs[program][place].lane == COMMUNICATION
        ]
        first, end = (transfers[0] + 1, transfers[-1] + 1) if transfers else (0, len(own))
        order += [*own[:first], *waiting, *own[first:end]]
        waiting = own[end:]
        programs += plan.programs
    return ChunkPlan(tuple(programs), (*order, *waiting))
