"""Generators: small pure functions of (ranks, micro-batches), one file for each family."""

from collections.abc import Callable

from counterflow.errors import ScheduleError
from counterflow.schedule.generators.dualpipe import dualpipe, dualpipev
from counterflow.schedule.generators.gpipe import gpipe
from counterflow.schedule.generators.one_f_one_b import one_f_one_b
from counterflow.schedule.generators.zero_bubble import zb1p
from counterflow.schedule.schedule import Schedule

GENERATORS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def generate(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule called ``name``, as the command line calls it.

    Raises:
        ScheduleError: an unknown name, or sizes that the schedule does not exist for.

    Example:
        >>> from counterflow.schedule import generate
        >>> generate("1f1b", 4, 8).num_stages
        4
    """
    try:
        generator = GENERATORS[name]
    except KeyError:
        known = ", ".join(GENERATORS)
        raise ScheduleError(f"{name!r} is no schedule; the known ones are {known}") from None
    return generator(num_ranks, num_microbatches)


__all__ = ["GENERATORS", "dualpipe", "dualpipev", "generate", "gpipe", "one_f_one_b", "zb1p"]
