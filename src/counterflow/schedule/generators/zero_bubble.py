"""Zero Bubble: the backward cut in two, and the half that nobody waits for moved into the bubble."""

from counterflow.schedule.generators.sizes import require_sizes
from counterflow.schedule.generators.steps import Step, from_steps
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

    Source: Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2.1 and figure 3 (ZB-H1).
    """
    require_sizes("zb1p", num_ranks, num_microbatches)
    rows = (_row(rank, num_ranks - rank, rank, num_microbatches) for rank in range(num_ranks))
    return from_steps("zb1p", rows, num_ranks, num_microbatches)


def zb2p(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB1P with twice the forwards first and twice the delay (ZB-H2): no rank waits once it has begun.

    Rank r runs 2(R-r)-1 forwards before its first I, just as long as that I's gradient needs to come, and delays
    its W by 2r micro-batches, which then fill the end. Every rank holds 2R-1 activations. From M = 2R-1 on and with
    F, I and W equally long no rank has a bubble between its first action and its last. If all wait for
    each other at the end of the step, the ramp of R-1 forwards is left: the step is then no shorter than ZB1P's.

    3 ranks, 6 micro-batches, F, I and W equally long::

        F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5 .  .
        .  F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 I4 W2 I5 W3 W4 W5 .
        .  .  F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 W2 W3 W4 W5

    Raises:
        ScheduleError: fewer than one rank or micro-batch.

    Example:
        >>> from counterflow.schedule import zb2p
        >>> print(zb2p(2, 3))
        0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2
        1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2

    Source: Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2.2 and figure 3 (ZB-H2).
    """
    require_sizes("zb2p", num_ranks, num_microbatches)
    rows = (_row(rank, 2 * (num_ranks - rank) - 1, 2 * rank, num_microbatches) for rank in range(num_ranks))
    return from_steps("zb2p", rows, num_ranks, num_microbatches)


def _row(stage: int, ahead: int, delay: int, num_microbatches: int) -> list[Step]:
    """``ahead`` forwards, then I and F in turn, and from the micro-batch ``delay`` on a W between them."""
    row: list[Step] = [("F", stage)] * min(ahead, num_microbatches)
    for m in range(num_microbatches):
        row.append(("I", stage))
        if m >= delay:
            row.append(("W", stage))
        if m + ahead < num_microbatches:
            row.append(("F", stage))
    return row + [("W", stage)] * min(delay, num_microbatches)
