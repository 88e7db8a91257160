"""Where messages go: to another process over torch.distributed, or to another rank in this one.

Posting never blocks and returns a Handle; whoever needs the message waits for it. Messages of one lane match
first-in first-out for each ordered pair of ranks, on every transport.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.errors import PeerError, PipelineError
from counterflow.runtime.wire import Leaf
from counterflow.schedule import Transfer

_CPU = torch.device("cpu")


class Lane(IntEnum):
    """Messages of different lanes never match; the values serve as tags."""

    PIPELINE = 0
    HEADER = 1
    TWINS = 2
    EXPERTS = 3


Channel = tuple[Lane, int, int]
"""A lane from one rank to another."""


@dataclass(frozen=True)
class Message:
    """From whom to whom, on which lane, and what it is, for the error that may name it."""

    lane: Lane
    source: int
    target: int
    what: str

    @classmethod
    def of(cls, transfer: Transfer, lane: Lane = Lane.PIPELINE) -> Message:
        """The message that carries ``transfer``, or its header."""
        return cls(lane, transfer.source, transfer.target, str(transfer))


class Handle(Protocol):
    """A message under way, seen from one side."""

    message: Message

    def ready(self) -> bool:
        """Whether ``wait`` would return at once."""

    def wait(self) -> None:
        """Block until the tensors are there, or may be reused.

        Raises:
            PeerError: the peer died, or did not take its side within the timeout.
        """


class Transport(Protocol):
    """Posts messages of tensors; a receive fills tensors of the shapes that were sent."""

    def send(self, message: Message, tensors: list[Tensor]) -> Handle:
        """Start sending; the tensors stay untouched until the handle has been waited for."""

    def receive(self, message: Message, tensors: list[Tensor]) -> Handle:
        """Start receiving into ``tensors``."""


class InProcessTransport:
    """All ranks in one process, on any device: a message is a copy, made when both sides have posted it."""

    def __init__(self) -> None:
        self._sends: dict[Channel, deque[_Copy]] = {}
        self._receives: dict[Channel, deque[_Copy]] = {}

    def send(self, message: Message, tensors: list[Tensor]) -> Handle:
        """Start sending."""
        return self._post(message, tensors, self._sends, self._receives)

    def receive(self, message: Message, tensors: list[Tensor]) -> Handle:
        """Start receiving."""
        return self._post(message, tensors, self._receives, self._sends)

    def forget(self) -> None:
        """Drop what is under way: of a message that only one side has posted the other half never comes."""
        self._sends.clear()
        self._receives.clear()

    def _post(
        self,
        message: Message,
        tensors: list[Tensor],
        ours: dict[Channel, deque[_Copy]],
        theirs: dict[Channel, deque[_Copy]],
    ) -> _Copy:
        key = message.lane, message.source, message.target
        mine = _Copy(message, tensors)
        if waiting := theirs.get(key):
            other = waiting.popleft()
            sent, received = (mine, other) if ours is self._sends else (other, mine)
            for source, target in zip(sent.tensors, received.tensors, strict=True):
                target.copy_(source)
            mine.done = other.done = True
        else:
            ours.setdefault(key, deque()).append(mine)
        return mine


class _Copy:
    """One side of a message within the process."""

    def __init__(self, message: Message, tensors: list[Tensor]) -> None:
        self.message = message
        self.tensors = tensors
        self.done = False

    def ready(self) -> bool:
        return self.done

    def wait(self) -> None:
        assert self.done, f"{self.message.what}: within one process only the driver waits"


class ProcessGroupTransport:
    """One rank for each process of a ``torch.distributed`` group: gloo, or NCCL by the same code.

    gloo keeps the lanes apart by tags. NCCL has no tags, and one queue for each communicator, in which a receive
    posted early would hold up a send posted later; so each of ``channels``, a lane of an ordered pair of ranks, gets a
    communicator of its own, and headers, which live on the CPU, go over a gloo group beside it. What is sent lives on
    ``device``, or is headers alone if that is None.

    Raises:
        PipelineError: the group's backend does not carry tensors of that device.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        channels: Iterable[Channel],
        timeout_s: float,
        device: torch.device | None = _CPU,
    ) -> None:
        world = dist.group.WORLD
        assert world is not None, "the caller has seen to it that torch.distributed is initialised"
        self.group = group if group is not None else world
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        backend = self._backend_for(device)
        timeout = timedelta(seconds=timeout_s)
        # On NCCL a wait with a timeout blocks the host; there the group's own watchdog keeps the time.
        self._wait_timeout = timeout if backend == "gloo" else None
        self.control: dist.ProcessGroup = self.group
        self._groups: dict[Channel, dist.ProcessGroup] = {}
        if backend != "gloo":
            self._divide(backend, sorted(channels), timeout)
            self._connect(device)

    def _backend_for(self, device: torch.device | None) -> str:
        """The one of the group's backends that carries tensors of ``device``; any for None."""
        backends = dict(part.split(":") for part in dist.get_backend_config(self.group).split(","))
        if device is None:
            return next(iter(backends.values()))
        backend = backends.get(device.type)
        # gloo says that it takes them, and when it is sent one its peer's process ends.
        if backend is None or (backend == "gloo" and device.type != "cpu"):
            name, remedy = dist.get_backend(self.group), "use a gloo" if device.type == "cpu" else "use an NCCL"
            raise PipelineError(
                f"rank {self.rank} has tensors on {device}, which {name} does not carry; {remedy} group"
            )
        return backend

    def _divide(self, backend: str, channels: Sequence[Channel], timeout: timedelta) -> None:
        """A group for each channel that ends at this rank, and one for what lives on the CPU."""
        members = dist.get_process_group_ranks(self.group)
        with _groups_of_their_own():
            self.control = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=True)
            for lane, source, target in channels:
                if self.rank in (source, target):
                    ranks = sorted((members[source], members[target]))
                    self._groups[lane, source, target] = dist.new_group(
                        ranks, timeout, backend, use_local_synchronization=True
                    )

    def _connect(self, device: torch.device | None) -> None:
        """A first message over every communicator, in one order on all ranks.

        NCCL makes a communicator when it is first used, and until the other rank uses it too the host waits. Two ranks
        that began by sending to each other would wait for ever.
        """
        for lane, source, target in self._groups:
            side = self.send if source == self.rank else self.receive
            side(Message(lane, source, target, "a first message"), [torch.zeros(1, device=device)]).wait()

    def send(self, message: Message, tensors: list[Tensor]) -> Handle:
        """Start sending."""
        return self._post(message, [tensor.contiguous() for tensor in tensors], dist.isend, message.target)

    def receive(self, message: Message, tensors: list[Tensor]) -> Handle:
        """Start receiving."""
        return self._post(message, tensors, dist.irecv, message.source)

    def _post(self, message: Message, tensors: list[Tensor], start: object, peer: int) -> _Works:
        group = self._group_of(message)
        peer_in_world = dist.get_global_rank(self.group, peer)
        works = []
        try:
            for tensor in tensors:
                # Nothing to say needs no message, and neither backend sends it alike.
                works.append(start(tensor, peer_in_world, group, message.lane) if tensor.numel() else None)  # type: ignore[operator]
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} could not post {message.what}: rank {peer} is gone ({reason_of(error)})"
            ) from error
        return _Works(self.rank, peer, message, tensors, works, self._wait_timeout)

    def _group_of(self, message: Message) -> dist.ProcessGroup:
        if message.lane is Lane.HEADER:
            return self.control
        return self._groups.get((message.lane, message.source, message.target), self.group)

    def gather(self, numbers: list[int], what: str) -> list[list[int]]:
        """The same few numbers of every rank, by rank; also a meeting of all ranks.

        Raises:
            PeerError: a rank did not come.
        """
        mine = torch.tensor(numbers, dtype=torch.int64)
        every = [mine if rank == self.rank else torch.empty_like(mine) for rank in range(self.num_ranks)]
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        # Not by a collective: that could not tell who is missing, and its thread would outlive the timeout.
        sends = [self.send(self._call(what, self.rank, other), [mine]) for other in others]
        receives = [self.receive(self._call(what, other, self.rank), [every[other]]) for other in others]
        for handle in (*receives, *sends):
            handle.wait()
        return [row.tolist() for row in every]

    def _call(self, what: str, source: int, target: int) -> Message:
        return Message(Lane.HEADER, source, target, f"rank {source} to call {what}")


