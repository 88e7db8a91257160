"""The sums of gradients over twins in a rank's trace: the executor opens a range for each stretch of work on one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from counterflow.timeline import TWINS, TWINS_OF, Span
from counterflow.trace.read import Trace, launch_of

_TWINS_OF = re.compile(TWINS_OF.format("([0-9]{1,6})"))


class Stretch(NamedTuple):
    """Work on the sum of a stage: when its range opened on the CPU, and from when to when the work ran."""

    stage: int
    opened_ns: int
    start_ns: int
    end_ns: int


def stretches(trace: Trace) -> list[Stretch]:
    """All of them in time; of a trace with GPU work those that launched some, each with the span of that.

    Ranges in which other ranks went on are none: the executor closes them before it waits.
    """
    stages = {
        name: int(told[1])
        for name in np.unique(trace.annotations.name).tolist()
        if (told := _TWINS_OF.fullmatch(trace.names[name]))
    }
    own = trace.annotations.rows((trace.annotations.on_gpu == 0) & np.isin(trace.annotations.name, list(stages)))
    ranges = zip(own.name.tolist(), own.start_ns.tolist(), own.end_ns.tolist(), strict=True)
    if not len(trace.work):
        return [Stretch(stages[name], start, start, end) for name, start, end in ranges]
    launch = launch_of(trace.work, trace.launches)
    known = np.flatnonzero(launch >= 0)
    launched = trace.launches.start_ns[launch[known]]
    order = np.argsort(launched, kind="stable")
    launched, work = launched[order], trace.work.rows(known[order])
    found = []
    for name, start, end in ranges:
        here = slice(*np.searchsorted(launched, (start, end)).tolist())
        if here.start < here.stop:
            extent = int(work.start_ns[here].min()), int(work.end_ns[here].max())
            found.append(Stretch(stages[name], start, *extent))
    return found


def sums_after(
    found: Iterable[Stretch], opened_ns: int, later_ns: Sequence[int], rank: int, offset_ns: int
) -> Iterator[Span]:
    """The sums that end the step whose last action opened then, on a clock that is so much behind.

    ``later_ns`` are the times when actions opened; the next one begins another step.

    Example:
        >>> two = [Stretch(3, 20, 21, 24), Stretch(3, 30, 30, 36), Stretch(3, 70, 70, 76)]
        >>> [one] = sums_after(two, 10, [0, 10, 50], rank=1, offset_ns=0)
        >>> one.name, one.start_ns, one.end_ns
        ('twins of stage 3', 21, 36)
    """
    until = min((opened for opened in later_ns if opened > opened_ns), default=None)
    here = [one for one in found if one.opened_ns > opened_ns and (until is None or one.opened_ns < until)]
    for stage in sorted({one.stage for one in here}):
        own = [one for one in here if one.stage == stage]
        start, end = min(one.start_ns for one in own), max(one.end_ns for one in own)
        yield Span(rank, TWINS_OF.format(stage), start - offset_ns, end - offset_ns, TWINS)
