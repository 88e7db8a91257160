"""Schedules in the shape of a V: rank r holds stages r and 2R-1-r, so a loss is where its input was.

All three are one building block, the path of a micro-batch down and up the V in forward and back in backward,
repeated every six slots, which is as long as a rank's six actions for it take, and then squeezed. How fast the block
goes from rank to rank sets how long activations live: the faster, the less memory and the more bubble.
"""

from itertools import count

from counterflow.schedule.generators.sizes import require_sizes
from counterflow.schedule.generators.steps import Step, from_steps
from counterflow.schedule.schedule import Schedule

_PERIOD = 6


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """No bubble with 1F1B's memory (ZB-V).

    A rank holds 2R activations of its half-size stages at most, as much as 1F1B's first. With F, I and W equally long
    a step takes 6M + R-1 of them from M = R on, which is the least in a V, and from M = 2R-1 on no rank
    waits between its first action and its last.

    3 ranks, 4 micro-batches, F, I and W equally long::

        F0 F1 F2 F3 .  F0 I0 W0 F1 I1 W1 F2 I2 W2 I0 W0 F3 I3 W3 I1 I2 W1 I3 W2 W3 .
        .  F0 F1 F2 F0 F3 F1 I0 W0 F2 I1 W1 I0 W0 F3 I2 W2 I1 I3 I2 W1 I3 W3 W2 W3 .
        .  .  F0 F0 F1 F1 F2 F2 I0 W0 F3 I0 W0 F3 I1 W1 I1 I2 I2 I3 I3 W1 W2 W2 W3 W3

    Raises:
        ScheduleError: fewer than one rank or micro-batch.

    Example:
        >>> from counterflow import zbv
        >>> print(zbv(2, 1))
        0F0 3F0 3I0 3W0 0I0 0W0
        1F0 2F0 2I0 1I0 2W0 1W0

    Source: Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 6; as a repeated building block Qi et al.
    2024, "Pipeline Parallelism with Controllable Memory", figure 4 (V-ZB).
    """
    return _squeezed("zbv", num_ranks, num_microbatches, (4, 2), (2, 0, 2), room=2 * num_ranks, dense=True)


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """Half of 1F1B's memory and no more than half of its bubble.

    A rank holds 2⌊(R+2)/2⌋ activations of its half-size stages at most, where 1F1B's first holds 2R. With F, I
    and W equally long and M ≥ R/2 the step is at most 3(R-1) of them longer than a rank's work; 1F1B's is 6(R-1).

    4 ranks, 5 micro-batches, F, I and W equally long::

        F0 F1 F2 F3 .  .  .  F0 I0 W0 F1 I1 W1 F2 F4 I2 I0 W2 W0 F3 I3 W3 I1 W1 .  F4 I4 I2 W4 I3 W2 W3 .  I4 W4
        .  F0 F1 F2 F3 .  F0 .  F1 I0 W0 F2 I1 W1 .  I0 W0 F4 F3 I2 W2 I1 W1 I3 F4 W3 I2 I4 I3 W2 W4 W3 I4 W4 .
        .  .  F0 F1 F2 F0 .  F1 .  F2 I0 W0 F3 I1 I0 W1 W0 F3 F4 .  I1 I2 W2 F4 I3 I2 W1 I3 I4 W3 W2 I4 W4 W3 W4
        .  .  .  F0 F0 F1 F1 F2 F2 .  .  I0 W0 I0 W0 F3 F3 I1 W1 I1 W1 F4 F4 I2 I2 I3 I3 W2 W2 I4 I4 W3 W3 W4 W4

    Raises:
        ScheduleError: fewer than one rank or micro-batch.

    Example:
        >>> from counterflow.schedule import v_half
        >>> print(v_half(2, 1))
        0F0 3F0 3I0 3W0 0I0 0W0
        1F0 2F0 2I0 1I0 2W0 1W0

    Source: Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", figure 4 (V-Half).
    """
    gaps = (0, 0 if num_ranks % 2 else 3, 1)
    room = 2 * ((num_ranks + 2) // 2)
    return _squeezed("v-half", num_ranks, num_microbatches, (2, 1), gaps, room)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """A third of 1F1B's memory and no more than two thirds of its bubble.

    A rank holds 2⌊(R+4)/3⌋ activations of its half-size stages at most, where 1F1B's first holds 2R. With F, I
    and W equally long the step is at most 4(R-1) of them longer than a rank's work; 1F1B's is 6(R-1). Where they
    are not, the bubble grows with M: too little is stored to wait for the longer ones.

    4 ranks, 4 micro-batches, F, I and W equally long::

        F0 F1 F2 .  .  .  .  F0 I0 W0 F1 I1 W1 F3 .  I0 W0 .  .  F2 I2 I1 W2 W1 .  F3 I3 I2 W3 W2 .  .  .  I3 W3
        .  F0 F1 .  .  .  F0 .  F1 I0 W0 F2 I1 W1 I0 W0 F3 .  F2 .  I1 I2 W2 W1 F3 .  I2 I3 W3 W2 .  .  I3 W3 .
        .  .  F0 F1 .  F0 .  F1 .  .  I0 W0 F2 I0 W0 I1 W1 F2 F3 I1 W1 .  I2 F3 W2 I2 W2 .  I3 W3 .  I3 W3 .  .
        .  .  .  F0 F0 F1 F1 .  .  .  .  I0 I0 W0 W0 F2 F2 I1 I1 W1 W1 F3 F3 I2 I2 W2 W2 .  .  I3 I3 W3 W3 .  .

    Raises:
        ScheduleError: fewer than one rank or micro-batch.

    Example:
        >>> from counterflow.schedule import v_min
        >>> print(v_min(2, 1))
        0F0 3F0 3I0 3W0 0I0 0W0
        1F0 2F0 2I0 1I0 2W0 1W0

    Source: Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", figure 4 (V-Min).
    """
    gaps = (0, 0 if num_ranks % 3 else 2, 0)
    room = 2 * ((num_ranks + 4) // 3)
    return _squeezed("v-min", num_ranks, num_microbatches, (1, 1), gaps, room)


def _squeezed(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    pace: tuple[int, int],
    gaps: tuple[int, int, int],
    room: int,
    dense: bool = False,
) -> Schedule:
    """The repeated block, run slot by slot: each rank does what is ready and has its turn first.

    An action's turn is its slot in the block, six later for each micro-batch. Towards the end W waits until nothing
    else is ready: it fills the bubble. Each rank has ``room`` for so many activations; a forward on the way down
    leaves what is owed to those on the way up that have their turn before it, so nobody waits for ever. In a
    ``dense`` block W follows I at once, so one room owed is enough, and W need not wait for the end so early.
    """
    require_sizes(name, num_ranks, num_microbatches)
    block, last = _block(num_ranks, pace, gaps), 2 * num_ranks - 1
    # How many are done of each stage; beyond both ends (at the index -1, and after the last stage) all are.
    forward, inputs = ([0] * (last + 1) + [num_microbatches] for _ in range(2))
    weight = [0] * (last + 1)

    def first_ready(near: int) -> tuple[str, int] | None:
        far, (down, up, *back) = last - near, block[near]
        turns = []
        free = room - forward[near] - forward[far] + weight[near] + weight[far]
        down, up = down + _PERIOD * forward[near], up + _PERIOD * forward[far]
        owed = -((up - down) // _PERIOD)
        if forward[near] < forward[near - 1] and free > max(0, min(owed, 1) if dense else owed):
            turns.append((down, "F", near))
        if forward[far] < forward[far - 1] and free > 0:
            turns.append((up, "F", far))
        ending = weight[far] >= num_microbatches - near if dense else forward[far] == num_microbatches
        behind_all = _PERIOD * (num_microbatches + num_ranks) if ending else 0
        for stage, slot, weight_slot in zip((far, near), back[:2], back[2:], strict=True):
            if inputs[stage] < min(forward[stage], inputs[stage + 1]):
                turns.append((slot + _PERIOD * inputs[stage], "I", stage))
            if weight[stage] < inputs[stage]:
                turns.append((weight_slot + _PERIOD * weight[stage] + behind_all, "W", stage))
        return min(turns)[1:] if turns else None

    rows: list[list[Step]] = [[] for _ in range(num_ranks)]
    done = {"F": forward, "I": inputs, "W": weight}
    while min(weight) < num_microbatches:
        steps = [first_ready(rank) for rank in range(num_ranks)]
        assert any(steps)
        for row, step in zip(rows, steps, strict=True):
            if step:
                kind, stage = step
                done[kind][stage] += 1
                row.append(step)
    return from_steps(name, rows, 2 * num_ranks, num_microbatches)


def _block(num_ranks: int, pace: tuple[int, int], gaps: tuple[int, int, int]) -> list[list[int]]:
    """For each rank the slots of a micro-batch's six actions: F down and up the ranks, I down and up, and their W.

    ``pace`` is the slots from rank to rank on the way down and up, ``gaps`` are left at the three turns between
    the ways. A W has the first slot after its I that no other action has in any period.
    """
    slot, ways = 0, []
    for way, gap in enumerate((0, *gaps)):
        slots = [slot + gap + pace[way % 2] * passed for passed in range(num_ranks)]
        ways.append(slots[::-1] if way % 2 else slots)
        slot = slots[-1] + 1
    block = [list(slots) for slots in zip(*ways, strict=True)]
    for slots in block:
        for slot in slots[2:4]:
            taken = {taken % _PERIOD for taken in slots}
            slots.append(next(free for free in count(slot + 1) if free % _PERIOD not in taken))
    return block
