"""Time, injected: the wall's for real steps, a virtual one to hold the executor against the simulator."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Protocol

import torch

from counterflow.schedule import Action, Transfer


class Clock(Protocol):
    """What the executor tells a clock, and asks of it."""

    def begin(self) -> None:
        """A step begins, on all ranks of this process at once."""

    def mark(self, rank: int) -> Mark:
        """The present moment of ``rank``."""

    def posted(self, rank: int, transfer: Transfer) -> None:
        """``rank`` has posted its side of ``transfer``."""

    def waited(self, rank: int, transfer: Transfer) -> None:
        """``rank`` has waited for ``transfer``, which both sides have posted."""

    def ran(self, rank: int, action: Action) -> None:
        """``rank`` has computed ``action``."""

    def comes_to_sum(self, rank: int, stage: int) -> None:
        """``rank`` is ready to sum the gradients of ``stage`` with its twins."""

    def summed(self, rank: int, stage: int) -> tuple[Mark, Mark]:
        """``rank`` has that sum: from when to when it was made."""

    def read_ns(self, marks: list[Mark]) -> list[int]:
        """The marks as nanoseconds since an origin that all ranks of this machine share."""


Mark = int | torch.cuda.Event


class WallClock:
    """Real time: the host's monotonic clock, which all processes of a machine share."""

    def __init__(self) -> None:
        self._came_to_sum: dict[tuple[int, int], Mark] = {}

    def begin(self) -> None:
        """Real time has begun already."""

    def mark(self, rank: int) -> Mark:
        """Now."""
        return time.perf_counter_ns()

    def posted(self, rank: int, transfer: Transfer) -> None:
        """Real transfers take their own time."""

    def waited(self, rank: int, transfer: Transfer) -> None:
        """Real waits take their own time."""

    def ran(self, rank: int, action: Action) -> None:
        """Real actions take their own time."""

    def comes_to_sum(self, rank: int, stage: int) -> None:
        """Noted, for nobody tells when the last twin has come."""
        self._came_to_sum[rank, stage] = self.mark(rank)

    def summed(self, rank: int, stage: int) -> tuple[Mark, Mark]:
        """From when this rank came, so that waiting for a twin is in it, until now."""
        return self._came_to_sum.pop((rank, stage)), self.mark(rank)

    def read_ns(self, marks: list[Mark]) -> list[int]:
        """The marks are nanoseconds already."""
        return [mark for mark in marks if isinstance(mark, int)]


class CudaClock(WallClock):
    """The GPU's time: events on the current stream, for launches return long before the work is done."""

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Times count from an event of this step: between two events far apart a float of milliseconds is coarse."""
        self._origin = self.mark(0)
        self._origin_ns: int | None = None

    def mark(self, rank: int) -> torch.cuda.Event:
        """An event behind all that was launched so far."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read_ns(self, marks: list[Mark]) -> list[int]:
        """Waits for the GPU, then reads its events."""
        torch.cuda.synchronize()
        if self._origin_ns is None:
            now = self.mark(0)
            now.synchronize()
            self._origin_ns = time.perf_counter_ns() - round(self._origin.elapsed_time(now) * 1e6)
        return [
            self._origin_ns + round(self._origin.elapsed_time(mark) * 1e6)
            for mark in marks
            if isinstance(mark, torch.cuda.Event)
        ]


class Prices(Protocol):
    """What a virtual clock needs to know; ``counterflow.Costs`` is one."""

    latency_ns: int

    def duration_ns(self, action: Action) -> int:
        """How long ``action`` computes."""

    def wire_ns(self, transfer: Transfer) -> int:
        """How long ``transfer`` occupies its channel."""

    def twins_ns(self, stage: int) -> int:
        """How long the sum of the gradients of ``stage`` over its twins takes."""


class VirtualClock:
    """Every rank has a time of its own, moved on by its actions and by what it waits for.

    The work is done for real, only its duration is made up. A transfer leaves when both sides have posted it
    and its channel is free. Every step begins at 0, with nothing under way.
    """

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self.begin()

    def begin(self) -> None:
        """Back to 0."""
        self._now = defaultdict[int, int](int)
        self._channels = defaultdict[tuple[int, int], _VirtualChannel](_VirtualChannel)
        self._sums_start = defaultdict[int, int](int)

    def mark(self, rank: int) -> Mark:
        """The rank's own time."""
        return self._now[rank]

    def posted(self, rank: int, transfer: Transfer) -> None:
        """Notes when; a receive and a send that stand at the same place in their channel belong together."""
        channel = self._channels[transfer.source, transfer.target]
        side = channel.sends if rank == transfer.source else channel.receives
        side.append((transfer, self._now[rank]))
        while channel.sends and channel.receives:
            (sent, sent_ns), (received, received_ns) = channel.sends.popleft(), channel.receives.popleft()
            assert sent == received, f"{sent} was received as {received}"
            left_ns = max(sent_ns, received_ns, channel.free_ns)
            channel.free_ns = left_ns + self._prices.wire_ns(sent)
            channel.arrivals_ns[sent] = channel.free_ns + self._prices.latency_ns

    def waited(self, rank: int, transfer: Transfer) -> None:
        """The rank goes on when the transfer has arrived."""
        arrival_ns = self._channels[transfer.source, transfer.target].arrivals_ns[transfer]
        self._now[rank] = max(self._now[rank], arrival_ns)

    def ran(self, rank: int, action: Action) -> None:
        """The action took what it costs."""
        self._now[rank] += self._prices.duration_ns(action)

    def comes_to_sum(self, rank: int, stage: int) -> None:
        """The sum starts when the last twin has come."""
        self._sums_start[stage] = max(self._sums_start[stage], self._now[rank])

    def summed(self, rank: int, stage: int) -> tuple[Mark, Mark]:
        """The sum took what it costs."""
        start_ns = self._sums_start[stage]
        self._now[rank] = start_ns + self._prices.twins_ns(stage)
        return start_ns, self._now[rank]

    def read_ns(self, marks: list[Mark]) -> list[int]:
        """The marks are nanoseconds already."""
        return [mark for mark in marks if isinstance(mark, int)]


class _VirtualChannel:
    def __init__(self) -> None:
        self.sends = deque[tuple[Transfer, int]]()
        self.receives = deque[tuple[Transfer, int]]()
        self.free_ns = 0
        self.arrivals_ns: dict[Transfer, int] = {}
