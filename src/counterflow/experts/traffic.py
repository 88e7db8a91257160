"""Token copies that cross nodes, layer by layer, beside how even a placement is: what each way to place pays for."""

from __future__ import annotations

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.balance import balance
from counterflow.experts.loads import Floats, as_loads
from counterflow.experts.placement import Placement, whole_number
from counterflow.experts.published import rebalance_experts
from counterflow.experts.routes import NO_EXPERT, as_routes, as_sources, copies_in_layer

SPILL = 0.05
"""The share of the load that leaves its home node where nobody says how much: enough to even out the nodes."""


def copies_per_token(routes: object, placement: Placement, sources: object = None) -> Floats:
    """How many other nodes a token is sent to on average, float64 [layers]; NaN for a layer that nothing was routed in.

    ``routes`` [tokens, layers, k] holds the logical experts of each token in each layer, and -1 where it chose none;
    ``sources`` [tokens] the GPU that each token is on, by default in equal blocks over all GPUs. How copies are
    counted, ``node_copies`` says; a token that chose no expert in a layer does not count there.

    Raises:
        PlacementError: as ``node_copies``, or the routes are of other layers than the placement.

    Example:
        >>> import numpy as np
        >>> from counterflow import Placement
        >>> from counterflow.experts import copies_per_token
        >>> routes = np.array([[[0, 1], [0, 2]], [[2, 3], [-1, -1]]])
        >>> placement = Placement([[0, 1, 2, 3]] * 2, num_experts=4, num_gpus=2, num_nodes=2)
        >>> copies_per_token(routes, placement).tolist()
        [0.0, 1.0]
    """
    chosen = as_routes(routes, placement.num_experts)
    if chosen.shape[1] != placement.num_layers:
        raise PlacementError(
            f"the routes are of {chosen.shape[1]} layers and the placement of {placement.num_layers}; "
            f"give routes of the same model"
        )
    source = as_sources(sources, len(chosen), placement.num_gpus)
    mean = np.full(placement.num_layers, np.nan)
    for layer in range(placement.num_layers):
        routed = (chosen[:, layer] != NO_EXPERT).any(axis=1)
        if routed.any():
            mean[layer] = copies_in_layer(chosen[routed, layer], placement, layer, source[routed]).mean()
    return mean


def route_loads(routes: object, num_experts: int) -> Floats:
    """The tokens that each expert got, float64 [layers, experts], of ``routes`` [tokens, layers, k].

    Raises:
        PlacementError: the routes are no such array, or name an expert that does not exist.

    Example:
        >>> from counterflow.experts import route_loads
        >>> route_loads([[[0, 1]], [[0, -1]]], num_experts=3).tolist()
        [[2.0, 1.0, 0.0]]
    """
    num_experts = whole_number("num_experts", num_experts)
    chosen = as_routes(routes, num_experts)
    counts = [np.bincount(layer[layer != NO_EXPERT], minlength=num_experts) for layer in chosen.swapaxes(0, 1)]
    return np.asarray(counts, dtype=np.float64)


def alternatives(
    loads: object, num_replicas: int, num_gpus: int, num_nodes: int, num_groups: int, node_spill: float = SPILL
) -> dict[str, Placement]:
    """The ways to place these ``loads`` [layers, experts], to be laid side by side.

    ``"published"`` is the published algorithm's; ``"hierarchical"`` keeps each group on one node, ``"spill"`` lets up
    to ``node_spill`` of the load leave it, and ``"global"`` disregards groups. Where experts do not divide into the
    groups, or groups over the nodes, there is no hierarchical and no spill.

    Raises:
        PlacementError: as ``balance``.

    Example:
        >>> from counterflow.experts import alternatives
        >>> ways = alternatives([[9, 1, 1, 1]], num_replicas=4, num_gpus=2, num_nodes=2, num_groups=2)
        >>> {name: float(placement.balancedness([[9, 1, 1, 1]])[0]) for name, placement in ways.items()}
        {'published': 0.6, 'hierarchical': 0.6, 'global': 0.6, 'spill': 0.6}
    """
    load = as_loads(loads)
    num_nodes, num_groups = whole_number("num_nodes", num_nodes), whole_number("num_groups", num_groups)
    everywhere = balance(load, num_replicas, num_gpus, num_nodes, num_groups, "none")
    divides = num_groups % num_nodes == 0 and load.shape[1] % num_groups == 0
    by_node = (num_groups, num_nodes) if divides else (1, 1)
    slots, _, _ = rebalance_experts(load, num_replicas, *by_node, num_gpus)
    published = Placement(slots.astype(np.int64), load.shape[1], num_gpus, num_nodes)
    if not divides:
        return {"published": published, "global": everywhere}
    at_home, spilt = (
        balance(load, num_replicas, num_gpus, num_nodes, num_groups, "node", share) for share in (0.0, node_spill)
    )
    return {"published": published, "hierarchical": at_home, "global": everywhere, "spill": spilt}
