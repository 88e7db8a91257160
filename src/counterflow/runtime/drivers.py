"""Who waits: a process that is one rank blocks; a process that is all ranks lets the next one go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from counterflow.errors import PipelineError
from counterflow.runtime.transport import Handle, ProcessGroupTransport


class Driver(Protocol):
    """Carries the ranks of this process to the end of what they do."""

    def drive(self, ranks: Mapping[int, Iterator[Handle]]) -> None:
        """Run all of them until each is exhausted, waiting for what they yield."""

    def meet(self, numbers: list[int], where: str) -> list[list[int]]:
        """What every process says at this point, process by process."""


class OneRank:
    """One rank in each process: a wait blocks it."""

    def __init__(self, transport: ProcessGroupTransport) -> None:
        self._transport = transport

    def drive(self, ranks: Mapping[int, Iterator[Handle]]) -> None:
        """Run the one rank."""
        for rank in ranks.values():
            for handle in rank:
                handle.wait()

    def meet(self, numbers: list[int], where: str) -> list[list[int]]:
        """Over the process group."""
        return self._transport.gather(numbers, where)


class AllRanks:
    """Every rank in this one process and thread, in turns: deterministic, and enough for a single GPU."""

    def drive(self, ranks: Mapping[int, Iterator[Handle]]) -> None:
        """Let each rank run until it has to wait for another."""
        blocked: dict[int, Handle | None] = dict.fromkeys(ranks)
        while blocked:
            moved = False
            for rank, handle in list(blocked.items()):
                while handle is None or handle.ready():
                    moved = True
                    handle = next(ranks[rank], None)
                    if handle is None:
                        del blocked[rank]
                        break
                    blocked[rank] = handle
            if not moved:
                waits = "; ".join(
                    f"rank {rank} for {handle.message.what}" for rank, handle in blocked.items() if handle
                )
                raise PipelineError(f"no rank can go on, each waits for another: {waits}")

    def meet(self, numbers: list[int], where: str) -> list[list[int]]:
        """There is nobody else."""
        return [numbers]
