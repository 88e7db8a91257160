"""Signs of life: what each rank is doing, told to a store that the launcher holds.

The store outlives every rank, so that the launcher can say which one died or stalled first, and at what. A rank whose
launcher is gone ends itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass, replace
from typing import Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

STORE_VARIABLE = "COUNTERFLOW_HEARTBEAT"
"""Names the launcher's store as host:port; set for every rank that ``launch`` starts."""

INTERVAL_S = 0.2
EXIT_ALONE = 75

State = Literal["starting", "computing", "waiting", "idle", "lost"]


@dataclass(frozen=True)
class Beat:
    """One sign of life; ``progress`` grows with every change of what the rank is doing, ``count`` with every beat."""

    state: State = "starting"
    doing: str = ""
    progress: int = 0
    count: int = 0


class Watch:
    """What a rank is doing, as its executor tells it; with a ``heartbeat`` the launcher knows at once."""

    def __init__(self) -> None:
        self.beat = Beat()
        self.heartbeat: Heartbeat | None = None

    def computing(self, action: str) -> None:
        """The rank computes ``action``."""
        self._set("computing", action)

    def waiting(self, what: str) -> None:
        """The rank waits for ``what``, or is about to."""
        self._set("waiting", what)

    def between_steps(self) -> None:
        """The caller has the floor."""
        self._set("idle", "")

    def lost(self, sentence: str) -> None:
        """The rank gave up on a peer."""
        self._set("lost", sentence)

    def _set(self, state: State, doing: str) -> None:
        self.beat = Beat(state, doing, self.beat.progress + 1)
        if self.heartbeat is not None:
            self.heartbeat.tell()


class Heartbeat:
    """Tells the launcher's store what ``watch`` says: at each change, and every fifth of a second from a thread.

    A change is told before the rank goes on, so that even after a kill the store knows the last action. That costs
    about a tenth of a millisecond, and only ranks started by ``launch`` pay it.
    """

    def __init__(self, rank: int, watch: Watch, host: str, port: int) -> None:
        self._rank, self._watch = rank, watch
        self._count = 0
        # A connection of its own: the group's may be blocked in a wait.
        self._store = TCPStore(host, port, is_master=False)
        self._telling = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="counterflow heartbeat", daemon=True)
        watch.heartbeat = self
        self._thread.start()

    @classmethod
    def from_environment(cls, watch: Watch) -> Heartbeat | None:
        """The heartbeat of a process that ``launch`` started; None where there is no such launcher."""
        address = os.environ.get(STORE_VARIABLE)
        if address is None:
            return None
        host, _, port = address.rpartition(":")
        # The launcher's number for this process, which in a pipeline over a subgroup is not the pipeline's.
        return cls(int(os.environ["RANK"]), watch, host, int(port))

    def tell(self) -> None:
        """Tell it now."""
        with self._telling:
            self._count += 1
            beat = replace(self._watch.beat, count=self._count)
            try:
                self._store.set(beat_key(self._rank), json.dumps(asdict(beat)))
            except (RuntimeError, ConnectionError):
                # Nobody is left to end this process, and its peers are ending as well.
                print(f"counterflow: rank {self._rank} lost its launcher and ends", file=sys.stderr, flush=True)
                os._exit(EXIT_ALONE)

    def stop(self) -> None:
        """No more beats."""
        self._watch.heartbeat = None
        self._stopped.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            self.tell()


def beat_key(rank: int) -> str:
    """Where in the store the beats of ``rank`` are."""
    return f"counterflow/beat/{rank}"
