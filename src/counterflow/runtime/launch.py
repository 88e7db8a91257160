"""Start the ranks of one machine, watch over them, and end them together.

The launcher holds the store at which the ranks meet and to which they tell their heartbeats, so it can say who died
or stalled first and at what, however the others fell. For several machines torchrun starts the same programs; the
heartbeats are then not there, and a survivor's ``PeerError`` names the peer and the tensor it waited for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from counterflow.errors import LaunchError
from counterflow.runtime.heartbeat import INTERVAL_S, STORE_VARIABLE, Beat, beat_key

_POLL_S = 0.05
_GRACE_S = 1.0
"""After the first failure the others get this long to say what they waited for."""
_END_S = 10.0
"""A rank whose interpreter ends gets this long to do so, for then it is known how; its peers have lost it earlier."""


@dataclass
class _Rank:
    """One process, and when its last signs were seen."""

    index: int
    process: subprocess.Popen[bytes]
    beat: Beat = field(default_factory=Beat)
    heard_s: float = field(default_factory=time.monotonic)
    moved_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    def hear(self, store: TCPStore) -> None:
        """Read its latest beat."""
        if self.ended_s is None and self.process.poll() is not None:
            self.ended_s = time.monotonic()
        key = beat_key(self.index)
        if not store.check([key]):
            return
        beat = Beat(**json.loads(store.get(key)))
        if beat.count != self.beat.count:
            self.heard_s = time.monotonic()
        if beat.progress != self.beat.progress:
            self.moved_s = time.monotonic()
        self.beat = beat

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than well."""
        return self.process.poll() not in (None, 0)

    @property
    def alive(self) -> bool:
        """Whether its process is there; it may be stopped."""
        return self.process.poll() is None

    @property
    def ending(self) -> bool:
        """Alive, but past its last beat, and not because it gave up on a peer."""
        return self.alive and self.beat.progress > 0 and self.beat.count == 0 and self.beat.state != "lost"

    @property
    def silent_s(self) -> float:
        """For how long a rank that has begun to beat, and not announced its end, has said nothing."""
        return time.monotonic() - self.heard_s if self.beat.count else 0.0

    @property
    def still_since_s(self) -> float:
        """Since when it has come no further; one that waits and beats does what it should."""
        return self.heard_s if self.beat.state == "waiting" else min(self.heard_s, self.moved_s)

    def stalled(self, timeout_s: float) -> bool:
        """Alive, but silent, or for too long inside one action."""
        stuck = self.beat.state == "computing" and time.monotonic() - self.moved_s > timeout_s
        return self.alive and (stuck or self.silent_s > timeout_s)

    def end(self) -> None:
        """Kill it and its children; ranks are started as leaders of their own process groups."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def how(self) -> str:
        """How it came to its end."""
        code = self.process.poll()
        if code is None:
            return f"stalled {time.monotonic() - self.still_since_s:.1f} s ago"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def where(self) -> str:
        """What it was doing by its last beat."""
        match self.beat.state:
            case "starting":
                return "before its pipeline was built"
            case "idle":
                return "between steps"
            case "closed":
                return "after its last step"
            case "waiting":
                return f"waiting for {self.beat.doing}"
            case "lost":
                return f"after this: {self.beat.doing}"
        return f"at {self.beat.doing}"

    def last_words(self) -> str:
        """What it said when it gave up on a peer, or was doing when it was ended."""
        if self.beat.state == "lost":
            return self.beat.doing
        return f"rank {self.index} {'had ended well' if self.process.poll() == 0 else f'was {self.where()}'}"


def launch(
    command: Sequence[str],
    num_ranks: int,
    *,
    timeout_s: float = 60.0,
    logs: Path | None = None,
    poll: Callable[[], None] | None = None,
) -> None:
    """Run ``command`` as ``num_ranks`` processes with torchrun's environment, until all have ended well.

    With ``logs`` what rank r prints goes to ``rank-r.log`` there. ``poll`` is called several times a second, to show
    progress. A rank that dies, is killed, or stops for ``timeout_s`` ends the whole job; so does the launcher's own
    end, also by a kill.

    Raises:
        LaunchError: naming the rank that failed first, its last action, and what the others waited for.

    Example:
        >>> import sys
        >>> from counterflow.runtime import launch
        >>> launch([sys.executable, "-c", "import os; assert os.environ['WORLD_SIZE'] == '2'"], 2)
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    before = _end_on_sigterm()
    with _guard() as guarded:
        try:
            for index in range(num_ranks):
                settings = {**os.environ, **_settings(index, num_ranks, store.port)}
                ranks.append(_Rank(index, _start(command, settings, logs, index)))
                guarded(ranks[-1].process.pid)
            _watch(ranks, store, timeout_s, poll)
        finally:
            for rank in ranks:
                rank.end()
            if before is not None:
                signal.signal(signal.SIGTERM, before)


