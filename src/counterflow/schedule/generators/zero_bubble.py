"""Zero Bubble: the backward cut in two, and the half that nobody waits for moved into the bubble."""

from counterflow.schedule.action import Action, Kind
from counterflow.schedule.generators.sizes import require_sizes
from counterflow.schedule.schedule import Schedule


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with each backward cut into I and W, and rank r's W delayed by r micro-batches (ZB-H1).

    The gradient leaves a stage after I, so the ranks above start their backward earlier, and the W left
    over fill the end of the step. The delay lets every rank hold R activations, as 1F1B's first one does.

    3 ranks, 4 micro-batches, F, I and W equally long::

        F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    Raises:
        ScheduleError: fewer than one rank or micro-batch.

    Example:
        >>> from counterflow import zb1p
        >>> print(zb1p(2, 2))
        0F0 0F1 0I0 0W0 0I1 0W1
        1F0 1I0 1F1 1I1 1W0 1W1

    Source: Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2.2 and figure 3 (ZB-H1).
    """
    require_sizes("zb1p", num_ranks, num_microbatches)
    return Schedule.from_rows((_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks)), "zb1p")


def _row(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    in_flight = min(num_ranks - rank, num_microbatches)
    row = [Action(Kind.F, rank, m) for m in range(in_flight)]
    for m in range(num_microbatches):
        row.append(Action(Kind.I, rank, m))
        if m >= rank:
            row.append(Action(Kind.W, rank, m - rank))
        if m + in_flight < num_microbatches:
            row.append(Action(Kind.F, rank, m + in_flight))
    waiting = range(max(num_microbatches - rank, 0), num_microbatches)
    return row + [Action(Kind.W, rank, m) for m in waiting]
