"""The verb draw: a schedule in simulated time, as a picture or on the terminal."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from counterflow.cli.options import (
    Backward,
    CostsFile,
    FirstWeight,
    Forward,
    Json,
    LastWeight,
    Latency,
    Overlapped,
    Weight,
    costs_of,
)
from counterflow.cli.output import about, print_json, printable, writing
from counterflow.cli.schedules import Chunks, ForwardOnly, MicroBatches, Ranks, Source, head_of, schedule_of, sizes_of
from counterflow.errors import CounterflowError

if TYPE_CHECKING:
    from counterflow.report import Memory
    from counterflow.schedule import Schedule
    from counterflow.simulator import Costs
    from counterflow.timeline import Timeline


class Theme(StrEnum):
    """The ground of a picture."""

    LIGHT = "light"
    DARK = "dark"


def draw(
    source: Source,
    ranks: Ranks = None,
    microbatches: MicroBatches = None,
    chunks: Chunks = None,
    forward_only: ForwardOnly = False,
    costs: CostsFile = None,
    forward_us: Forward = None,
    backward_us: Backward = None,
    weight_us: Weight = None,
    overlapped_us: Overlapped = None,
    latency_us: Latency = None,
    first_stage_weight: FirstWeight = 1.0,
    last_stage_weight: LastWeight = 1.0,
    memory: Annotated[bool, typer.Option("--memory", help="Below each rank the activations that it holds.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The picture to write, an .svg or .png; none: the terminal.")
    ] = None,
    theme: Annotated[
        Theme | None, typer.Option("--theme", help="Of the picture  [default: svg: the viewer's; png: light]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a schedule in simulated time.

    In an .svg, point at an action or a gap to read what it is, and what the rank waited for.

    \b
    Example:
      counterflow draw dualpipe --ranks 8 --microbatches 20 -o dualpipe.svg
      counterflow draw dualpipe --ranks 8 --microbatches 20
    """
    from counterflow.report import print_schedule
    from counterflow.simulator import simulate

    if output is None and theme is not None:
        raise CounterflowError(f"draw got --theme {theme} and no picture to draw; give -o with an .svg or .png")
    if output is not None and output.suffix not in (".svg", ".png"):
        raise CounterflowError(f"{output} ends in {output.suffix!r}; a schedule is drawn as .svg or .png")
    chosen = schedule_of(source, ranks, microbatches, chunks, forward_only)
    prices = costs_of(costs, forward_us, backward_us, weight_us, overlapped_us, latency_us)
    with about(source):
        prices = prices.cut(chosen.num_stages, chosen.num_stages, first_stage_weight, last_stage_weight)
        timeline = simulate(chosen, prices)
        held = _memory(chosen, timeline, prices) if memory else None
    if output is not None:
        _write(output, chosen, timeline, held, theme)
    if as_json:
        print_json({"file": None if output is None else str(output), **head_of(chosen)})
    elif output is None:
        print_schedule(chosen, timeline, memory=held)
    else:
        print(f"wrote {printable(str(output))}: {sizes_of(chosen)}")


def _write(output: Path, schedule: Schedule, timeline: Timeline, memory: Memory | None, theme: Theme | None) -> None:
    from counterflow.files import write_bytes
    from counterflow.report import schedule_svg, to_png

    if output.suffix == ".png":
        theme = theme or Theme.LIGHT  # a PNG cannot follow its viewer
    picture = schedule_svg(schedule, timeline, memory=memory, theme=cast('Literal["light", "dark"] | None', theme))
    data = to_png(picture) if output.suffix == ".png" else picture.encode()
    with writing(output):
        write_bytes(output, data)


def _memory(schedule: Schedule, timeline: Timeline, costs: Costs) -> Memory:
    from counterflow.report import Memory
    from counterflow.simulator import activations_over_time

    states_sizes = any(any(costs.stored_bytes(stage)) for stage in range(schedule.num_stages))
    curves = activations_over_time(schedule, timeline, costs)
    return Memory(curves, "bytes" if states_sizes else "activations")
