"""The verb replay: what each policy of rebalancing would have been worth on recorded steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterflow.cli.loads import load_routes
from counterflow.cli.options import Json
from counterflow.cli.output import about, counted, print_json, printable
from counterflow.cli.pictures import draw_heatmap, plot_time
from counterflow.cli.recording import Recording, read_windows, replaying, settings_of
from counterflow.cli.redundancy import report_sweep
from counterflow.cli.replayed import Crossing, print_replay, replay_as_dict
from counterflow.cli.ways import compare_ways, mean_copies
from counterflow.errors import PlacementError

if TYPE_CHECKING:
    from counterflow.experts import Replay


SLOT_COST = 0.01


class Policy(StrEnum):
    """When to place the experts anew, and how."""

    NONE = "none"
    PUBLISHED = "published"
    BALANCE = "balance"
    CURRENT = "current"
    HINDSIGHT = "hindsight"
    ORACLE = "oracle"


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Recorded loads, [steps, layers, experts].")],
    gpus: Annotated[int, typer.Option("--gpus", help="Number of GPUs.")],
    replicas: Annotated[
        int | None, typer.Option("--replicas", help="Physical experts of a layer, on all GPUs together.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Number of nodes.")] = 1,
    groups: Annotated[int, typer.Option("--groups", help="Groups of experts that the router selects together.")] = 1,
    key: Annotated[str | None, typer.Option("--key", help="Which array of an .npz, or value of a .json.")] = None,
    routes: Annotated[
        Path | None,
        typer.Option("--routes", help="Recorded routes, [tokens, layers, k]  [default: those recorded with FILE]"),
    ] = None,
    policy: Annotated[
        list[Policy] | None, typer.Option("--policy", help="A policy to compare; may be given again  [default: all]")
    ] = None,
    window_size: Annotated[
        int | None,
        typer.Option("--window-size", help="Steps that a placement is made for  [default: the interval, at most 1000]"),
    ] = None,
    step_interval: Annotated[
        int | None,
        typer.Option("--step-interval", help="Steps between rebalances  [default: an eighth of them, at most 3000]"),
    ] = None,
    decay: Annotated[
        float | None, typer.Option("--decay", help="Instead of a window, weigh each step so much less than the next.")
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option("--max-moves", min=0, help="What a rebalance of policy current may move at most.")
    ] = None,
    skip_above: Annotated[
        float, typer.Option("--skip-above", help="No rebalance while the placement is at least so balanced.")
    ] = 1.0,
    expert_bytes: Annotated[
        float | None, typer.Option("--expert-bytes", help="Weights of one expert in one layer, for bytes and stalls.")
    ] = None,
    gb_per_s: Annotated[float | None, typer.Option("--gb-per-s", help="What one GPU receives, for the stalls.")] = None,
    sweep_replicas: Annotated[
        int | None,
        typer.Option("--sweep-replicas", help="Try every number of replicas up to this one: how many pay?"),
    ] = None,
    slot_cost: Annotated[
        float | None,
        typer.Option(
            "--slot-cost",
            min=0.0,
            max=0.99,
            help="Share of the throughput that one slot's memory, on every GPU, costs  [default: 0.01]",
        ),
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Draw the load of GPU x layer before and after: .svg or .png.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot the balancedness over time, or over replicas: .svg or .png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve recorded steps again, and see what each policy of rebalancing would have been worth.

    \b
    none       the placement that a server starts with, kept
    published  the published algorithm at every interval, its GPUs as they come
    balance    ours at every interval, its GPUs exchanged for the fewest moves
    current    ours from the placement that serves, with few moves
    hindsight  as balance, but for the very steps that it is going to serve
    oracle     ours for every single step, and moves for nothing

    The last two know the future, and are there to show what a better prediction could gain. No other policy knows a
    step before it is served. With --sweep-replicas one policy is tried with more and more redundant experts.

    On several nodes it is told how many copies of each token cross nodes, where routes were recorded: under the last
    placement of each policy, and under those that are made for all steps together in different ways.

    \b
    Example:
      counterflow replay loads.npz --gpus 16 --replicas 80 --step-interval 8 --heatmap loads.svg
      counterflow replay loads.npz --gpus 16 --replicas 80 --expert-bytes 17e6 --gb-per-s 50
      counterflow replay loads.npz --gpus 16 --sweep-replicas 128
    """
    _refuse_options(replicas, sweep_replicas, policy, heatmap, plot, expert_bytes, gb_per_s)
    _refuse_unused(sweep_replicas, slot_cost, policy, max_moves, window_size, decay)
    _refuse_routes(routes, nodes, sweep_replicas)
    windows = read_windows(file, key)
    settings = settings_of(file, len(windows), window_size, step_interval, decay, max_moves, skip_above)
    bytes_per_s = None if gb_per_s is None else gb_per_s * 1e9
    chosen = load_routes(routes, [file]) if nodes > 1 and replicas is not None else None
    recording = Recording(file, windows, gpus, nodes, groups, settings, expert_bytes, bytes_per_s, chosen)
    if replicas is None:
        assert sweep_replicas is not None
        report_sweep(
            recording,
            (policy or [Policy.BALANCE])[0].value,
            sweep_replicas,
            SLOT_COST if slot_cost is None else slot_cost,
            plot,
            as_json,
        )
        return
    served = _served(recording, replicas, policy or list(Policy))
    with about(routes or file):
        crossing = _crossing(recording, served) if nodes > 1 else None
    title = f"{recording.title}, {counted(replicas, 'replica')}"
    if heatmap is not None:
        draw_heatmap(heatmap, title, served[0], _after(served))
    if plot is not None:
        plot_time(plot, title, served)
    if as_json:
        print_json(replay_as_dict(recording, replicas, served, crossing, heatmap, plot))
        return
    print_replay(recording, replicas, served, crossing)
    for path in (heatmap, plot):
        if path is not None:
            print(f"wrote {printable(str(path))}")


