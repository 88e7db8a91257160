"""1F1B: as many forwards in flight as there are ranks below, then one backward for each forward."""

from counterflow.schedule.generators.sizes import require_sizes
from counterflow.schedule.generators.steps import Step, from_steps
from counterflow.schedule.schedule import Schedule


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One forward, one backward, once the pipeline is full: GPipe's bubble, R activations at most.

    3 ranks, 4 micro-batches, B twice as long as F::

        F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
        .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
        .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .

    Raises:
        ScheduleError: fewer than one rank or micro-batch.

    Example:
        >>> from counterflow import one_f_one_b
        >>> print(one_f_one_b(2, 2))
        0F0 0F1 0B0 0B1
        1F0 1B0 1F1 1B1

    Source: Narayanan et al. 2019, "PipeDream", section 3.2; 2021, "PipeDream-2BW", figure 2.
    """
    require_sizes("1f1b", num_ranks, num_microbatches)
    rows = (_row(rank, min(num_ranks - rank - 1, num_microbatches), num_microbatches) for rank in range(num_ranks))
    return from_steps("1f1b", rows, num_ranks, num_microbatches)


def _row(stage: int, warm_up: int, num_microbatches: int) -> list[Step]:
    forward: Step = ("F", stage)
    backward: Step = ("B", stage)
    return [forward] * warm_up + [forward, backward] * (num_microbatches - warm_up) + [backward] * warm_up
