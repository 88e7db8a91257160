"""GPipe: all forwards, then all backwards."""

from counterflow.schedule.action import Action, Kind
from counterflow.schedule.generators.sizes import require_sizes
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
    rows = (
        [Action(kind, rank, m) for kind in (Kind.F, Kind.B) for m in range(num_microbatches)]
        for rank in range(num_ranks)
    )
    return Schedule.from_rows(rows, "gpipe")
