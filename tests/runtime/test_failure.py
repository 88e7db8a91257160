"""Whatever befalls a rank, the whole job ends in time, says who failed first and at what, and leaves nobody behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from counterflow.errors import CounterflowError, LaunchError
from counterflow.runtime import launch
from runtime.cases import ordinary_case, plain_losses
from runtime.processes import all_gone, command, run_ranks, surroundings

TIMEOUT_S = 3.0
SLACK_S = 7.0  # the grace given to the others, and a busy machine


def fail(how: str, folder: Path, generator: str = "1f1b", num_ranks: int = 3) -> list[str]:
    """The lines of the launcher's verdict, which has to come in time and with every process gone."""
    with pytest.raises(LaunchError) as caught:
        run_ranks("fail", num_ranks, folder, how, generator, TIMEOUT_S, timeout_s=TIMEOUT_S)
    took_s = time.time() - (folder / "failed").stat().st_mtime
    assert took_s < TIMEOUT_S + SLACK_S
    assert all_gone(pids_in(folder, num_ranks), within_s=1)
    return str(caught.value).splitlines()


def pids_in(folder: Path, num_ranks: int) -> list[int]:
    return [int((folder / f"pid-{rank}").read_text(encoding="utf-8")) for rank in range(num_ranks)]


def waited(rank: int, what: str, peer: int, or_could_not_post: bool = False) -> str:
    waiting = (
        rf"  rank {rank} waited \d+\.\d s for {what}, tensor 1 of 1 \(float64\[3, 5, 8\]\): rank {peer} died or "
        rf"stalled \(.+\)"
    )
    posting = rf"  rank {rank} could not post {what}: rank {peer} is gone \(.+\)"
    return f"{waiting}|{posting}" if or_could_not_post else waiting


WORDS = {
    "raise": r"rank 1 ended with exit code 1, at 1F2; the job was ended",
    "kill": r"rank 1 was killed by SIGKILL, at 1F2; the job was ended",
    "stop": r"rank 1 stalled \d+\.\d s ago, at 1F2; the job was ended",
    "sleep": r"rank 1 stalled \d+\.\d s ago, at 1F2; the job was ended",
}


@pytest.mark.parametrize("how", WORDS)
def test_a_rank_that_fails_in_an_action_is_named_with_it_and_so_is_what_the_others_waited_for(
    how: str, tmp_path: Path
) -> None:
    first, *others = fail(how, tmp_path)
    assert re.fullmatch(WORDS[how], first)
    # A process that is gone may be so before its neighbour begins to receive from it.
    gone = how in ("raise", "kill")
    expected = [
        waited(0, "the gradient of 1B1 from rank 1 to 0", 1, or_could_not_post=gone),
        waited(2, "the activation of 1F2 from rank 1 to 2", 1, or_could_not_post=gone),
    ]
    for line, pattern in zip(others, expected, strict=True):
        assert re.fullmatch(pattern, line)
    assert ("ValueError: as asked" in (tmp_path / "logs/rank-1.log").read_text(encoding="utf-8")) == (how == "raise")
    assert "counterflow: rank 1, at 1F2" in (tmp_path / "logs/rank-1.log").read_text(encoding="utf-8") or how != "raise"


def test_a_rank_that_stays_away_between_steps_is_named(tmp_path: Path) -> None:
    first, *others = fail("stay away", tmp_path)
    assert re.fullmatch(r"rank 1 stalled \d+\.\d s ago, between steps; the job was ended", first)
    assert [re.sub(r" \([^()]*\)$| \d\.\d s", "", line) for line in others] == [
        f"  rank {rank} waited for rank 1 to call step, tensor 1 of 1 (int64[2]): rank 1 died or stalled"
        for rank in (0, 2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("leave", r"rank 1 ended with exit code 0, between steps; the job was ended"),
        ("crash", r"rank 1 ended with exit code 1, before its pipeline was built; the job was ended"),
        ("never arrive", r"rank 1 stalled \d+\.\d s ago, before its pipeline was built; the job was ended"),
    ],
)
def test_a_rank_that_fails_between_or_before_steps_is_named(how: str, words: str, tmp_path: Path) -> None:
    first, *others = fail(how, tmp_path)
    assert re.fullmatch(words, first)
    assert [line[: len("  rank 0 ")] for line in others] == ["  rank 0 ", "  rank 2 "]
    assert all(" for rank 1 to call " in line for line in others)


