"""Programs of two ranks, and whether `check` says that they run where one NCCL communicator queues all messages."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, count, islice

from counterflow import Schedule
from counterflow.errors import ScheduleError
from counterflow.schedule import GENERATORS, Transfers, check_transfers, lower
from counterflow.schedule.transfers import Program
from schedule.mutants import in_one_order, mutant, plain, schedules_of

PATIENCE_S = 6.0
NUM_MUTANTS = 8


@dataclass(frozen=True)
class Posting:
    """``runs`` is the verdict."""

    schedule: Schedule
    programs: tuple[Program, ...]
    runs: bool


def _judged(schedule: Schedule, programs: tuple[Program, ...]) -> Posting | None:
    """None where what they send does not fit together, so that nobody knows what would come of it."""
    try:
        check_transfers(Transfers(schedule, programs), channels="nccl")
    except ScheduleError as error:
        return Posting(schedule, programs, runs=False) if str(error).startswith("deadlock") else None
    return Posting(schedule, programs, runs=True)


def _of_generators() -> Iterator[tuple[str, Posting | None]]:
    for name in GENERATORS:
        schedule = [s for _, s in schedules_of(name) if s.num_ranks == 2][-1]
        for way, programs in (("lowered", lower(schedule).programs), ("in one order", in_one_order(schedule))):
            yield f"{name}, {way}", _judged(schedule, programs)
        yield f"{name}, forward only", _judged(schedule.forward_only(), lower(schedule.forward_only()).programs)
        yield f"{name}, plain", _judged(schedule, plain(schedule))


def _mutants(runs: bool) -> Iterator[tuple[str, Posting | None]]:
    for seed in count():
        changed = mutant(seed)
        if changed.programs is not None and len(changed.programs) == 2 and changed.schedule.num_ranks == 2:
            found = _judged(changed.schedule, changed.programs)
            if found is not None and found.runs == runs:
                yield f"mutant {seed}", found


@cache
def postings() -> dict[str, Posting]:
    """By name."""
    named = chain(_of_generators(), *(islice(_mutants(runs), NUM_MUTANTS) for runs in (True, False)))
    return {name: found for name, found in named if found is not None}
