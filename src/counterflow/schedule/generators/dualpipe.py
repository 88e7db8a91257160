"""DualPipe and DualPipeV: forward and backward of two directions hide each other's communication."""

from counterflow.schedule.generators.sizes import require_sizes
from counterflow.schedule.generators.steps import Step, from_steps
from counterflow.schedule.schedule import Schedule


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Micro-batches enter at both ends; rank r holds stages r and R-1-r, each stage has a twin.

    4 ranks, 8 micro-batches, of which 0-3 enter at rank 0 and 4-7 at rank 3; F, I and W are equally long, B
    twice and F&B three times as long::

        F0 F1 F2 F4 I4 W4 F5 F3&B5--- .  F6&B0--- B6--- .  F7&B1--- B7--- I2 W2 I3 W3
        .  F0 F4 F1 F5 F2 B4--- F6&B0--- F3&B5--- F7&B1--- B6--- B2--- .  I7 I3 W7 W3
        .  F4 F0 F5 F1 F6 B0--- F2&B4--- F7&B1--- F3&B5--- B2--- B6--- .  I3 I7 W3 W7
        F4 F5 F6 F0 I0 W0 F1 F7&B1--- .  F2&B4--- B2--- .  F3&B5--- B3--- I6 W6 I7 W7

    Raises:
        ScheduleError: R or M odd, or M < 2R.

    Example:
        >>> from counterflow import dualpipe
        >>> print(dualpipe(2, 4))
        0F0 1F2 0F1 1B2 (1F3;0B0)OVERLAP_F_B 1B3 0I1 0W1
        0F2 1F0 0F3 1B0 (1F1;0B2)OVERLAP_F_B 1B1 0I3 0W3

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.2.1 and figure 5; the order is
    that of the code published as DualPipe.
    """
    require_sizes("dualpipe", num_ranks, num_microbatches, even=True, microbatches_per_rank=2)
    half, last = num_microbatches // 2, num_ranks - 1
    ends = [min(rank, last - rank) for rank in range(num_ranks)]
    rows = (_row(end, num_ranks // 2, half, near=end, far=last - end) for end in ends)
    # The second half of the micro-batches enters at the last rank, whose stages count down from there.
    first_ids = [{last - rank: half} for rank in range(num_ranks)]
    return from_steps("dualpipe", rows, num_ranks, num_microbatches, first_ids)


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """One direction folded into a V: rank r holds stages r and 2R-1-r, and no stage has a twin.

    2 ranks, 4 micro-batches, each of which passes a rank twice, down and back up; F, I and W are equally long, B
    twice and F&B three times as long::

        F0 F1 F2 F0 I0 W0 F1 F3&B1--- .  F2&B0--- B2--- .  F3&B1--- B3--- I2 W2 I3 W3
        .  F0 F0 F1 F1 F2 B0--- F2&B0--- F3&B1--- F3&B1--- B2--- B2--- .  I3 I3 W3 W3

    Raises:
        ScheduleError: fewer than one rank, or M < 2R.

    Example:
        >>> from counterflow import dualpipev
        >>> print(dualpipev(1, 2))
        0F0 1F0 0F1 1B0 (1F1;0B0)OVERLAP_F_B 1B1 0I1 0W1

    Source: Qi et al. 2025, "DualPipe could be better without the dual" (cut-in-half); the order is that
    of the code published as DualPipeV.
    """
    require_sizes("dualpipev", num_ranks, num_microbatches, microbatches_per_rank=2)
    last = 2 * num_ranks - 1
    rows = (_row(rank, num_ranks, num_microbatches, near=rank, far=last - rank) for rank in range(num_ranks))
    return from_steps("dualpipev", rows, 2 * num_ranks, num_microbatches)


def _row(h: int, depth: int, num_microbatches: int, near: int, far: int) -> list[Step]:
    """The eight published steps of the rank ``h`` from its end of a pipeline ``depth`` ranks deep.

    ``near`` is its stage for the direction that enters nearer to it. DualPipe is two such pipelines, R/2 deep,
    with M/2 micro-batches each way; DualPipeV is one, R deep, with all M going down and coming back.
    """
    to_middle = depth - h - 1
    row: list[Step] = [("F", near)] * (2 * to_middle)  # 1
    row += [("F", near), ("F", far)] * (h + 1)  # 2
    row += [("I", far), ("W",), ("F", far)] * to_middle  # 3
    pairs: list[Step] = [("F&B", near, far), ("F&B", far, near)] * (num_microbatches - 2 * depth + h + 1)  # 4
    if to_middle == 0:
        # Nothing is in flight yet under which the first pair could hide: apart, B's gradient leaves no later.
        pairs[:1] = [("F", near), ("B", far)]
    row += pairs
    row += [("B", far), ("F&B", far, near)] * to_middle  # 5
    last = [far, near] * (h + 1)  # 6
    row += [("B", stage) for stage in last[: h + 1]] + [("I", stage) for stage in last[h + 1 :]]
    row += [("W",), ("I", near)] * to_middle  # 7
    return row + [("W",)] * (h + 1)  # 8
