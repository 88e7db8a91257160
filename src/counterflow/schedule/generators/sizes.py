"""Which numbers of ranks and micro-batches a schedule exists for, and how its absence is told."""

from counterflow.errors import ScheduleError


def require_sizes(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    even: bool = False,
    microbatches_per_rank: int = 0,
) -> None:
    """Refuse illegal sizes in one sentence with the nearest legal values.

    ``even`` asks for even numbers of both; ``microbatches_per_rank`` for at least so many times R.

    Raises:
        ScheduleError: naming the schedule, what it got and what it needs.
    """
    step = 2 if even else 1
    _require(name, "ranks", num_ranks, least=step, step=step)
    least = max(microbatches_per_rank * num_ranks, step)
    _require(name, "micro-batches", num_microbatches, least, step, given=f" on {num_ranks} ranks")


def require_chunks(name: str, chunks: int) -> None:
    """Refuse fewer than one chunk on each rank.

    Raises:
        ScheduleError: naming the schedule and what it got.
    """
    _require(name, "chunks on each rank", chunks, least=1, step=1)


def require_rounds(name: str, num_ranks: int, num_microbatches: int) -> int:
    """The micro-batches of a round where rounds are equally long and, if there are several, of at least R.

    Raises:
        ScheduleError: fewer than one rank or micro-batch, or micro-batches that do not fill M // R rounds.
    """
    require_sizes(name, num_ranks, num_microbatches)
    rounds = max(1, num_microbatches // num_ranks)
    size, left_over = divmod(num_microbatches, rounds)
    if left_over:
        below, above = rounds * size, min(rounds * (size + 1), (rounds + 1) * num_ranks)
        raise ScheduleError(
            f"{name} got {num_microbatches} micro-batches on {num_ranks} ranks; it needs as many in each of its "
            f"{rounds} rounds of at least {num_ranks}: the nearest legal values are {below} and {above}"
        )
    return size


def _require(name: str, what: str, value: int, least: int, step: int, given: str = "") -> None:
    if value >= least and value % step == 0:
        return
    kind = "an even number of at least" if step == 2 else "at least"
    raise ScheduleError(f"{name} got {value} {what}{given}; it needs {kind} {least}: {_nearest(value, least, step)}")


def _nearest(value: int, least: int, step: int) -> str:
    if value < least:
        return f"the nearest legal value is {least}"
    below, above = value - value % step, value - value % step + step
    return f"the nearest legal values are {below} and {above}"
