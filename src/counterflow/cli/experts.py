"""The verb balance: where each expert goes, how much more even that is, and what keeps it from being more so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterflow.cli.balanced import Balanced
from counterflow.cli.loads import load_routes, load_scenarios
from counterflow.cli.options import Json
from counterflow.cli.output import about, counted, print_json, printable, writing
from counterflow.cli.pictures import plot_frontier
from counterflow.cli.ways import compare_ways
from counterflow.errors import PlacementError

if TYPE_CHECKING:
    from counterflow.experts import Placement
    from counterflow.experts.loads import Floats


def balance(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Recorded loads: .npy, .npz, .json, .safetensors, SGLang's .pt; one file for each kind of traffic.",
        ),
    ],
    replicas: Annotated[int, typer.Option("--replicas", help="Physical experts of a layer, on all GPUs together.")],
    gpus: Annotated[int, typer.Option("--gpus", help="Number of GPUs.")],
    nodes: Annotated[int, typer.Option("--nodes", help="Number of nodes.")] = 1,
    groups: Annotated[int, typer.Option("--groups", help="Groups of experts that the router selects together.")] = 1,
    hierarchy: Annotated[
        str, typer.Option("--hierarchy", help="Keep each group on one node: auto, node or none.")
    ] = "auto",
    node_spill: Annotated[
        float, typer.Option("--node-spill", help="Up to so much of the load, as a share, may leave its group's node.")
    ] = 0.0,
    key: Annotated[
        str | None, typer.Option("--key", help="Which array of an .npz or .safetensors, or value of a .json.")
    ] = None,
    routes: Annotated[
        Path | None,
        typer.Option("--routes", help="Recorded routes, [tokens, layers, k]  [default: those recorded with FILE]"),
    ] = None,
    current: Annotated[
        Path | None, typer.Option("--current", help="The placement that serves now: as much as can be stays put.")
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option("--max-moves", min=0, help="At most so many experts come to GPUs that lack them.")
    ] = None,
    lost_gpus: Annotated[
        str | None,
        typer.Option("--lost-gpus", help="GPUs of --current that are gone, as in 3,7; --gpus are the others."),
    ] = None,
    with_frontier: Annotated[
        bool, typer.Option("--frontier", help="Tell what each number of moves from --current would bring.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot the frontier: balancedness over moves, .svg or .png.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the placement, as JSON.")] = None,
    kind: Annotated[
        str | None,
        typer.Option("--format", help="Of what is written: counterflow, sglang or vllm  [default: counterflow]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Place the experts of every layer so that all GPUs have as much to do as each other.

    FILE holds what each expert had to do, [layers, experts], or [windows, layers, experts], which are added up. JSON
    may be nested lists, or as vLLM, SGLang or ADRS write it. A folder holds what the ranks of SGLang or TensorRT-LLM
    recorded. Beside the result stand the experts in their own order (or the placement that serves now) and the
    published algorithm.

    Several files are several kinds of traffic: one placement is made that suits each of them.

    With --current as little moves as makes every layer as even as the published algorithm would, or what --max-moves
    allows; where there are several files, the best placement is laid beside it. With --frontier there is a table of
    what growing numbers of moves bring, and --max-moves then chooses the point of it that is taken.

    Where GPUs were lost or added, or --replicas are others, first the fewest experts move that make all of them live
    on the GPUs there are now, and it goes on from there. SGLang's and vLLM's files do not say of how many GPUs they
    are: of --gpus and --lost-gpus together.

    On several nodes the ways to place the experts are compared by how many copies of each token cross nodes, where
    routes were recorded.

    \b
    Example:
      counterflow balance loads.npz --replicas 288 --gpus 32 --nodes 4 --groups 8 -o placement.json
      counterflow balance loads.npz --replicas 288 --gpus 32 --current placement.json --frontier
      counterflow balance loads.npz --replicas 270 --gpus 30 --current placement.json --lost-gpus 3,7
    """
    from counterflow import experts

    _refuse_options(len(files), nodes, node_spill, routes, max_moves, current, output, kind)
    lost = _refuse_change(len(files), current, lost_gpus, with_frontier, plot)
    loads = load_scenarios(files, key)
    chosen = load_routes(routes, files) if nodes > 1 else None
    sizes = (replicas, gpus, nodes, groups)
    if len(loads) > 1:
        placement = experts.balance_scenarios(loads, *sizes, hierarchy)
        load = _mixture(loads)
    else:
        (load,) = loads.values()
        with about(files[0]):
            placement = experts.balance(load, *sizes, hierarchy, node_spill)
    scenarios = loads if len(loads) > 1 else {}
    in_order = replace(experts.starting(len(load), load.shape[1], replicas, gpus), num_nodes=nodes)
    found = Balanced(load, in_order, _published(load, placement, groups), placement, None, scenarios)
    if current is not None:
        before = experts.read_served(current, gpus + len(lost), nodes)
        with about(current):  # what is wrong with the loads and sizes themselves was said above, about their file
            found = _from_current(found, before, lost, (groups, hierarchy, node_spill), max_moves, with_frontier)
    if nodes > 1:
        with about(routes or files[0]):
            this_one = bool(found.scenarios) or found.plan is not None  # else it is one of them
            ways = compare_ways(load, found.placement, groups, node_spill or experts.SPILL, chosen, this_one)
            found = replace(found, ways=ways)
    if plot is not None and found.frontier is not None:
        plot_frontier(plot, f"{printable(files[0].name)} on {counted(gpus, 'GPU')}", found.frontier)
    if output is not None:
        with writing(output, files):
            experts.write_served(output, found.placement, kind or "counterflow")
    if as_json:
        print_json(found.as_dict(output))
        return
    found.print_tables(groups)
    if output is not None:
        _print_written(output, found.placement, kind)


