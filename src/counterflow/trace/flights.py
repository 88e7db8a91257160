"""Low-latency transfers in flight: sent by one kernel, received by another, and no kernel in between.

Such a transfer takes the GPU only while it is sent and while what came is put in place; in between the network moves
the data, and the stream computes. The kernel that sends and the one that receives have the same name (DeepEP launches
one function twice), so they are told by their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from counterflow.trace.columns import GpuWork, Ints
from counterflow.trace.cover import Cover
from counterflow.trace.figures import Flight
from counterflow.trace.read import graph_of
from counterflow.trace.rules import function_of
from counterflow.trace.window import Window, us

_LOW_LATENCY = re.compile(
    r"(?:.*(?:internode_ll|low_?latency)\w*::|(?:\w+::)*(?:a2a_|ep_?)?)"
    r"(?P<kind>dispatch|combine)_?(?P<role>send|recv|receive)?\w*",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class Flights:
    """From the end of each send kernel to the start of its receive kernel.

    ``send`` and ``receive`` are rows of the work; ``start_ns`` and ``end_ns`` are when nothing of either runs; each
    [flights].
    """

    send: Ints
    receive: Ints
    start_ns: Ints
    end_ns: Ints

    def inside(self, window: Window) -> Flights:
        """Those of the window's GPU, as far as they reach into it."""
        start, end = self.start_ns.clip(window.start, window.end), self.end_ns.clip(window.start, window.end)
        here = (window.trace.work.device[self.send] == window.device) & (end > start)
        return Flights(self.send[here], self.receive[here], start[here], end[here])

    @property
    def cover(self) -> Cover:
        """When any of them flies."""
        return Cover.of(self.start_ns, self.end_ns)


def flights(work: GpuWork, names: Sequence[str], launch: Ints) -> Flights:
    """Join the send and receive kernels of low-latency transfers, on each stream in order of time.

    A kernel named as sending goes with the next one named as receiving the same. Of kernels that tell no more than
    dispatch or combine, two that follow each other are a send and its receive; one alone did both, and flies not.
    Kernels inside a graph only go with others of the same launch.

    Args:
        work: the GPU work, in order of time.
        names: the trace's names.
        launch: the row of each piece's launch record, -1 where not told [work].
    """
    roles = {name: role for name in np.unique(work.name).tolist() if (role := role_of(names[name]))}
    rows = np.flatnonzero(np.isin(work.name, list(roles)))
    graph = graph_of(launch)
    pairs = []
    for key in np.unique(np.stack([work.device[rows], work.stream[rows]]), axis=1).T.tolist():
        here = rows[(work.device[rows] == key[0]) & (work.stream[rows] == key[1])].tolist()
        pairs += list(_pairs(here, [roles[name] for name in work.name[here].tolist()], graph))
    send, receive = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
    apart = work.start_ns[receive] > work.end_ns[send]
    send, receive = send[apart], receive[apart]
    return Flights(send, receive, work.end_ns[send], work.start_ns[receive])


def role_of(name: str) -> tuple[str, str] | None:
    """What a low-latency kernel moves, and whether it is told as "send" or "receive", "" if not; None for any other.

    Example:
        >>> role_of("void deep_ep::internode_ll::dispatch<true, 3, 10, 7168>(void*)")
        ('dispatch', '')
        >>> role_of("a2a_combine_recv_kernel<16, 8>(unsigned long)"), role_of("deep_ep::internode::dispatch<8>()")
        (('combine', 'receive'), None)
    """
    function = function_of(name)
    found = _LOW_LATENCY.fullmatch(function)
    if found is None:
        return None
    role = (found["role"] or "").lower()
    if not role and not re.search(r"internode_ll|low_?latency", function, re.IGNORECASE):
        return None
    return found["kind"].lower(), {"recv": "receive"}.get(role, role)


def _pairs(rows: list[int], roles: list[tuple[str, str]], graph: Ints) -> Iterator[tuple[int, int]]:
    sent: dict[tuple[str, bool], int] = {}
    previous: tuple[str, str] | None = None
    for row, (kind, role) in zip(rows, roles, strict=True):
        key = (kind, bool(role))
        follows = role == "receive" or (not role and previous == (kind, role))
        send = sent.pop(key, None)
        previous = (kind, role)
        if send is not None and follows and graph[send] == graph[row]:
            yield send, row
            previous = None
        elif role != "receive":
            sent[key] = row


def flight_figures(window: Window, flown: Flights) -> Iterator[Flight]:
    """The flights of each kind, dispatch and combine, as they first appear; each counts for itself."""
    names = window.trace.work.name[flown.send].tolist()
    kinds = [role[0] for name in names if (role := role_of(window.trace.names[name]))]
    hidden = window.compute.within_ns(flown.start_ns, flown.end_ns)
    for kind in dict.fromkeys(kinds):
        here = np.array([one == kind for one in kinds], dtype=np.bool_)
        total, under = int((flown.end_ns - flown.start_ns)[here].sum()), int(hidden[here].sum())
        yield Flight(kind, int(here.sum()), us(total), us(under), us(total - under))
