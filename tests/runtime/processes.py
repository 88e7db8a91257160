"""Start the scripts under ``ranks`` as processes, and see that none is left."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from counterflow.runtime import launch

TESTS = Path(__file__).parent.parent


def command(script: str, *arguments: object) -> list[str]:
    """Run ``tests/runtime/ranks/<script>.py``."""
    return [sys.executable, "-m", f"runtime.ranks.{script}", *map(str, arguments)]


@contextmanager
def surroundings() -> Iterator[None]:
    """One thread for each process, and the tests on its path."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"):
        yield


def run_ranks(script: str, num_ranks: int, folder: Path, *arguments: object, timeout_s: float = 60) -> None:
    """``arguments`` after ``folder``, where the script leaves what it found; raises as ``launch`` does."""
    with surroundings():
        launch(command(script, folder, *arguments), num_ranks, timeout_s=timeout_s, logs=folder / "logs")


def init_process_group(device: str) -> None:
    """gloo for the CPU; for "cuda" NCCL, with a GPU for each rank."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def run_cases(names: Sequence[str], num_ranks: int, folder: Path, device: str = "cpu") -> dict[str, dict[int, Any]]:
    """For each case of ``ranks/run_cases.py`` what every rank found."""
    run_ranks("run_cases", num_ranks, folder, device, *names, timeout_s=60 if device == "cpu" else 180)
    found = [torch.load(folder / f"rank-{rank}.pt", map_location="cpu") for rank in range(num_ranks)]
    return {name: {rank: results[name] for rank, results in enumerate(found)} for name in names}


def all_gone(pids: Sequence[int], within_s: float) -> bool:
    """Whether these processes have ended, or end in time."""
    deadline = time.monotonic() + within_s
    while any(map(_lives, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _lives(pid: int) -> bool:
    """There, and no zombie that its new parent has not collected yet."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    return status.rpartition(")")[2].split()[0] not in "ZX"