def _refuse_options(
    replicas: int | None,
    sweep_replicas: int | None,
    policy: list[Policy] | None,
    heatmap: Path | None,
    plot: Path | None,
    expert_bytes: float | None,
    gb_per_s: float | None,
) -> None:
    if (replicas is None) == (sweep_replicas is None):
        raise PlacementError("replay needs either --replicas or --sweep-replicas; give one of them")
    if sweep_replicas is not None and (heatmap is not None or gb_per_s is not None or len(policy or ()) > 1):
        raise PlacementError(
            "a sweep over replicas is of one --policy, and has no --heatmap and no --gb-per-s; leave the others out"
        )
    for path in (heatmap, plot):
        if path is not None and path.suffix not in (".svg", ".png"):
            raise PlacementError(f"{path} ends in {path.suffix!r}; a picture is drawn as .svg or .png")
    if heatmap is not None and heatmap == plot:
        raise PlacementError(f"--heatmap and --plot both name {plot}, which can hold one picture; give two files")
    if gb_per_s is not None and expert_bytes is None:
        raise PlacementError(f"--gb-per-s {gb_per_s:g} needs to know how much moves; give --expert-bytes as well")
    for name, value in (("--expert-bytes", expert_bytes), ("--gb-per-s", gb_per_s)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise PlacementError(f"{name} is {value:g}; it has to be a finite number above 0")


def _refuse_unused(
    sweep_replicas: int | None,
    slot_cost: float | None,
    policy: list[Policy] | None,
    max_moves: int | None,
    window_size: int | None,
    decay: float | None,
) -> None:
    if slot_cost is not None and sweep_replicas is None:
        raise PlacementError(f"--slot-cost {slot_cost:g} is for --sweep-replicas; leave it out, or give that")
    if max_moves is not None and Policy.CURRENT not in (policy or list(Policy)):
        raise PlacementError(
            f"--max-moves {max_moves} is for the policy current; leave it out, or give --policy current"
        )
    if window_size is not None and decay is not None:
        raise PlacementError(
            f"--window-size {window_size} and --decay {decay:g} are two ways to forget; give one of them"
        )


def _refuse_routes(routes: Path | None, nodes: int, sweep_replicas: int | None) -> None:
    if routes is not None and sweep_replicas is not None:
        raise PlacementError(f"--routes {routes} is for the policies side by side, not for a sweep; leave it out")
    if routes is not None and nodes == 1:
        raise PlacementError(
            f"--routes {routes} says what crosses nodes, and there is one; give --nodes, or leave it out"
        )


def _crossing(recording: Recording, served: Sequence[Replay]) -> Crossing:
    from counterflow.experts import SPILL, copies_per_token

    routes, last = recording.routes, [each.last for each in served]
    copies = [None if routes is None else mean_copies(copies_per_token(routes, placement)) for placement in last]
    loads = recording.windows.sum(axis=0, dtype="float64")
    return Crossing(copies, compare_ways(loads, last[0], recording.num_groups, SPILL, routes, False))


def _served(recording: Recording, replicas: int, policies: Sequence[Policy]) -> list[Replay]:
    """The start kept, and beside it what was asked for."""
    from counterflow.experts import replay as serve

    _compile()
    names = list(dict.fromkeys([Policy.NONE.value, *(policy.value for policy in policies)]))
    sizes = replicas, recording.num_gpus, recording.num_nodes, recording.num_groups
    with about(recording.file), replaying(len(names)) as part:
        return [
            serve(recording.windows, name, *sizes, recording.settings, part(index)) for index, name in enumerate(names)
        ]


@cache
def _compile() -> None:
    """Have most loops that decide compiled, on a problem that is large enough: a server does that once, too."""
    import numpy as np

    from counterflow.experts import balance

    balance(np.random.default_rng(0).lognormal(0, 1, (100, 512)), 544, 32)


def _after(served: Sequence[Replay]) -> Replay:
    """The last one that does not know the future, if any was asked for."""
    from counterflow.experts.replay import FORESEEING

    return ([each for each in served[1:] if each.policy not in FORESEEING] or served)[-1]
