"""The figures of one GPU, as data: what the overlap command shows and prints as JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stream:
    """What ran on one stream, in microseconds of which each counts once."""

    stream: int
    count: int
    busy_us: float
    compute_us: float
    communication_us: float


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel: ``kind`` is one of ``CLASSES``; times are summed over its runs.

    ``blocks`` and ``threads`` are the largest grid and block it ran with, 0 where the trace tells none.
    """

    name: str
    kind: str
    count: int
    total_us: float
    exposed_us: float
    blocks: int
    threads: int


@dataclass(frozen=True)
class Piece:
    """One unbroken stretch of exposed communication, counted from the window's start.

    ``kernels`` are those that ran in it, ``phases`` what had launched them; ``then`` is the compute kernel that
    starts first at its end or after, ``then_phase`` its phase, both "" where there is none. ``waited`` is one of
    ``WAITED``: whether that compute waited for the communication.
    """

    start_us: float
    length_us: float
    kernels: tuple[str, ...]
    phases: tuple[str, ...]
    then: str
    then_phase: str
    waited: str


@dataclass(frozen=True)
class Phase:
    """All ranges of one name; times are those of the GPU work that belongs to them, summed over the ranges.

    ``part`` and ``direction`` are what the name tells of a layer, such as "experts" and "B"; "" where nothing.
    Within a range each instant counts once for compute, once for communication and once for the rest (copies, fills
    and unknown kernels).
    """

    name: str
    count: int
    compute_us: float
    communication_us: float
    exposed_us: float
    other_us: float
    part: str
    direction: str


@dataclass(frozen=True)
class Share:
    """So much of something lies under the compute of this phase; "" stands for compute of no phase."""

    phase: str
    us: float


@dataclass(frozen=True)
class Hiding:
    """What hides one kind of communication, in microseconds of which each counts once.

    ``name`` is its phase, or its kernel's function where it has none. ``communication_us`` = ``exposed_us`` + the sum
    of ``under``. Under several compute kernels at once it counts for the phase of the one that started first.
    """

    name: str
    communication_us: float
    exposed_us: float
    under: tuple[Share, ...]


@dataclass(frozen=True)
class Flight:
    """Low-latency transfers of one kind between their send kernel and their receive kernel.

    ``flight_us`` is from the end of the one to the start of the other; ``hidden_us`` the part of it under compute.
    """

    name: str
    count: int
    flight_us: float
    hidden_us: float
    exposed_us: float


@dataclass(frozen=True)
class Exposure:
    """Where the time of one GPU went, in microseconds.

    ``window_us`` = ``compute_us`` + ``exposed_us`` + ``other_us`` + ``idle_us``; ``communication_us`` =
    ``overlapped_us`` + ``exposed_us``. Other is what only copies, fills and unknown kernels cover. Transfers alone
    leave out waiting and preparing. ``pieces`` are the longest of ``num_pieces``; for ``blocking_us`` of the exposed
    time compute waited, for ``not_blocking_us`` it did not, for the rest the trace cannot tell. Flights are no kernels
    and stand beside these figures: each instant of them counts once. ``phase_source`` is "annotations", "kernel order"
    or "none". ``sms`` are the multiprocessors of
    the GPU and ``communication_sms`` the most that a communication kernel took, both 0 where not told.
    """

    file: str
    rank: int | None
    device: int
    start_ns: int
    window_us: float
    compute_us: float
    communication_us: float
    overlapped_us: float
    exposed_us: float
    transfers_us: float
    exposed_transfers_us: float
    waiting_us: float
    unknown_us: float
    other_us: float
    idle_us: float
    idle_gaps: int
    num_pieces: int
    blocking_us: float
    not_blocking_us: float
    flights_us: float
    hidden_flights_us: float
    exposed_flights_us: float
    phase_source: str
    sms: int
    communication_sms: int
    streams: tuple[Stream, ...]
    kernels: tuple[Kernel, ...]
    pieces: tuple[Piece, ...]
    phases: tuple[Phase, ...]
    hiding: tuple[Hiding, ...]
    flights: tuple[Flight, ...]
    warnings: tuple[str, ...]

    @property
    def exposed_share(self) -> float:
        """The exposed part of the window, from 0 to 1."""
        return self.exposed_us / self.window_us if self.window_us else 0.0
