"""The verb that trains: demo."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterflow.cli.output import counted, print_json, print_table
from counterflow.errors import CounterflowError

if TYPE_CHECKING:
    from counterflow.demo import Results, Step

OUT = Path("out/demo")


def demo(
    schedule: Annotated[
        str, typer.Option("--schedule", help="Any name that counterflow schedule --help has.")
    ] = "dualpipe",
    ranks: Annotated[int, typer.Option("--ranks", help="Number of ranks.")] = 4,
    microbatches: Annotated[int, typer.Option("--microbatches", help="Number of micro-batches.")] = 8,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option("--steps", help="Training steps; 60 take about a minute on 2 cores.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data with stable keys.")] = False,
) -> None:
    """Train a small decoder, and check the prediction.

    What its steps took stands beside what was simulated. Pictures, traces and costs are left in out/demo.

    \b
    Example:
      counterflow demo --schedule dualpipev --ranks 2
    """
    from counterflow.schedule import generate

    chosen = generate(schedule, ranks, microbatches)
    if device not in ("cpu", "cuda"):
        raise CounterflowError(f"the demo got device {device!r}; it runs on 'cpu' or 'cuda'")
    try:
        from counterflow.demo import run_demo
    except ModuleNotFoundError as error:
        raise CounterflowError(f"the demo needs {error.name}; install counterflow[torch]") from None
    if not as_json:
        print(
            f"Training a byte-level decoder on the sources of Python's standard library, under {schedule}: "
            f"{counted(ranks, 'rank')}, {counted(chosen.num_stages, 'stage')}, {counted(microbatches, 'micro-batch')}."
        )
    try:
        with _progress(steps) as progress:
            results = run_demo(chosen, device=device, steps=steps, out=OUT, progress=progress)
    except (KeyboardInterrupt, SystemExit):
        print("counterflow: the demo was stopped half-way; its ranks were ended with it", file=sys.stderr)
        raise
    except OSError as error:
        raise CounterflowError(
            f"{OUT} cannot be written ({error.strerror}); run the demo in a folder in which you may make that one"
        ) from None
    if as_json:
        print_json(results.as_dict())
    else:
        _print(results)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, float | None], None]]:
    """A bar on a terminal, nothing in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=steps, loss="")

        def update(step: int, loss: float | None) -> None:
            if loss is not None:
                bar.update(task, completed=step, description="training", loss=f"loss {loss:.2f}")

        yield update


def _print(found: Results) -> None:
    print(
        f"""
Loss for each byte: {found.first_loss:.2f} nats at first, {found.last_loss:.2f} after {found.steps} steps \
({found.seconds:.0f} s); on held-out text {found.held_out_before:.2f}, then {found.held_out_after:.2f}.
Gradients of one step against a single process: {_gradients(found)}.
"""
    )
    rows = [_row(f"{found.schedule}, measured", found.measured), _row(f"{found.schedule}, predicted", found.predicted)]
    rows += [_row(f"{name}, predicted", step) for name, step in found.rivals.items()]
    print_table(("", "step ms", "bubble %"), rows)
    for name, reason in found.without_prediction.items():
        print(f"{name} is left out: {reason}.")
    print(f"\n{_caveat(found)}\n\nIn {OUT}: schedule.svg and measured.svg (pictures), predicted.json and measured.json")
    print("(traces: open them at https://ui.perfetto.dev), costs.json, results.json.")


def _gradients(found: Results) -> str:
    if found.gradients["bitwise_equal"]:
        return "equal, bit for bit"
    return f"largest difference {found.gradients['largest_difference']:.1e}"


def _row(what: str, step: Step) -> tuple[str, str, str]:
    return what, f"{step.step_ms:.0f}", f"{step.bubble_percent:.1f}"


def _caveat(found: Results) -> str:
    """What the figures mean on this machine."""
    predicted = "Predictions come from each stage's durations as measured while it ran."
    overlap = "An F&B is its forward, then its backward, here: these stages have no blocks to interleave."
    if not found.parallel:
        machine = (
            "One GPU ran all ranks in turns, so the measured step is the work of all of them, one after the other; the "
            "predicted one is that of a GPU for each rank."
        )
    elif found.device == "cpu" and found.cores < found.num_ranks:
        machine = (
            f"{found.num_ranks} ranks share {found.cores} cores: an action takes longer when others run beside it, so "
            "a bubble is not lost here (another rank uses the core), and schedules differ less than they would with a "
            "device for each rank."
        )
    else:
        machine = "Every rank had a device, or a core, of its own."
    return f"{predicted} {machine} {overlap}"
