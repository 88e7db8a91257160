"""1F1B: as many forwards in flight as there are ranks below, then one backward for each forward."""

from counterflow.schedule.action import Action, Kind
from counterflow.schedule.generators.sizes import require_sizes
from counterflow.schedule.schedule import Schedule


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One forward, one backward, once the pipeline is full: GPipe's bubble, R activations at most.

    3 ranks, 4 micro-batches, B twice as long as F::

        0F0 0F1 0F2  .   .   .  0B0 0B0 0F3 0B1 0B1  .  0B2 0B2  .   .  0B3 0B3
         .  1F0 1F1  .  1B0 1B0 1F2 1B1 1B1 1F3 1B2 1B2  .   .  1B3 1B3  .   .
         .   .  2F0 2B0 2B0 2F1 2B1 2B1 2F2 2B2 2B2 2F3 2B3 2B3  .   .   .   .

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
    return Schedule.from_rows((_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks)), "1f1b")


def _row(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    forwards = [Action(Kind.F, rank, m) for m in range(num_microbatches)]
    backwards = [Action(Kind.B, rank, m) for m in range(num_microbatches)]
    warm_up = min(num_ranks - rank - 1, num_microbatches)
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        row += [forward, backward]
    return row + backwards[num_microbatches - warm_up :]
