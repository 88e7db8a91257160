"""Actions in a trace: the ranges that a pipeline's runtime named, and when the work launched inside them ran.

counterflow's executor names every action as its schedule does (``3F12``). The runtime of torch.distributed.pipelining
puts ``PP:`` before the same text, and names sends, receives and the rest likewise; its GPipe says ``Forward 3`` and
``Backward 3``; its 1F1B names nothing, nor does Megatron.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from counterflow.errors import ScheduleError, TraceError
from counterflow.schedule import Action, Kind
from counterflow.trace.columns import COMPUTE_SPAN, Ints
from counterflow.trace.messages import Message, between_ranks
from counterflow.trace.read import Trace, launch_of
from counterflow.trace.rules import COMMUNICATION, Rules

EXECUTOR, TIMELINE, TORCH, TORCH_GPIPE = (
    "counterflow's executor",
    "a timeline of counterflow",
    "torch's pipeline runtime",
    "torch's GPipe",
)
"""Who named the ranges."""

_TORCH = "PP:"
_GPIPE = re.compile(r"(Forward|Backward) (\d{1,6})")


class Ran(NamedTuple):
    """An action with its time; ``device`` is the rank in a timeline of all ranks, else -1.

    ``opened_ns`` is when its range opened on the CPU.
    """

    action: Action
    start_ns: int
    end_ns: int
    opened_ns: int
    device: int = -1

    @property
    def text(self) -> str:
        """The action as it is written."""
        return str(self.action)


@dataclass(frozen=True)
class Ranges:
    """The actions of one trace in time, and who named them."""

    named_by: str
    ran: tuple[Ran, ...]
    on_gpu: bool


def ranges(trace: Trace, said: list[Message], place: int, rules: Rules) -> Ranges | None:
    """The actions that the trace names, or None; ``place`` is the rank's place in its pipeline, for GPipe tells none.

    Where the trace has GPU work an action lasts from the start of the first to the end of the last piece that was
    launched inside its range, found by correlation; messages between two ranks are none of it, and communication (as
    the ``rules`` tell it) at its ends only while no other action computes. Else it lasts as long as the range, without
    the wait for a receive that torch's ranges begin with.

    Raises:
        TraceError: there is GPU work and nothing that tells what launched it.
    """
    own = _own_timeline(trace)
    if own:
        return Ranges(TIMELINE, tuple(own), on_gpu=False)
    named = _named(trace, place)
    if named is None:
        return None
    by, found = named
    if len(trace.work):
        return Ranges(by, tuple(_on_gpu(trace, found, said, rules)), on_gpu=True)
    if by != EXECUTOR:
        found = list(_after_receives(found, said))
    return Ranges(by, tuple(found), on_gpu=False)


def _own_timeline(trace: Trace) -> list[Ran]:
    rows = trace.work.rows(np.flatnonzero(trace.work.kind == COMPUTE_SPAN))
    actions = {name: _action(trace.names[name]) for name in np.unique(rows.name).tolist()}
    return [
        Ran(action, row[0], row[1], row[0], device)
        for row, name, device in zip(rows.tuples(), rows.name.tolist(), rows.device.tolist(), strict=True)
        if (action := actions[name]) is not None
    ]


def _named(trace: Trace, place: int) -> tuple[str, list[Ran]] | None:
    """Who named ranges, and these ranges in time."""
    own = trace.annotations.rows(np.flatnonzero(trace.annotations.on_gpu == 0))
    used = {name: trace.names[name] for name in np.unique(own.name).tolist()}
    readings = (
        (EXECUTOR, {name: _action(text) for name, text in used.items()}),
        (TORCH, {name: _action(text[len(_TORCH) :]) for name, text in used.items() if text.startswith(_TORCH)}),
        (TORCH_GPIPE, {name: _gpipe_action(text, place) for name, text in used.items()}),
    )
    for by, actions in readings:
        times = zip(own.start_ns.tolist(), own.end_ns.tolist(), own.name.tolist(), strict=True)
        found = [Ran(action, start, end, start) for start, end, name in times if (action := actions.get(name))]
        if found:
            return by, found
    return None


def _action(text: str) -> Action | None:
    try:
        return Action.parse(text)
    except ScheduleError:
        return None


def _gpipe_action(text: str, stage: int) -> Action | None:
    found = _GPIPE.fullmatch(text)
    return Action(Kind.F if found[1] == "Forward" else Kind.B, stage, int(found[2])) if found else None


def _after_receives(found: list[Ran], said: list[Message]) -> Iterator[Ran]:
    """torch waits for what an action needs inside its range; gloo's receives end when the wait for them does."""
    ends = np.array(sorted(one.end_ns for one in said if one.on_host and one.name == "recv"), dtype=np.int64)
    for one in found:
        last = int(np.searchsorted(ends, one.end_ns, side="right")) - 1
        yield one if last < 0 else one._replace(start_ns=max(one.start_ns, int(ends[last])))


def _on_gpu(trace: Trace, found: list[Ran], said: list[Message], rules: Rules) -> Iterator[Ran]:
    """The window of what each range launched, in the order of the ranges; without any, a moment."""
    launch = launch_of(trace.work, trace.launches)
    if not (launch >= 0).any():
        raise TraceError(
            f"{trace.file}: ranges name actions, and no launch record tells which GPU work is theirs; "
            "profile with ProfilerActivity.CPU and CUDA"
        )
    kinds = rules.classify(trace.work, trace.names, trace.sms)
    talks = np.isin(kinds, COMMUNICATION)
    own = (launch >= 0) & ~between_ranks(trace.work, said)
    opened = np.array([one.start_ns for one in found], dtype=np.int64)
    closed = np.array([one.end_ns for one in found], dtype=np.int64)
    at = trace.launches.start_ns[launch]
    inside = np.searchsorted(opened, at, side="right") - 1
    own &= (inside >= 0) & (at < closed[np.maximum(inside, 0)])
    every = _extent(trace, inside, own, len(found))
    compute = _extent(trace, inside, own & ~talks, len(found))
    # Where an action computes nothing, what it said is all there is of it.
    core = np.where((compute[0] <= compute[1])[None], compute, every)
    there = core[0] <= core[1]
    until, first = 0, np.append(np.minimum.accumulate(np.where(there, core[0], 2**62)[::-1])[::-1][1:], 2**62)
    for index, one in enumerate(found):
        if not there[index]:
            start = end = max(until, one.start_ns)
        else:
            start = min(max(int(every[0, index]), until), int(core[0, index]))
            end = max(min(int(every[1, index]), int(first[index])), int(core[1, index]))
        until = max(until, end)
        yield one._replace(start_ns=start, end_ns=end)


def _extent(trace: Trace, inside: Ints, which: npt.NDArray[np.bool_], count: int) -> Ints:
    """For each range the first start and last end of this work, shape [2, ranges]; backwards where there is none."""
    extent = np.array([[2**62], [-(2**62)]]).repeat(count, axis=1)
    np.minimum.at(extent[0], inside[which], trace.work.start_ns[which])
    np.maximum.at(extent[1], inside[which], trace.work.end_ns[which])
    return extent
