"""Why did a rank idle? Every idle stretch of a step, and the action that its end waited for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from counterflow.report.step import Step
from counterflow.schedule import Action, Payload
from counterflow.schedule.transfers import needs, produces


class Input(NamedTuple):
    """What an action needs: the payload of ``part``, which ``rank`` had computed at ``end_ns``."""

    payload: Payload
    part: Action
    rank: int
    end_ns: int


class Gap(NamedTuple):
    """A stretch in which ``rank`` computed nothing: its end, and what that was waiting for.

    ``before`` is the action that ends it, None at the end of the step. ``waits_for`` has the inputs of that action,
    the one made last at the front; a timeline does not tell which of two arrived last.
    """

    rank: int
    start_ns: int
    end_ns: int
    before: Action | None
    waits_for: tuple[Input, ...]
    is_first: bool = False


def gaps(step: Step) -> Iterator[Gap]:
    """The idle stretches of all ranks, each rank's in time.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> schedule = one_f_one_b(2, 1)
        >>> step = Step(schedule, simulate(schedule, Costs()))
        >>> for gap in gaps(step):
        ...     print(explain(gap, step))
        rank 0 idle from 1 to 4 µs (3 µs): 0B0 waits for the gradient of 1B0, which rank 1 ends at 4 µs
        rank 1 idle from 0 to 1 µs (1 µs): 1F0 waits for the activation of 0F0, which rank 0 ends at 1 µs
        rank 1 idle from 4 to 6 µs (2 µs): nothing left to compute
    """
    made = {
        (produces(part), part.stage, part.microbatch): (part, rank, span.end_ns)
        for rank, row in enumerate(step.rows)
        for action, span in row
        for part in action.parts
    }

    def inputs_of(action: Action) -> tuple[Input, ...]:
        inputs = []
        for part in action.parts:
            need = needs(part, step.schedule.num_stages)
            if need is not None and (*need, part.microbatch) in made:
                inputs.append(Input(need[0], *made[*need, part.microbatch]))
        return tuple(sorted(inputs, key=lambda one: -one.end_ns))

    for rank, row in enumerate(step.rows):
        now = step.origin_ns
        for index, (action, span) in enumerate(row):
            if span.start_ns > now:
                yield Gap(rank, now, span.start_ns, action, inputs_of(action), is_first=index == 0)
            now = max(now, span.end_ns)
        if now < step.last_action_ns:
            yield Gap(rank, now, step.last_action_ns, None, ())


def explain(gap: Gap, step: Step) -> str:
    """One sentence: rank, from when to when, and what the rank waited for, as far as the timeline tells."""
    start, end = (step.time(ns - step.origin_ns) for ns in (gap.start_ns, gap.end_ns))
    length = step.time(gap.end_ns - gap.start_ns)
    return f"rank {gap.rank} idle from {start} to {end} {step.unit} ({length} {step.unit}): {_reason(gap, step)}"


def _reason(gap: Gap, step: Step) -> str:
    if gap.before is None:
        return "nothing left to compute"
    if not gap.waits_for:
        own = f"{gap.before} waits for no other rank: this is what the rank did between actions"
        return f"before its first action, {gap.before}" if gap.is_first else own
    (payload, part, rank, made_ns), *others = gap.waits_for
    here = rank == gap.rank
    maker, made = "this rank" if here else f"rank {rank}", f"{step.time(made_ns - step.origin_ns)} {step.unit}"
    rest = "what the rank did between actions" if here else "the transfer, and what ranks do between actions"
    waits = f"{gap.before} waits for the {payload} of {part}, which {maker} ends"
    if made_ns == gap.end_ns:
        return f"{waits} at {made}"
    if made_ns > gap.end_ns:
        return f"{waits} only at {made} by its clock: the clocks of the two ranks differ"
    # What was made before may still have been on its way, and have arrived later.
    also = "".join(
        f", and for the {other.payload} of {other.part}, which rank {other.rank} had ended at "
        f"{step.time(other.end_ns - step.origin_ns)} {step.unit}"
        for other in others
        if other.rank != gap.rank
    )
    if made_ns > gap.start_ns:
        return f"{waits} at {made}{also}; the other {step.time(gap.end_ns - made_ns)} {step.unit} are {rest}"
    by_then = f"{gap.before} needs the {payload} of {part}, which {maker} had ended by then, at {made}"
    return f"{by_then}{also}: this is {rest}"
