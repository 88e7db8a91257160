"""The all-to-all of expert parallelism: rows go to the ranks that hold their experts, and come back.

An exchange moves rows and nothing else. It never computes, it takes no part in autograd, and it does not allocate: who
starts one owns both buffers until whoever reads the result has waited for its arrival.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.errors import PeerError, PipelineError
from counterflow.runtime.transport import reason_of

Ready = torch.cuda.Event | None
"""When what is to be sent is there: on the CPU it is as soon as the call that makes it returns."""


@dataclass(frozen=True)
class Rows:
    """How many rows go to each rank, and how many come from each.

    ``returning`` tells results on their way back (combine, and in a backward the gradients of what was dispatched) from
    rows on their way to the experts.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    returning: bool = False

    def back(self) -> Rows:
        """The way back."""
        return Rows(self.received, self.sent, not self.returning)


class Arrival(Protocol):
    """An exchange under way."""

    def wait(self) -> object:
        """What the caller does next comes after the arrival: a CPU blocks, a GPU's current stream will wait."""


class Exchange(Protocol):
    """What carries rows between the ``num_ranks`` ranks among which the experts are divided.

    A transport of one's own (DeepEP, say) implements these two methods. Its ``start`` has to wait on its own stream for
    ``ready`` and for nothing else, least of all for the end of the compute stream, and returns at once.
    """

    num_ranks: int
    rank: int

    def counts(self, rows: Tensor) -> Tensor:
        """How many rows come: ``rows`` [num_ranks, n] says how many of each of n sorts go to each rank.

        The result has the same shape; its row ``r`` is what rank ``r`` has said of this one. It may block.
        """

    def start(self, source: Tensor, target: Tensor, rows: Rows, ready: Ready) -> Arrival:
        """Send the rows of ``source``, those for rank 0 first; what comes goes into ``target``, in the same order."""


class Here:
    """The arrival of what never went away."""

    def wait(self) -> None:
        """There is nothing to wait for."""


class LocalExchange:
    """One rank that holds all experts: rows are copied where they are."""

    num_ranks = 1
    rank = 0

    def counts(self, rows: Tensor) -> Tensor:
        """What it sends it receives."""
        return rows

    def start(self, source: Tensor, target: Tensor, rows: Rows, ready: Ready) -> Arrival:
        """A copy on the compute lane, behind what made ``source``."""
        target.copy_(source)
        return Here()


class ProcessGroupExchange:
    """``torch.distributed.all_to_all_single`` over ``group``: gloo on CPUs, NCCL on GPUs; by default over the world.

    The ranks of the group have to start their exchanges in one order, as those that run the same schedule do. NCCL runs
    what a group is given in turn: with a ``counts_group`` of the same ranks the sizes do not queue behind the rows.

    Raises:
        PipelineError: there is no process group, or this process is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, counts_group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise PipelineError(
                "an exchange between processes needs a process group: start them with torchrun and call "
                "torch.distributed.init_process_group first, or use LocalExchange"
            )
        self._group, self._counts_group = group, group if counts_group is None else counts_group
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise PipelineError("this process is not in the process group that was given; only its members exchange")
        self._stream: torch.cuda.Stream | None = None

    def counts(self, rows: Tensor) -> Tensor:
        """A small all-to-all of its own; on a GPU the host waits for it, for it has to know the sizes.

        Raises:
            PipelineError: ``rows`` has not one row for each rank.
            PeerError: another rank does not take part.
        """
        if rows.dim() == 0 or len(rows) != self.num_ranks:
            raise PipelineError(
                f"counts got {list(rows.shape)} for {self.num_ranks} ranks; give it [{self.num_ranks}, sorts of rows], "
                "a row for each rank"
            )
        arrived = torch.empty_like(rows)
        with self.watched("word of how many rows come"):
            dist.all_to_all_single(arrived, rows.contiguous(), group=self._counts_group)
        return arrived

    def start(self, source: Tensor, target: Tensor, rows: Rows, ready: Ready) -> Arrival:
        """Over the group, asynchronously; on a GPU on a stream of this exchange's own, behind ``ready``."""
        if ready is None:
            return self._start(source, target, rows)
        self._stream = self._stream or torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            return self._start(source, target, rows)

    def _start(self, source: Tensor, target: Tensor, rows: Rows) -> Arrival:
        work: dist.Work | None = dist.all_to_all_single(
            target, source, list(rows.received), list(rows.sent), group=self._group, async_op=True
        )
        assert work is not None, "an asynchronous collective gives a handle"
        return _UnderWay(work, self, rows)

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Whatever torch raises in here befell another rank.

        Raises:
            PeerError: a rank of the group died, stalled, or does not exchange the same.
        """
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited_s = time.monotonic() - started
            raise PeerError(
                f"rank {self.rank} of {self.num_ranks} that share experts waited {waited_s:.1f} s for {what}: another "
                f"one died, stalled, or exchanges something else ({reason_of(error)})"
            ) from error


class _UnderWay:
    """An exchange over a process group."""

    def __init__(self, work: dist.Work, exchange: ProcessGroupExchange, rows: Rows) -> None:
        self._work, self._exchange, self._rows = work, exchange, rows

    def wait(self) -> None:
        with self._exchange.watched(f"{sum(self._rows.received)} rows"):
            self._work.wait()
