"""A wire for one GPU: rows leave it for pinned host memory and come back, as many bytes as a deployment would send.

This is the stand-in for a network where there is but one GPU. Real bytes cross PCIe both ways at once, on copy engines
or by kernels that take multiprocessors away from compute, and contend for memory with whatever runs beside them. What
it cannot show: barriers, stragglers, several senders to one receiver, what passes within a node, and the cost of
preparing a transfer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from counterflow.errors import PipelineError
from counterflow.runtime.exchange import Arrival, Here, Ready, Rows

NOT_SHOWN = (
    "rows of one GPU go to host memory and back: no barriers, no stragglers, no several senders to one receiver, "
    "nothing of what passes within a node"
)
"""To be said beside every figure."""


class LoopbackExchange:
    """The last of ``num_ranks`` ranks, alone: what it sends comes back, as if the others had sent the like.

    Its rows take a way of ``dispatch_bytes`` or, with results, ``combine_bytes`` in each direction, some of them again
    if that is more than they have. They come back to where they were, for they have not changed: what is not on the
    wire does not move, and ``target`` becomes the memory of ``source``. Only where more rows come than go are they
    copied, the first ones twice.

    With ``ctas`` that many thread blocks of one kernel do the carrying; with 0 the copy engines do. These take pieces
    of ``piece_bytes``, ``num_pieces`` of which have room in host memory, so that both directions are busy at once.

    Raises:
        PipelineError: a number of bytes or of thread blocks is negative.
    """

    def __init__(
        self,
        dispatch_bytes: int,
        combine_bytes: int,
        *,
        num_ranks: int = 1,
        ctas: int = 0,
        piece_bytes: int = 16 << 20,
        num_pieces: int = 8,
    ) -> None:
        if dispatch_bytes < 0 or combine_bytes < 0:
            raise PipelineError(
                f"a loopback got {dispatch_bytes} and {combine_bytes} bytes for dispatch and combine; give none below 0"
            )
        if ctas < 0:
            raise PipelineError(f"a loopback got {ctas} CTAs; give 0 for copy engines, or how many")
        self.num_ranks, self.rank = num_ranks, num_ranks - 1
        self._bytes = {False: dispatch_bytes, True: combine_bytes}
        self.ctas, self._piece_bytes, self._num_pieces = ctas, piece_bytes, num_pieces
        self._wire: _HostWire | _EngineWire | _KernelWire | None = None

    def counts(self, rows: Tensor) -> Tensor:
        """What it sends to itself, from everyone."""
        return rows[-1:].expand_as(rows).contiguous()

    def start(self, source: Tensor, target: Tensor, rows: Rows, ready: Ready) -> Arrival:
        """Out and back, behind ``ready``."""
        if len(target) <= len(source):
            target.set_(source[: len(target)])  # type: ignore[call-overload]
        out, into = source.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        bytes_ = self._bytes[rows.returning] // _ALIGNED * _ALIGNED
        if self._wire is None:
            if not source.is_cuda:
                self._wire = _HostWire(self._piece_bytes, self._num_pieces)
            elif self.ctas:
                self._wire = _KernelWire(source.device, self.ctas)
            else:
                self._wire = _EngineWire(source.device, self._piece_bytes, self._num_pieces)
        return self._wire.carry(out, into, bytes_, ready)


_ALIGNED = 4096


def _pieces(common: int, bytes_: int, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what travels next, until ``bytes_`` have: over the ``common`` bytes, and again if need be."""
    while bytes_ > 0 < common:
        trip = min(bytes_, common)
        for begin in range(0, trip, size):
            yield begin, min(trip, begin + size)
        bytes_ -= trip


def _stay(out: Tensor, into: Tensor, abroad: int) -> None:
    """Copy the bytes behind ``abroad``, and from the beginning again, where more come than go; else they are there."""
    if len(into) <= len(out):
        return
    into[abroad : len(out)].copy_(out[abroad:], non_blocking=True)
    for begin in range(len(out), len(into), max(len(out), 1)):
        part = into[begin : begin + len(out)]
        part.copy_(out[: len(part)], non_blocking=True)


