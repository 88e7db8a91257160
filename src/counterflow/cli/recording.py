"""What a replay is of: recorded steps, the sizes of a server, and what the caller knows about its hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from counterflow.cli.loads import load_windows
from counterflow.cli.output import counted, printable
from counterflow.errors import PlacementError

if TYPE_CHECKING:
    from counterflow.experts import ReplaySettings
    from counterflow.experts.loads import Floats, Ints

_USUAL_WINDOW, _USUAL_INTERVAL = 1000, 3000
"""vLLM's."""


@dataclass(frozen=True)
class Recording:
    """What every part of the verb has to know."""

    file: Path
    windows: Floats
    num_gpus: int
    num_nodes: int
    num_groups: int
    settings: ReplaySettings
    expert_bytes: float | None
    bytes_per_s: float | None
    routes: Ints | None = None
    """Of some tokens, where they were recorded."""

    @property
    def title(self) -> str:
        """For pictures."""
        return f"{printable(self.file.name)} on {counted(self.num_gpus, 'GPU')}"

    def as_dict(self) -> dict[str, object]:
        """The head of what is printed as JSON."""
        settings = self.settings
        return {
            "file": str(self.file),
            **dict(zip(("num_steps", "num_layers", "num_experts"), self.windows.shape, strict=True)),
            "num_gpus": self.num_gpus,
            "num_nodes": self.num_nodes,
            "num_groups": self.num_groups,
            "window_size": None if settings.decay is not None else settings.window_size,
            "step_interval": settings.step_interval,
            "decay": settings.decay,
            "max_moves": settings.max_moves,
            "skip_above": settings.skip_above,
        }


def read_windows(file: Path, key: str | None) -> Floats:
    """The recorded loads in ``file`` [steps, layers, experts], of which there are several.

    Raises:
        CounterflowError: it holds no loads, a single step, or one expert.
    """
    windows = load_windows(file, key)
    if len(windows) == 1:
        raise PlacementError(f"{file} holds a single step, of which nothing can be learnt for a next; record several")
    return windows


def settings_of(
    file: Path,
    num_steps: int,
    window_size: int | None,
    step_interval: int | None,
    decay: float | None,
    max_moves: int | None,
    skip_above: float,
) -> ReplaySettings:
    """The settings asked for; what is left open follows the recording, and vLLM's where that is long.

    Raises:
        PlacementError: no rebalance would come due, or a setting is none.
    """
    from counterflow.experts import ReplaySettings

    interval = min(_USUAL_INTERVAL, max(1, num_steps // 8)) if step_interval is None else step_interval
    if interval >= num_steps:
        raise PlacementError(
            f"{file}: there are {num_steps} steps, and with --step-interval {interval} no rebalance comes due before "
            f"the last of them; give a smaller one, or a longer recording"
        )
    window = min(_USUAL_WINDOW, max(interval, 1)) if window_size is None else window_size
    return ReplaySettings(window, interval, decay, max_moves, skip_above)


@contextmanager
def replaying(parts: int) -> Iterator[Callable[[int], Callable[[int, int], None]]]:
    """A bar on a terminal, nothing in a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replaying", total=None)

        def part(index: int) -> Callable[[int, int], None]:
            return lambda done, total: bar.update(task, completed=index * total + done, total=parts * total)

        yield part
