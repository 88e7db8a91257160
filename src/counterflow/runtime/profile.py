"""Record a run with PyTorch's profiler: one file for each rank and cycle, which knows its rank, whole or absent."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from counterflow.errors import PipelineError


class profile:  # noqa: N801 - used as a function, as torch.profiler.profile is
    """Records some steps of a run into ``folder``: ``rank0_1.json.gz`` for rank 0's first cycle, and so on.

    Of every cycle the first ``wait`` steps are passed over, the next ``warmup`` are recorded and thrown away (starting
    to record is slow), and the next ``active`` are kept; there are ``repeat`` cycles, 0 for as many as fit. CPU is
    recorded, and the GPU where there is one. Call ``step()`` after every step. When the block ends, also by an error,
    what was recorded until then is written. ``open_traces(folder)`` reads the files in the order of their ranks.

    The rank is that of ``torch.distributed`` where it is initialised, else ``rank``, else the one that torchrun told
    (``RANK``), else 0.

    Raises:
        PipelineError: numbers of steps that make no cycle, a folder that cannot be made, a rank other than that of
            ``torch.distributed``, or a trace that cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from counterflow.runtime import profile
        >>> from counterflow.trace import open_traces
        >>> folder = tempfile.mkdtemp()
        >>> with profile(folder, wait=0, warmup=1, active=1, rank=3) as recording:
        ...     for _ in range(2):
        ...         _ = torch.ones(4, 4) @ torch.ones(4, 4)
        ...         recording.step()
        >>> [path.name for path in recording.files], [trace.rank for trace in open_traces(folder)]
        (['rank3_1.json.gz'], [3])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        rank: int | None = None,
    ) -> None:
        if wait < 0 or warmup < 0 or active < 1 or repeat < 0 or (rank is not None and rank < 0):
            raise PipelineError(
                f"profile got wait {wait}, warmup {warmup}, active {active}, repeat {repeat} and rank {rank}; "
                "it needs an active of at least 1 and nothing below 0"
            )
        self.files: list[Path] = []
        """What has been written."""
        self._folder, self._asked = Path(folder), rank
        self._before = wait + warmup
        self._steps = self._cycles = self._rank = 0
        self._failure: PipelineError | None = None
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=repeat),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> Self:
        self._rank = _rank(self._asked)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PipelineError(f"{self._folder} cannot be made ({error.strerror}); give a folder for traces") from None
        if not _initialised():  # else torch tells the rank, and of every process group the ranks in it
            self._profiler.preset_metadata_json("distributedInfo", json.dumps({"rank": self._rank}))
        with _forgetting():
            self._profiler.__enter__()  # type: ignore[no-untyped-call]
        return self

    def step(self) -> None:
        """Tell that a step has ended.

        Raises:
            PipelineError: the trace of a cycle cannot be written.
        """
        self._steps += 1
        with _forgetting():
            self._profiler.step()
        self._raise_failure()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._profiler.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if error is None:
            self._raise_failure()
        elif self._failure is not None:
            error.add_note(str(self._failure))  # what ended the block is worth more
        if error is None and not self.files:
            warnings.warn(
                f"nothing was recorded in {self._folder}: step() was called {self._steps} times, and the first "
                f"{self._before} steps are not kept; run more of them, and call step() after each",
                stacklevel=2,
            )

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._cycles += 1
        path = self._folder / f"rank{self._rank}_{self._cycles}.json.gz"
        # Hidden, and not ending as traces do: another process may be reading the folder.
        beside = self._folder / f".{path.stem}.{os.getpid()}.gz"
        try:
            profiler.export_chrome_trace(str(beside))
            beside.replace(path)
        except (OSError, RuntimeError) as error:
            # Not raised here: torch's profiler is between two states, and would crash the process when it is left.
            self._failure = PipelineError(
                f"{path} cannot be written ({error}); give a folder that you may write to, with space left"
            )
        else:
            self.files.append(path)
        finally:
            beside.unlink(missing_ok=True)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


@contextmanager
def _forgetting() -> Iterator[None]:
    """Torch warns that it forgets a cycle when the next one begins: here it is written by then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning: Profiler clears events", UserWarning)
        yield


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank(asked: int | None) -> int:
    if _initialised():
        own = dist.get_rank()
        if asked not in (None, own):
            raise PipelineError(f"profile got rank {asked} in a process that is rank {own}; leave the rank out")
        return own
    if asked is not None:
        return asked
    told = os.environ.get("RANK", "")
    return int(told) if told.isascii() and told.isdigit() else 0