class _HostWire:
    """The same pieces through the same buffers, on a CPU and one after the other."""

    def __init__(self, piece_bytes: int, num_pieces: int) -> None:
        self._rooms = torch.empty(num_pieces, piece_bytes, dtype=torch.uint8)

    def carry(self, out: Tensor, into: Tensor, bytes_: int, ready: Ready) -> Arrival:
        common = min(len(out), len(into))
        _stay(out, into, min(bytes_, common))
        for number, (begin, end) in enumerate(_pieces(common, bytes_, self._rooms.shape[1])):
            room = self._rooms[number % len(self._rooms), : end - begin]
            room.copy_(out[begin:end])
            into[begin:end].copy_(room)
        return Here()


class _EngineWire:
    """Three streams: out, in, and for what stays within the GPU."""

    def __init__(self, device: torch.device, piece_bytes: int, num_pieces: int) -> None:
        self._out, self._in, self._within = (_stream(device) for _ in range(3))
        self._rooms = torch.empty(num_pieces, piece_bytes, dtype=torch.uint8, pin_memory=True)
        self._empty: list[torch.cuda.Event | None] = [None] * num_pieces
        self._next, self._captured = 0, False

    def carry(self, out: Tensor, into: Tensor, bytes_: int, ready: Ready) -> Arrival:
        assert ready is not None, "on a GPU rows are ready by an event"
        captured = torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(self._out):
            goes_on = captured == torch.cuda.is_current_stream_capturing() == self._captured
        if not goes_on:  # events do not reach into a graph that is being captured, nor out of it
            self._empty, self._captured = [None] * len(self._empty), captured
        for stream in (self._out, self._in, self._within):
            stream.wait_event(ready)
        common = min(len(out), len(into))
        with torch.cuda.stream(self._within):
            _stay(out, into, min(bytes_, common))
        for begin, end in _pieces(common, bytes_, self._rooms.shape[1]):
            self._piece(into[begin:end], out[begin:end])
        for stream in (self._out, self._within):
            self._in.wait_event(_behind(stream))
        return _Arrived(_behind(self._in))

    def _piece(self, into: Tensor, out: Tensor) -> None:
        number = self._next % len(self._empty)
        self._next += 1
        room, empty = self._rooms[number, : len(out)], self._empty[number]
        if empty is not None:
            self._out.wait_event(empty)
        with torch.cuda.stream(self._out):
            room.copy_(out, non_blocking=True)
        self._in.wait_event(_behind(self._out))
        with torch.cuda.stream(self._in):
            into.copy_(room, non_blocking=True)
        self._empty[number] = _behind(self._in)


class _KernelWire:
    """One stream, on which one kernel for each transfer sends and receives."""

    def __init__(self, device: torch.device, ctas: int) -> None:
        from counterflow.runtime.copy_kernel import host_bytes

        self._stream, self._ctas = _stream(device), ctas
        self._host = torch.empty(host_bytes(ctas), dtype=torch.uint8, pin_memory=True)

    def carry(self, out: Tensor, into: Tensor, bytes_: int, ready: Ready) -> Arrival:
        from counterflow.runtime.copy_kernel import carry

        assert ready is not None, "on a GPU rows are ready by an event"
        self._stream.wait_event(ready)
        common = min(len(out), len(into))
        with torch.cuda.stream(self._stream):
            _stay(out, into, min(bytes_, common))
            for begin, end in _pieces(common, bytes_, common):
                carry(into[begin:end], out[begin:end], self._host, self._ctas)
        return _Arrived(_behind(self._stream))


class _Arrived:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def _stream(device: torch.device) -> torch.cuda.Stream:
    # A transfer that is ready should not have to wait for a large kernel to end.
    made: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    assert isinstance(made, torch.cuda.Stream)
    return made


def _behind(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
