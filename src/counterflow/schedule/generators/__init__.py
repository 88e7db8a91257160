"""Generators: small pure functions of (ranks, micro-batches), one file for each family."""

from collections.abc import Callable
from functools import partial

from counterflow.errors import ScheduleError
from counterflow.schedule.generators.dualpipe import dualpipe, dualpipev
from counterflow.schedule.generators.gpipe import gpipe
from counterflow.schedule.generators.interleaved import interleaved_1f1b
from counterflow.schedule.generators.one_f_one_b import one_f_one_b
from counterflow.schedule.generators.v_shape import v_half, v_min, zbv
from counterflow.schedule.generators.zero_bubble import zb1p, zb2p
from counterflow.schedule.schedule import Schedule

GENERATORS: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved-1f1b": interleaved_1f1b,
    "interleaved-1f1b-overlap": partial(interleaved_1f1b, overlap=True),
    "zb1p": zb1p,
    "zb2p": zb2p,
    "zbv": zbv,
    "v-half": v_half,
    "v-min": v_min,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
"""Each takes ranks and micro-batches; the interleaved ones also ``chunks``."""

_FOLDED = ("interleaved-1f1b", "interleaved-1f1b-overlap", "zbv", "v-half", "v-min", "dualpipev")
STAGES_PER_RANK = {name: 2 if name in _FOLDED else 1 for name in GENERATORS}
"""Stages for each rank, S / R, where ``chunks`` is not given. DualPipe's ranks hold two, of which each has a twin."""


def generate(name: str, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule called ``name``, as the command line calls it; ``chunks`` is for the interleaved ones alone.

    Raises:
        ScheduleError: an unknown name, or sizes that the schedule does not exist for.

    Example:
        >>> from counterflow.schedule import generate
        >>> generate("1f1b", 4, 8).num_stages, generate("interleaved-1f1b", 4, 8, chunks=3).num_stages
        (4, 12)
    """
    try:
        generator = GENERATORS[name]
    except KeyError:
        known = ", ".join(GENERATORS)
        raise ScheduleError(f"{name!r} is no schedule; the known ones are {known}") from None
    if chunks is None:
        return generator(num_ranks, num_microbatches)
    if not name.startswith("interleaved"):
        raise ScheduleError(
            f"{name} got {chunks} chunks on each rank; only interleaved-1f1b and interleaved-1f1b-overlap let "
            "you choose: leave chunks out"
        )
    return generator(num_ranks, num_microbatches, chunks=chunks)


__all__ = [
    "GENERATORS",
    "STAGES_PER_RANK",
    "dualpipe",
    "dualpipev",
    "generate",
    "gpipe",
    "interleaved_1f1b",
    "one_f_one_b",
    "v_half",
    "v_min",
    "zb1p",
    "zb2p",
    "zbv",
]
