"""The verb balance: where each expert goes, how much more even that is, and what keeps it from being more so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterflow.cli.options import Json
from counterflow.cli.output import about, counted, print_json, print_table, printable, writing
from counterflow.errors import PlacementError

if TYPE_CHECKING:
    from counterflow.experts import MigrationPlan, Placement
    from counterflow.experts.loads import Floats

_WORST = 5


def balance(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Recorded loads: .npy, .npz, .json, or SGLang's .pt.")],
    replicas: Annotated[int, typer.Option("--replicas", help="Physical experts of a layer, on all GPUs together.")],
    gpus: Annotated[int, typer.Option("--gpus", help="Number of GPUs.")],
    nodes: Annotated[int, typer.Option("--nodes", help="Number of nodes.")] = 1,
    groups: Annotated[int, typer.Option("--groups", help="Groups of experts that the router selects together.")] = 1,
    hierarchy: Annotated[
        str, typer.Option("--hierarchy", help="Keep each group on one node: auto, node or none.")
    ] = "auto",
    key: Annotated[str | None, typer.Option("--key", help="Which array of an .npz, or value of a .json.")] = None,
    current: Annotated[
        Path | None, typer.Option("--current", help="The placement that serves now: as much as can be stays put.")
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option("--max-moves", min=0, help="At most so many experts come to GPUs that lack them.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the placement, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Place the experts of every layer so that all GPUs have as much to do as each other.

    FILE holds what each expert had to do, [layers, experts], or [windows, layers, experts], which are added up. JSON
    may be nested lists, or as vLLM, SGLang or ADRS write it. Beside the result stand the experts in their own order
    (or the placement that serves now) and the published algorithm.

    With --current as little moves as makes every layer as even as the published algorithm would, or what --max-moves
    allows. Where GPUs or replicas are more or fewer than there, the best placement is laid beside it.

    \b
    Example:
      counterflow balance loads.npz --replicas 288 --gpus 32 --nodes 4 --groups 8 -o placement.json
    """
    import numpy as np

    from counterflow import experts

    load = _read(file, key)
    if max_moves is not None and current is None:
        raise PlacementError(f"--max-moves {max_moves} needs the placement that serves now; give it with --current")
    with about(file):
        placement = experts.balance(load, replicas, gpus, nodes, groups, hierarchy)
        sizes = (groups, nodes) if placement.hierarchy == "node" else (1, 1)
        slots, _, _ = experts.rebalance_experts(load, replicas, *sizes, gpus)
    published = experts.Placement(slots.astype(np.int64), placement.num_experts, gpus, nodes)
    before, plan = _in_order(placement), None
    if current is not None:
        before = experts.read_placement(current)
        with about(current):  # what is wrong with the loads and sizes themselves was said above, about their file
            if max_moves is not None or (before.num_slots, before.num_gpus) == (replicas, gpus):
                placement = experts.balance(
                    load, replicas, gpus, nodes, groups, hierarchy, current=before, max_moves=max_moves
                )
            plan = experts.plan_migration(before, placement)
            placement = plan.new
    if output is not None:
        with writing(output):
            experts.write_placement(output, placement)
    if as_json:
        print_json(_as_dict(load, before, published, placement, plan, output))
        return
    _print_layers(load, "in order" if plan is None else "current", before, published, placement)
    _print_summary(load, placement, groups, plan)
    if output is not None:
        print(f"wrote {printable(str(output))}")


def _read(file: Path, key: str | None) -> Floats:
    """The loads in ``file`` [layers, experts], all its windows together."""
    from counterflow.experts import read_loads
    from counterflow.experts.recordings import as_windows

    if file.suffix == ".pt":
        from counterflow.runtime.recorder import read_recorder

        if key is not None:
            raise PlacementError(f"--key {key} chooses from an .npz or a .json, and {file} is neither; leave it out")
        counts = read_recorder(file)
        with about(file):
            windows = as_windows(counts)
    else:
        windows = read_loads(file, key)
    if windows.shape[2] == 1:
        raise PlacementError(f"{file}: each layer has one expert, so there is nothing to balance; give at least two")
    total: Floats = windows.sum(axis=0)
    return total


