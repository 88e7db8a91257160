"""GPipe: all forwards, then all backwards."""

from counterflow.schedule.generators.sizes import require_sizes
from counterflow.schedule.generators.steps import from_steps
from counterflow.schedule.schedule import Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, oldest micro-batch first: easy to see, hungry for memory.

    3 ranks, 3 micro-batches, B twice as long as F::

        F0 F1 F2 .  .  .  .  .  .  B0--- B1--- B2---
        .  F0 F1 F2 .  .  .  B0--- B1--- B2--- .  .
        .  .  F0 F1 F2 B0--- B1--- B2--- .  .  .  .

    Raises:
        ScheduleError: fewer than one rank or micro-batch.

    Example:
        >>> from counterflow import gpipe
        >>> print(gpipe(2, 2))
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1

    Source: Huang et al. 2019, "GPipe", section 2.3.
    """
    require_sizes("gpipe", num_ranks, num_microbatches)
    rows = ([("F", rank)] * num_microbatches + [("B", rank)] * num_microbatches for rank in range(num_ranks))
    return from_steps("gpipe", rows, num_ranks, num_microbatches)
