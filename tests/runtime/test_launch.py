"""Who is named when ranks fall one after the other, who is left alone, and that nobody outlives the launcher."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from counterflow.errors import LaunchError
from counterflow.runtime import launch
from counterflow.runtime.heartbeat import STORE_VARIABLE
from runtime.processes import all_gone, command, run_ranks, surroundings

SLACK_S = 8.0  # the grace given to the others, and a busy machine
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path: Path) -> Iterator[None]:
    """Not even where a test fails."""
    yield
    for pid in written_pids(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def verdict(num_ranks: int, folder: Path, *arguments: object, timeout_s: float, within_s: float) -> list[str]:
    """The lines of the launcher's error, which comes in time and leaves no process behind."""
    with pytest.raises(LaunchError) as caught:
        run_ranks("odd_jobs", num_ranks, folder, *arguments, timeout_s=timeout_s)
    assert time.time() - (folder / "failed").stat().st_mtime < within_s + SLACK_S
    assert all_gone(written_pids(folder), within_s=1)
    return str(caught.value).splitlines()


def written_pids(folder: Path) -> list[int]:
    return [int(file.read_text(encoding="utf-8")) for file in folder.glob("pid-*")]


def words_of(rank: int, folder: Path) -> str:
    return (folder / f"logs/rank-{rank}.log").read_text(encoding="utf-8")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- who is named -------------------------------------------------------------------------------------------


def test_a_sleeper_is_named_although_others_fall_first(tmp_path: Path) -> None:
    # Each of the others waits for the next one, and may be the first to lose patience.
    first, *others = verdict(4, tmp_path, "fail_in", "1f1b/4/4", 3, "3F1", "sleep", 3, timeout_s=PATIENCE_S, within_s=3)
    assert re.fullmatch(r"rank 3 stalled \d+\.\d s ago, at 3F1; the job was ended", first)
    for rank, line in enumerate(others):
        awaited = f"for the gradient of {rank + 1}B1 from rank {rank + 1} to {rank}"
        assert re.fullmatch(
            rf"  rank {rank} (waited \d+\.\d s {awaited}, tensor 1 of 1 .+|was waiting {awaited})", line
        )
    assert any(" waited " in line for line in others)


@pytest.mark.parametrize("how", ["sleep", pytest.param("stop", marks=pytest.mark.slow)])
def test_the_launcher_loses_patience_before_the_others_do(how: str, tmp_path: Path) -> None:
    lines = verdict(3, tmp_path, "fail_in", "zb1p/3/4", 1, "1F2", how, PATIENCE_S, timeout_s=2, within_s=2)
    assert re.fullmatch(r"rank 1 stalled [2-9]\.\d s ago, at 1F2; the job was ended", lines[0])
    assert lines[1:] == [
        "  rank 0 was waiting for the gradient of 1B1 from rank 1 to 0",
        "  rank 2 was waiting for the activation of 1F2 from rank 1 to 2",
    ]


def test_a_stalled_rank_is_named_and_not_one_that_ends_meanwhile(tmp_path: Path) -> None:
    first, _ = verdict(2, tmp_path, "stop_while_another_ends", 6, timeout_s=2, within_s=2 + 6)
    assert re.fullmatch(r"rank 1 stalled \d+\.\d s ago, between steps; the job was ended", first)


def test_twins_that_add_up_their_gradients_name_each_other(tmp_path: Path) -> None:
    first, *others = verdict(
        4, tmp_path, "fail_among_twins", "dualpipe/4/8", 1, "kill", 20, timeout_s=PATIENCE_S, within_s=0
    )
    assert first == "rank 1 was killed by SIGKILL, waiting for the gradients of twins; the job was ended"
    assert [line.split()[1] for line in others] == ["0", "2", "3"]
    assert re.fullmatch(
        r"  rank 2 (waited \d+\.\d s for|could not post) the twin of stage \d with its weights, "
        r"from rank (1 to 2|2 to 1)\b.*: rank 1 (died or stalled|is gone) \(.+\)",
        others[1],
    )
    assert f"counterflow.errors.PeerError: {others[1].strip()}\n" in words_of(2, tmp_path)


def test_a_process_without_a_part_in_the_pipeline_is_not_blamed_and_two_pipelines_tell_one_story(
    tmp_path: Path,
) -> None:
    first, *others = verdict(3, tmp_path, "two_pipelines_and_an_onlooker", timeout_s=2, within_s=2)
    assert re.fullmatch(r"rank 2 stalled [2-9]\.\d s ago, at 1F1; the job was ended", first)
    assert others == [
        "  rank 0 was waiting for the gradient of 1B1 from rank 1 to 0",
        "  rank 1 was before its pipeline was built",
    ]
    assert words_of(1, tmp_path).strip() == (
        "this process is not in the process group that was given; only its members build this"
    )