@contextmanager
def _guard() -> Iterator[Callable[[int], None]]:
    """Have a shell end the process groups it is told of when this process ends, be it by a kill.

    A rank itself notices that too, but only while it beats: not before its pipeline is built, nor when it is stopped.
    """
    script = 'while read leader; do groups="$groups -$leader"; done; kill -s KILL -- $groups 2>/dev/null'
    shell = subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    assert shell.stdin is not None, "asked for"

    def guarded(leader: int) -> None:
        os.write(pipe, b"%d\n" % leader)

    pipe = shell.stdin.fileno()
    try:
        yield guarded
    finally:
        shell.kill()
        shell.communicate()


def _settings(index: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As under torchrun: the ranks are clients of a store that is there already, and survives rank 0.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        STORE_VARIABLE: f"127.0.0.1:{port}",
    }


def _start(
    command: Sequence[str], settings: Mapping[str, str], logs: Path | None, index: int
) -> subprocess.Popen[bytes]:
    if logs is None:
        return subprocess.Popen(command, env=settings, start_new_session=True)
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"rank-{index}.log").open("wb") as log:
        return subprocess.Popen(command, env=settings, start_new_session=True, stdout=log, stderr=log)


def _end_on_sigterm() -> Any:
    """Make a polite kill an exception, so that the ranks are ended on the way out; the handler of before."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    return signal.signal(signal.SIGTERM, leave)


def _watch(ranks: list[_Rank], store: TCPStore, timeout_s: float, poll: Callable[[], None] | None) -> None:
    while any(rank.alive for rank in ranks):
        if poll is not None:
            poll()
        for rank in ranks:
            rank.hear(store)
        # One that gave up may yet take long to end; the others would wait for it in vain.
        if any(rank.failed or rank.beat.state == "lost" or rank.stalled(timeout_s) for rank in ranks):
            break
        time.sleep(_POLL_S)
    if all(rank.process.poll() == 0 for rank in ranks):
        return
    # Now, for those that hang on a stalled one may be ended by their own watchdogs before it is judged.
    stalled = [] if any(rank.failed for rank in ranks) else [rank for rank in ranks if rank.stalled(timeout_s)]
    broke_s = time.monotonic()
    while time.monotonic() < broke_s + (_END_S if any(rank.ending for rank in ranks) else _GRACE_S):
        for rank in ranks:
            rank.hear(store)
        time.sleep(_POLL_S)
    raise LaunchError(_verdict(ranks, stalled))


def _verdict(ranks: list[_Rank], stalled: list[_Rank]) -> str:
    """Who failed first, in the first line, and what the others were doing in the next ones."""
    culprit = min(stalled, key=lambda rank: rank.still_since_s) if stalled else _first_to_fail(ranks)
    lines = [f"rank {culprit.index} {culprit.how()}, {culprit.where()}; the job was ended"]
    for rank in ranks:
        if rank is not culprit:
            lines.append(f"  {rank.last_words()}")
    return "\n".join(lines)


def _first_to_fail(ranks: list[_Rank]) -> _Rank:
    """The first one dead that did not give up on a peer; else who stands still; else who left before the others."""
    dead = [rank for rank in ranks if rank.failed and rank.beat.state != "lost"]
    if dead:
        return min(dead, key=lambda rank: rank.ended_s or 0.0)
    standing = [rank for rank in ranks if rank.alive and rank.beat.state != "lost"]
    still = [rank for rank in standing if rank.beat.state != "waiting" or rank.silent_s > 4 * INTERVAL_S]
    if still:
        # One that never beat may have no part in the pipeline; only if there is no other, it is why they waited.
        return min(still, key=lambda rank: (rank.beat.progress == 0, rank.still_since_s))
    left = [rank for rank in ranks if rank.process.poll() == 0]
    return min(left or ranks, key=lambda rank: rank.ended_s or rank.still_since_s)
