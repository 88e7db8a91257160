"""What a replay looks like: the GPUs before and after, and how even they are over time or over replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from counterflow.cli.output import counted, writing

if TYPE_CHECKING:
    from counterflow.experts import Frontier, Redundancy, Replay
    from counterflow.report.drawing import Theme

_POINTS = 200
"""At most so many points has a line of a plot."""


def draw_heatmap(path: Path, title: str, before: Replay, after: Replay) -> None:
    """The load of every GPU in every layer, all steps together, under two policies.

    What differs from step to step cancels out there; how even the single steps are stands beside the names.
    """
    from counterflow.report import load_heatmap

    steps = counted(len(before.balancedness), "step")
    panels = {
        f"{each.policy}, balancedness of a step {each.balancedness.mean():.3f}": each.gpu_loads
        for each in (before, after)
    }
    _write(path, lambda theme: load_heatmap(f"GPU loads, sum of {steps}: {title}", panels, theme=theme))


def plot_time(path: Path, title: str, served: Sequence[Replay]) -> None:
    """Balancedness step by step, or over as many steps at a time as leaves the lines clear."""
    from counterflow.report import line_plot

    steps = len(served[0].balancedness)
    width = -(-steps // _POINTS)
    x = list(range(0, steps, width))
    lines = {each.policy: [float(each.balancedness[at : at + width].mean()) for at in x] for each in served}
    label = "step" if width == 1 else f"step (each point is the mean over {width})"
    _write(path, lambda theme: line_plot(f"Balancedness, {title}", label, "mean over layers", x, lines, theme=theme))


def plot_sweep(path: Path, title: str, rows: Sequence[Redundancy], policy: str) -> None:
    """Balancedness over the number of replicas."""
    from counterflow.report import line_plot

    x, lines = [row.num_replicas for row in rows], {policy: [row.balancedness for row in rows]}
    label = "mean over steps and layers"
    _write(path, lambda theme: line_plot(f"Balancedness, {title}", "replicas", label, x, lines, theme=theme))


def plot_frontier(path: Path, title: str, frontier: Frontier) -> None:
    """Balancedness over the number of moves, and where the knee and the level of the published placement are."""
    from counterflow.report import line_plot

    some = sorted({*range(0, len(frontier.moves), -(-len(frontier.moves) // _POINTS)), len(frontier.moves) - 1})
    x = [int(frontier.moves[point]) for point in some]
    columns = {"mean of the layers": frontier.balancedness, "worst layer": frontier.worst}
    lines = {name: [float(column[point]) for point in some] for name, column in columns.items()}
    marks = {
        f"{name}: {counted(int(frontier.moves[point]), 'move')}": float(frontier.moves[point])
        for name, point in (("knee", frontier.knee), ("as even as published", frontier.as_published))
    }
    _write(
        path,
        lambda theme: line_plot(f"Balancedness, {title}", "moves", "balancedness", x, lines, marks=marks, theme=theme),
    )


def _write(path: Path, picture: Callable[[Theme | None], str]) -> None:
    from counterflow.files import write_bytes
    from counterflow.report import to_png

    # A PNG cannot follow its viewer.
    data = to_png(picture("light")) if path.suffix == ".png" else picture(None).encode()
    with writing(path):
        write_bytes(path, data)
