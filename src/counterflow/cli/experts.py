"""The verb balance: where each expert goes, how much more even that is, and what keeps it from being more so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterflow.cli.balanced import Balanced
from counterflow.cli.loads import load_routes, load_scenarios
from counterflow.cli.options import Json
from counterflow.cli.output import about, print_json, printable, writing
from counterflow.errors import PlacementError

if TYPE_CHECKING:
    from counterflow.experts import Placement
    from counterflow.experts.loads import Floats, Ints


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
    allows. Where GPUs or replicas are more or fewer than there, or there are several files, the best placement is
    laid beside it.

    On several nodes the ways to place the experts are compared by how many copies of each token cross nodes, where
    routes were recorded.

    \b
    Example:
      counterflow balance loads.npz --replicas 288 --gpus 32 --nodes 4 --groups 8 -o placement.json
    """
    from counterflow import experts

    _refuse_options(len(files), nodes, node_spill, routes, max_moves, current, output, kind)
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
    found = Balanced(load, _in_order(placement), _published(load, placement, groups), placement, None, scenarios)
    if current is not None:
        before = experts.read_served(current, gpus, nodes)
        with about(current):  # what is wrong with the loads and sizes themselves was said above, about their file
            if len(loads) == 1 and (max_moves is not None or (before.num_slots, before.num_gpus) == (replicas, gpus)):
                placement = experts.balance(load, *sizes, hierarchy, node_spill, before, max_moves)
            plan = experts.plan_migration(before, placement)
        found = replace(found, before=before, placement=plan.new, plan=plan)
    if nodes > 1:
        with about(routes or files[0]):
            found = _compared(found, chosen, groups, node_spill or experts.SPILL)
    if output is not None:
        with writing(output):
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
    if routes is not None and nodes == 1:
        raise PlacementError(
            f"--routes {routes} says what crosses nodes, and there is one; give --nodes, or leave it out"
        )


def _compared(found: Balanced, routes: Ints | None, groups: int, node_spill: float) -> Balanced:
    """The same with the ways to place its loads, and what crosses nodes in each of them where that is known."""
    from counterflow import experts

    like = found.placement
    ways = experts.alternatives(found.load, like.num_slots, like.num_gpus, like.num_nodes, groups, node_spill)
    if found.scenarios or found.plan is not None:  # else it is one of them
        ways["this one"] = like
    if routes is None:
        return replace(found, ways=ways, node_spill=node_spill)
    copies = {name: experts.copies_per_token(routes, way) for name, way in ways.items()}
    return replace(found, ways=ways, node_spill=node_spill, copies=copies, num_tokens=len(routes))


def _mixture(loads: dict[str, Floats]) -> Floats:
    """All scenarios together, each as a share of its own layers' load."""
    import numpy as np

    totals = (load.sum(axis=1, keepdims=True) for load in loads.values())
    shares = [load / np.where(total > 0, total, 1.0) for load, total in zip(loads.values(), totals, strict=True)]
    return np.asarray(np.sum(shares, axis=0))


def _in_order(like: Placement) -> Placement:
    """What a server starts with: expert after expert, and from the first one again in the slots that are left."""
    import numpy as np

    from counterflow.experts import Placement

    slots = np.tile(np.arange(like.num_slots) % like.num_experts, (like.num_layers, 1))
    return Placement(slots, like.num_experts, like.num_gpus, like.num_nodes)


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