def _refuse_options(
    num_files: int,
    nodes: int,
    node_spill: float,
    routes: Path | None,
    max_moves: int | None,
    current: Path | None,
    output: Path | None,
    kind: str | None,
) -> None:
    if num_files > 1 and (node_spill or max_moves is not None):
        option = f"--node-spill {node_spill:g}" if node_spill else f"--max-moves {max_moves}"
        raise PlacementError(f"{option} is for one file, and {num_files} were given; leave it out, or give one")
    if max_moves is not None and current is None:
        raise PlacementError(f"--max-moves {max_moves} needs the placement that serves now; give it with --current")
    if kind is not None and output is None:
        raise PlacementError(f"--format {kind} says how to write the placement; give the file with -o")
    if kind == "sglang" and output is not None and output.suffix != ".json":
        raise PlacementError(f"{output} ends in {output.suffix!r}, and SGLang reads a .json; give one")
    if routes is not None and nodes == 1:
        raise PlacementError(
            f"--routes {routes} says what crosses nodes, and there is one; give --nodes, or leave it out"
        )


def _refuse_change(
    num_files: int, current: Path | None, lost_gpus: str | None, with_frontier: bool, plot: Path | None
) -> tuple[int, ...]:
    """The lost GPUs."""
    if current is None and (lost_gpus is not None or with_frontier):
        option = "--frontier" if with_frontier else f"--lost-gpus {lost_gpus}"
        raise PlacementError(f"{option} needs the placement that serves now; give it with --current")
    if with_frontier and num_files > 1:
        raise PlacementError(f"--frontier is for one file, and {num_files} were given; leave it out, or give one")
    if plot is not None and not with_frontier:
        raise PlacementError(f"--plot {plot} plots the frontier; give --frontier as well, or leave it out")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise PlacementError(f"{plot} ends in {plot.suffix!r}; a picture is drawn as .svg or .png")
    numbers = [] if lost_gpus is None else [part.strip() for part in lost_gpus.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in numbers):
        raise PlacementError(f"--lost-gpus is {lost_gpus!r}; give the numbers of GPUs, as in 3,7")
    return tuple(sorted({int(part) for part in numbers}))


def _from_current(
    found: Balanced,
    before: Placement,
    lost: tuple[int, ...],
    how: tuple[int, str, float],
    max_moves: int | None,
    with_frontier: bool,
) -> Balanced:
    """The same from the placement that serves now: first what has to move, then what is worth it."""
    from counterflow import experts

    like, load = found.placement, found.load
    left = before.num_gpus - len({*lost} & {*range(before.num_gpus)})
    if left > like.num_gpus:
        raise PlacementError(
            f"it has {left} GPUs left and --gpus says {like.num_gpus}; name those that are gone with --lost-gpus"
        )
    start, resized = before, None
    if lost or (before.num_slots, before.num_gpus) != (like.num_slots, like.num_gpus):
        resized = experts.resize(
            before,
            load,
            lost_gpus=lost,
            num_gpus=like.num_gpus,
            num_replicas=like.num_slots,
            num_nodes=like.num_nodes,
        )
        start = resized.placement
    must = 0 if resized is None else int(resized.fewest.sum())
    if max_moves is not None and max_moves < must:
        raise PlacementError(
            f"before all experts are live on {like.num_gpus} GPUs with {like.num_slots} slots {must} of them have to "
            f"move, and --max-moves allows {max_moves}; allow {must} or more"
        )
    more = None if max_moves is None else max_moves - must
    frontier = experts.move_frontier(load, replace(start, num_nodes=like.num_nodes), *how) if with_frontier else None
    placement = like
    if frontier is not None and more is not None:
        placement = frontier.placement(frontier.at(more))
    elif not found.scenarios:
        sizes = (like.num_slots, like.num_gpus, like.num_nodes)
        placement = experts.balance(load, *sizes, *how, start, more)
    plan = experts.plan_migration(before, placement, lost_gpus=lost, reload_lost=True)
    return replace(
        found, before=before, placement=plan.new, plan=plan, resized=resized, lost_gpus=lost, frontier=frontier
    )


def _mixture(loads: dict[str, Floats]) -> Floats:
    """All scenarios together, each as a share of its own layers' load."""
    import numpy as np

    totals = (load.sum(axis=1, keepdims=True) for load in loads.values())
    shares = [load / np.where(total > 0, total, 1.0) for load, total in zip(loads.values(), totals, strict=True)]
    return np.asarray(np.sum(shares, axis=0))


def _published(load: Floats, like: Placement, groups: int) -> Placement:
    """The published algorithm's, with groups on nodes where ``like`` has them there."""
    import numpy as np

    from counterflow import experts

    sizes = (groups, like.num_nodes) if like.hierarchy == "node" else (1, 1)
    slots, _, _ = experts.rebalance_experts(load, like.num_slots, *sizes, like.num_gpus)
    return experts.Placement(slots.astype(np.int64), like.num_experts, like.num_gpus, like.num_nodes)


def _print_written(output: Path, placement: Placement, kind: str | None) -> None:
    print(f"wrote {printable(str(output))}")
    if kind == "sglang":
        redundant = placement.num_slots - placement.num_experts
        print(
            f"start SGLang with --init-expert-location {printable(str(output))} --ep-num-redundant-experts {redundant}"
        )
