"""Signs of life: what each rank is doing, told to a store that the launcher holds.

The store outlives every rank, so that the launcher can say which one died or stalled first, and at what. A rank whose
launcher is gone ends itself.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

STORE_VARIABLE = "COUNTERFLOW_HEARTBEAT"
"""Names the launcher's store as host:port; set for every rank that ``launch`` starts."""

INTERVAL_S = 0.2
EXIT_ALONE = 75

State = Literal["starting", "computing", "waiting", "idle", "closed", "lost"]


@dataclass(frozen=True)
class Beat:
    """One sign of life; ``progress`` grows with every change of what the rank is doing, ``count`` with every beat.

    Where ``count`` is 0 no beat follows, and silence means nothing: the rank has not begun, or its interpreter ends.
    """

    state: State = "starting"
    doing: str = ""
    progress: int = 0
    count: int = 0


class Watch:
    """What a rank is doing, as its executor tells it; with a ``heartbeat`` the launcher knows at once."""

    def __init__(self) -> None:
        self.heartbeat: Heartbeat | None = None
        self._state: State = "starting"

    def computing(self, action: str) -> None:
        """The rank computes ``action``."""
        self._set("computing", action)

    def waiting(self, what: str) -> None:
        """The rank waits for ``what``, or is about to."""
        self._set("waiting", what)

    def between_steps(self) -> None:
        """The caller has the floor."""
        self._set("idle", "")

    def closed(self) -> None:
        """There will be no more steps; a rank that fell stays where it fell."""
        if self._state == "idle":
            self._set("closed", "")

    def lost(self, sentence: str) -> None:
        """The rank gave up on a peer."""
        self._set("lost", sentence)

    def _set(self, state: State, doing: str) -> None:
        self._state = state
        if self.heartbeat is not None:
            self.heartbeat.change(state, doing)


class Heartbeat:
    """Tells the launcher's store what this process does: at each change, and every fifth of a second from a thread.

    A change is told before the rank goes on, so that even after a kill the store knows the last action. That costs
    a round trip to the store, and only ranks started by ``launch`` pay it. It beats until the process ends, and
    for all pipelines of the process, so that silence and standing still have one meaning.
    """

    def __init__(self, rank: int, host: str, port: int) -> None:
        self._rank = rank
        self._beat = Beat()
        # A connection of its own: the group's may be blocked in a wait.
        self._store = TCPStore(host, port, is_master=False)
        self._telling = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="counterflow heartbeat", daemon=True)
        self._thread.start()
        # A thread that the interpreter's end finds inside the store would abort the whole process.
        atexit.register(self._stop)

    @staticmethod
    def of_this_process() -> Heartbeat | None:
        """The heartbeat of a process that ``launch`` started; None where there is no such launcher."""
        address = os.environ.get(STORE_VARIABLE)
        # The launcher's number for this process, which in a pipeline over a subgroup is not the pipeline's.
        return None if address is None else _heartbeat(address, int(os.environ["RANK"]))

    def change(self, state: State, doing: str) -> None:
        """From now on it does this."""
        with self._telling:
            progress, count = self._beat.progress + 1, self._beat.count + 1
            self._tell(Beat(state, doing, progress, count))

    def _tell(self, beat: Beat) -> None:
        self._beat = beat
        try:
            self._store.set(beat_key(self._rank), json.dumps(asdict(beat)))
        except (RuntimeError, ConnectionError):
            # Nobody is left to end this process, and its peers are ending as well.
            print(f"counterflow: rank {self._rank} lost its launcher and ends", file=sys.stderr, flush=True)
            os._exit(EXIT_ALONE)

    def _loop(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            with self._telling:
                self._tell(replace(self._beat, count=self._beat.count + 1))

    def _stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._tell(replace(self._beat, count=0))


@cache
def _heartbeat(address: str, rank: int) -> Heartbeat:
    host, _, port = address.rpartition(":")
    return Heartbeat(rank, host, int(port))


def beat_key(rank: int) -> str:
    """Where in the store the beats of ``rank`` are."""
    return f"counterflow/beat/{rank}"
