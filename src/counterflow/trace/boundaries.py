"""How many bytes cross from a stage to the next, where the profiler recorded sizes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from counterflow.schedule import Kind
from counterflow.trace.messages import Message
from counterflow.trace.ranges import Ranges
from counterflow.trace.read import Trace

_SENDS = re.compile(r"PP:(\d{1,6})SEND_F\d{1,6}")


def boundary_bytes(
    traces: Sequence[Trace], said: Sequence[Sequence[Message]], read: Sequence[Ranges], num_stages: int
) -> tuple[float | None, ...]:
    """For each stage the median of what was sent on behind its forwards; empty where no size was recorded.

    ``said`` and ``read`` are the messages and the ranges of each trace. None stands for a stage whose forwards all ran
    inside pairs, or sent nothing.
    """
    sent = defaultdict[int, list[int]](list)
    for trace, some, ranges in zip(traces, said, read, strict=True):
        posts = [one for one in some if one.on_host and one.size_bytes is not None and one.name in ("send", "isend")]
        for stage, size in _sent_behind(trace, ranges, posts):
            if size:
                sent[stage].append(size)
    if not sent:
        return ()
    return *(float(median(sent[stage])) if sent[stage] else None for stage in range(num_stages - 1)), 0.0


def _sent_behind(trace: Trace, ranges: Ranges, posts: list[Message]) -> Iterator[tuple[int, int]]:
    """For each forward that is no part of a pair its stage, and the bytes that were posted until the next action."""
    starts = [one.start_ns for one in posts]

    def posted(begin: int, end: int) -> int:
        return sum(one.size_bytes or 0 for one in posts[bisect_left(starts, begin - 1) : bisect_left(starts, end - 1)])

    named = [
        (int(found[1]), start, end)
        for start, end, name, _, on_gpu, *_ in trace.annotations.tuples()
        if not on_gpu and (found := _SENDS.fullmatch(trace.names[name]))
    ]
    if named:
        yield from ((stage, posted(start, end)) for stage, start, end in named)
        return
    for one, following in pairwise(ranges.ran):
        if one.action.kind is Kind.F:
            yield one.action.stage, posted(one.opened_ns, following.opened_ns)