class _Works:
    """One side of a message between processes: a ``Work`` for each tensor."""

    def __init__(
        self,
        rank: int,
        peer: int,
        message: Message,
        tensors: list[Tensor],
        works: list[dist.Work | None],
        timeout: timedelta | None,
    ) -> None:
        self.message = message
        self._rank, self._peer = rank, peer
        self._tensors, self._works, self._timeout = tensors, works, timeout

    def ready(self) -> bool:
        """Unknown without blocking; the driver of a single rank does not ask."""
        return all(work is None or work.is_completed() for work in self._works)

    def wait(self) -> None:
        started = time.monotonic()
        for index, work in enumerate(self._works):
            if work is None:
                continue
            try:
                work.wait() if self._timeout is None else work.wait(self._timeout)
            except RuntimeError as error:
                waited_s = time.monotonic() - started
                tensor = Leaf.of(self._tensors[index])
                raise PeerError(
                    f"rank {self._rank} waited {waited_s:.1f} s for {self.message.what}, tensor {index + 1} of "
                    f"{len(self._works)} ({tensor}): rank {self._peer} died or stalled ({reason_of(error)})"
                ) from error
        self._tensors = []


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Groups that are made in here are set up by their members alone.

    Those of a world that was bound to a device are split from it otherwise, which every rank of it has to join.
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is initialised"
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device


def reason_of(error: BaseException) -> str:
    """The first sentence of what the backend says, without its source file."""
    text = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().partition("\n")[0])
    return re.split(r"\. |:\d{2,}", text)[0][:200]