@pytest.mark.slow
@pytest.mark.parametrize("how", WORDS)
def test_in_dualpipe_it_is_found_among_four(how: str, tmp_path: Path) -> None:
    first, *others = fail(how, tmp_path, "dualpipe", num_ranks=4)
    assert re.fullmatch(WORDS[how].replace("rank 1", "rank 2").replace("1F2", r"\(?1F6.*"), first)
    assert [line.split()[1] for line in others] == ["0", "1", "3"]
    not_beside, *beside = others
    assert all("died or stalled" in line or "could not post" in line for line in beside)
    # Rank 0 is no neighbour: when the job is ended it has given up on rank 1, or still waits for it.
    assert re.search("rank 1 died or stalled|could not post|was waiting for the .* from rank 1 to 0$", not_beside)


@pytest.mark.slow
def test_a_rank_of_a_pipeline_in_a_group_is_named_by_its_place_in_the_job(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"\Arank 3 was killed by SIGKILL, at 1F2; the job was ended\n"):
        run_ranks("two_groups", 4, tmp_path, timeout_s=10)
    expected = plain_losses(ordinary_case("1f1b", 2, 4))[0]
    assert [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(4)] == [{}, {}, expected, expected]


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, "train"),
        (signal.SIGTERM, "train"),
        pytest.param(signal.SIGINT, "train", marks=pytest.mark.slow),
        # Ranks that notice nothing themselves.
        pytest.param(signal.SIGKILL, "stop", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "never arrive", marks=pytest.mark.slow),
    ],
)
def test_when_the_launcher_ends_so_do_its_ranks(number: signal.Signals, how: str, tmp_path: Path) -> None:
    there = [tmp_path / f"trained-{rank}" for rank in range(3)] if how == "train" else [tmp_path / "failed"]
    with surroundings():
        launcher = subprocess.Popen(
            command("launcher", tmp_path, how), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in there):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pids = pids_in(tmp_path, 3)
        assert not all_gone(pids, within_s=0)
        launcher.send_signal(number)
        assert all_gone([launcher.pid, *pids], within_s=5)
    finally:
        launcher.kill()
        launcher.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill", "stop", "sleep", "stay away", "never arrive"])
def test_without_a_launcher_the_others_end_by_themselves(how: str, tmp_path: Path) -> None:
    """As under torchrun: no heartbeat, and nobody who kills."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    settings |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    try:
        with surroundings():
            for rank in range(3):
                ranks.append(
                    subprocess.Popen(
                        command("fail", tmp_path, how, "1f1b", TIMEOUT_S),
                        env={**os.environ, **settings, "RANK": str(rank)},
                        stderr=subprocess.PIPE,
                    )
                )
        said = [ranks[rank].communicate(timeout=60)[1].decode() for rank in (0, 2)]
        assert time.time() - (tmp_path / "failed").stat().st_mtime < TIMEOUT_S + SLACK_S
        assert [ranks[rank].returncode for rank in (0, 2)] == [1, 1]
        for rank, text in zip((0, 2), said, strict=True):
            assert re.search(rf"PeerError: rank {rank} waited \d+\.\d s for .+: rank 1 died or stalled \(", text)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# --- the launcher alone -------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_job_of_processes_that_know_nothing_of_pipelines_runs_and_leaves_its_logs(tmp_path: Path) -> None:
    polls: list[float] = []
    code = "import os, time; time.sleep(0.3); print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"
    launch(python(code), 2, logs=tmp_path / "new" / "logs", poll=lambda: polls.append(time.monotonic()))
    assert [(tmp_path / f"new/logs/rank-{rank}.log").read_text(encoding="utf-8") for rank in range(2)] == [
        "rank 0 of 2\n",
        "rank 1 of 2\n",
    ]
    assert len(polls) > 2


def test_the_first_one_to_fail_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, sys, time
folder = pathlib.Path({str(tmp_path)!r})
(folder / ("pid-" + os.environ["RANK"])).write_text(str(os.getpid()))
while os.environ["RANK"] != "1" or len(list(folder.iterdir())) < 3:
    time.sleep(0.01)
sys.exit(3)
"""
    with pytest.raises(LaunchError) as caught:
        launch(python(code), 3)
    assert str(caught.value).splitlines() == [
        "rank 1 ended with exit code 3, before its pipeline was built; the job was ended",
        "  rank 0 was before its pipeline was built",
        "  rank 2 was before its pipeline was built",
    ]
    assert isinstance(caught.value, CounterflowError)
    assert all_gone(pids_in(tmp_path, 3), within_s=1)


def test_a_poll_that_raises_ends_the_ranks(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path)!r}, "pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(1000)
"""

    def poll() -> None:
        if all((tmp_path / f"pid-{rank}").exists() for rank in range(2)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(python(code), 2, poll=poll)
    assert all_gone(pids_in(tmp_path, 2), within_s=1)
