"""Which numbers of ranks and micro-batches a schedule exists for, and how its absence is told."""

import reprlib

from counterflow.errors import ScheduleError
from counterflow.schedule.action import BEYOND

MOST_FORWARDS = 20_000_000
"""Of all ranks together: the schedule then takes a few GB."""


def require_sizes(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    even: bool = False,
    microbatches_per_rank: int = 0,
    chunks: int = 1,
) -> None:
    """Refuse illegal sizes in one sentence with the nearest legal values, and those that no machine has room for.

    ``even`` asks for even numbers of both; ``microbatches_per_rank`` for at least so many times R. ``chunks`` is the
    number of stages on each rank.

    Raises:
        ScheduleError: naming the schedule, what it got and what it needs.
    """
    step = 2 if even else 1
    _require(name, "ranks", num_ranks, least=step, step=step)
    least = max(microbatches_per_rank * num_ranks, step)
    _require(name, "micro-batches", num_microbatches, least, step, given=f" on {_counted(num_ranks, 'ranks')}")
    forwards = num_ranks * num_microbatches * chunks
    if forwards > MOST_FORWARDS or num_microbatches >= BEYOND:
        raise ScheduleError(
            f"{name} got {num_ranks} ranks of {_counted(chunks, 'stages')} each and {num_microbatches} micro-batches; "
            f"give fewer than {BEYOND:,} micro-batches, and at most {MOST_FORWARDS:,} forwards over all ranks"
        )


def require_rounds(name: str, num_ranks: int, num_microbatches: int, chunks: int) -> int:
    """The micro-batches of a round where rounds are equally long and, if there are several, of at least R.

    Raises:
        ScheduleError: fewer than one rank, micro-batch or chunk, or micro-batches that do not fill M // R rounds.
    """
    _require(name, "chunks on each rank", chunks, least=1, step=1)
    require_sizes(name, num_ranks, num_microbatches, chunks=chunks)
    rounds = max(1, num_microbatches // num_ranks)
    size, left_over = divmod(num_microbatches, rounds)
    if left_over:
        below, above = rounds * size, min(rounds * (size + 1), (rounds + 1) * num_ranks)
        raise ScheduleError(
            f"{name} got {num_microbatches} micro-batches on {num_ranks} ranks; it needs as many in each of its "
            f"{rounds} rounds of at least {num_ranks}: the nearest legal values are {below} and {above}"
        )
    return size


def _require(name: str, what: str, value: object, least: int, step: int, given: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ScheduleError(f"{name} got {reprlib.repr(value)} for its {what}; it needs a whole number")
    if value >= least and value % step == 0:
        return
    kind = "an even number of at least" if step == 2 else "at least"
    raise ScheduleError(
        f"{name} got {_counted(value, what)}{given}; it needs {kind} {least}: {_nearest(value, least, step)}"
    )


def _counted(number: int, what: str) -> str:
    """``1 rank``, ``8 ranks``."""
    noun, *rest = what.split(" ", 1)
    one = {"ranks": "rank", "stages": "stage", "micro-batches": "micro-batch", "chunks": "chunk"}[noun]
    return " ".join([str(number), one if number == 1 else noun, *rest])


def _nearest(value: int, least: int, step: int) -> str:
    if value < least:
        return f"the nearest legal value is {least}"
    below, above = value - value % step, value - value % step + step
    return f"the nearest legal values are {below} and {above}"