def _in_order(like: Placement) -> Placement:
    """What a server starts with: expert after expert, and from the first one again in the slots that are left."""
    import numpy as np

    from counterflow.experts import Placement

    slots = np.tile(np.arange(like.num_slots) % like.num_experts, (like.num_layers, 1))
    return Placement(slots, like.num_experts, like.num_gpus, like.num_nodes)


def _as_dict(
    load: Floats,
    before: Placement,
    published: Placement,
    placement: Placement,
    plan: MigrationPlan | None,
    output: Path | None,
) -> dict[str, object]:
    certificate = placement.certificate
    assert certificate is not None
    return {
        "num_gpus": placement.num_gpus,
        "num_nodes": placement.num_nodes,
        "hierarchy": placement.hierarchy,
        "physical_to_logical": placement.physical_to_logical.tolist(),
        "logical_count": placement.logical_count.tolist(),
        "balancedness": placement.balancedness(load).tolist(),
        "balancedness_before": before.balancedness(load).tolist(),
        "balancedness_published": published.balancedness(load).tolist(),
        "max_load": certificate.max_load.tolist(),
        "max_load_bound": certificate.max_load_bound.tolist(),
        "limited_by": list(certificate.limited_by),
        "co_located": [list(slot) for slot in certificate.co_located],
        "moves": None if plan is None else int(plan.moves.sum()),
        "placement": None if output is None else str(output),
    }


# --- for people ---------------------------------------------------------------------------------------------


def _print_layers(load: Floats, name: str, before: Placement, published: Placement, placement: Placement) -> None:
    certificate = placement.certificate
    assert certificate is not None
    even = [each.balancedness(load) for each in (before, published, placement)]
    rows = [
        [
            str(layer),
            *(f"{column[layer]:.4f}" for column in even),
            f"{certificate.max_load[layer]:.6g}",
            f"{certificate.max_load_bound[layer]:.6g}",
            f"{certificate.gap[layer]:.2%}",
            certificate.limited_by[layer],
        ]
        for layer in range(placement.num_layers)
    ]
    rest = ["", "", f"{certificate.gap.mean():.2%}", ""]
    rows.append(["mean", *(f"{column.mean():.4f}" for column in even), *rest])
    rows.append(["worst", *(f"{column.min():.4f}" for column in even), "", "", f"{certificate.gap.max():.2%}", ""])
    print("Balancedness of every layer, mean GPU load over largest, and the largest load beside its bound:\n")
    print_table(["layer", name, "published", "balanced", "largest", "bound", "gap", "limited by"], rows)


def _print_summary(load: Floats, placement: Placement, groups: int, plan: MigrationPlan | None) -> None:
    certificate = placement.certificate
    assert certificate is not None
    even = placement.balancedness(load)
    worst = sorted(range(placement.num_layers), key=lambda layer: (even[layer], layer))[:_WORST]
    told = (f"{layer} ({even[layer]:.4f}, {_why(certificate.limited_by[layer])})" for layer in worst)
    print(f"\nThe worst layers: {', '.join(told)}.")
    limits = Counter(certificate.limited_by).most_common()
    told = (f"{_why(limit)} in {counted(layers, 'layer')}" for limit, layers in limits)
    print(f"What limits the layers: {', '.join(told)}.")
    if placement.hierarchy == "node":
        print(f"Each of the {groups} groups stays on one of the {placement.num_nodes} nodes.")
    if certificate.co_located:
        some = ", ".join(f"slot {slot} of layer {layer}" for layer, slot in certificate.co_located[:_WORST])
        more = len(certificate.co_located) - _WORST
        print(f"Beside a copy on its own GPU lies {some}{f', and {more} more' if more > 0 else ''}.")
    if plan is not None:
        slots = placement.num_layers * placement.num_slots
        moves = int(plan.moves.sum())
        print(f"Moves: {moves} experts come to GPUs that did not hold them, into {moves / slots:.1%} of {slots} slots.")


def _why(limit: str) -> str:
    return {"hot expert": "one hot expert", "node groups": "the node groups", "slots": "the slots"}.get(limit, limit)