HOW = {
    "raise": "ended with exit code 1",
    "kill": "was killed by SIGKILL",
    "sleep": r"stalled \d+\.\d s ago",
}
PLACES = [
    ("zb1p/3/4", 1, "1I2"),
    ("zb1p/3/4", 0, "0W3"),
    ("zb1p/3/4", 2, "2I0"),
    ("1f1b/3/4", 2, "evaluate 2F1"),
    ("dualpipe/4/8", 1, "2B5"),
    ("dualpipe/4/8", 3, "0W7"),
    ("dualpipev/2/5", 0, "3F2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("name", "rank", "where"), PLACES)
def test_the_action_is_named_wherever_it_stands(name: str, rank: int, where: str, how: str, tmp_path: Path) -> None:
    num_ranks = int(name.split("/")[1])
    first, *others = verdict(num_ranks, tmp_path, "fail_in", name, rank, where, how, 3, timeout_s=4, within_s=4)
    action = re.escape(where.removeprefix("evaluate "))
    assert re.fullmatch(rf"rank {rank} {HOW[how]}, at (\(.*)?{action}\b.*; the job was ended", first)
    assert len(others) == num_ranks - 1
    assert all(
        re.search(r"(waited|waiting|could not post).* (the (activation|gradient|twin)|to call)", line)
        for line in others
    )


@pytest.mark.slow
def test_one_that_takes_long_to_end_has_ended_and_not_stalled(tmp_path: Path) -> None:
    first, other = verdict(2, tmp_path, "raise_and_linger", 3, timeout_s=PATIENCE_S, within_s=3)
    assert first == "rank 1 ended with exit code 1, at 1F1; the job was ended"
    assert other.startswith("  rank 0 waited ")


# --- who is left alone --------------------------------------------------------------------------------------


def test_a_rank_that_is_done_with_its_pipeline_may_take_its_time_or_leave_without_closing_it(tmp_path: Path) -> None:
    run_ranks("odd_jobs", 2, tmp_path, "end_well", 4, timeout_s=2)
    assert len(written_pids(tmp_path)) == 2
    assert [words_of(rank, tmp_path) for rank in range(2)] == ["", ""]


# --- nobody is left -----------------------------------------------------------------------------------------

WITH_CHILD = """
import os, pathlib, subprocess, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
child = subprocess.Popen(["sleep", "1000"])
for name, pid in ("child", child.pid), ("rank", os.getpid()):
    (folder / f"{name}-{rank}.new").write_text(str(pid))
    (folder / f"{name}-{rank}.new").rename(folder / f"pid-{name}-{rank}")
while len(list(folder.glob("pid-*"))) < 6:
    time.sleep(0.01)
"""


def three_with_children(folder: Path, then: str) -> list[str]:
    """What ranks run that know nothing of pipelines: when all of them have a child they do ``then``."""
    return [sys.executable, "-c", WITH_CHILD + then, str(folder)]


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("os._exit(int(rank))", "rank [12] ended with exit code [12]"),
        ("os.kill(os.getpid(), 9 if rank == '1' else 0); time.sleep(1000)", "rank 1 was killed by SIGKILL"),
    ],
    ids=["exit", "kill"],
)
def test_children_of_ranks_are_ended_with_them(then: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=rf"\A{words}, before its pipeline was built; the job was ended\n"):
        launch(three_with_children(tmp_path, then), 3)
    pids = written_pids(tmp_path)
    assert len(pids) == 6
    assert all_gone(pids, within_s=1)


LAUNCHER = """
import signal, sys
from counterflow.runtime import launch
# Whoever runs these tests may have told its children to ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
launch(sys.argv[1:], 3)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_nobody_outlives_the_launcher_not_even_who_is_stopped_or_has_no_pipeline_yet(name: str, tmp_path: Path) -> None:
    ranks = three_with_children(tmp_path, "os.kill(os.getpid(), 19 if rank == '1' else 0); time.sleep(1000)")
    with surroundings(), started([sys.executable, "-c", LAUNCHER, *ranks], tmp_path / "log") as launcher:
        wait_until(lambda: len(written_pids(tmp_path)) == 6)
        launcher.send_signal(signal.Signals[name])
        assert all_gone([launcher.pid, *written_pids(tmp_path)], within_s=5)


# --- without a launcher -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "how"),
    [(1, "kill"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, "kill"), (1, "stop"), (2, "sleep")])],
)
def test_without_a_launcher_survivors_end_by_themselves_and_say_for_what_they_waited(
    who: int, how: str, tmp_path: Path
) -> None:
    arguments = command("odd_jobs", tmp_path, "fail_in", "zb1p/3/4", who, f"{who}F2", how, 4)
    with ranks_by_hand(3, arguments, tmp_path / "logs") as ranks:
        survivors = [rank for rank in range(3) if rank != who]
        wait_until((tmp_path / "failed").exists)
        assert all_gone([ranks[rank].pid for rank in survivors], within_s=4 + SLACK_S)
        for rank in survivors:
            peer = rank + (1 if who > rank else -1)
            assert re.search(
                rf"counterflow\.errors\.PeerError: rank {rank} (waited \d+\.\d s for|could not post) "
                rf"the (activation|gradient) of \d[FB]\d from rank (\d to {rank}|{rank} to {peer})\b.*"
                rf": rank {peer} (died or stalled|is gone) \(.+\)$",
                words_of(rank, tmp_path),
                re.MULTILINE,
            )
            assert ranks[rank].wait() == 1


@contextmanager
def ranks_by_hand(num_ranks: int, arguments: Sequence[str], logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """As torchrun starts them, but for its store: rank 0 holds it."""
    logs.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        stack.enter_context(surroundings())
        stack.enter_context(patch.dict(os.environ, settings))
        os.environ.pop(STORE_VARIABLE, None)
        yield [
            stack.enter_context(started(arguments, logs / f"rank-{rank}.log", RANK=str(rank)))
            for rank in range(num_ranks)
        ]


@contextmanager
def started(arguments: Sequence[str], log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is not left behind, whatever becomes of the test."""
    with log.open("wb") as words:
        process = subprocess.Popen(arguments, env={**os.environ, **settings}, stdout=words, stderr=words)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
