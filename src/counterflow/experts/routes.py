"""What a placement costs the network between nodes, from recorded routes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterflow.errors import PlacementError
from counterflow.experts.loads import Ints, is_tensor
from counterflow.experts.placement import Placement

NO_EXPERT = -1
"""Where recorders write an expert's number and there was none: a layer without experts, or fewer than k of them."""


def node_copies(
    routes: NDArray[np.integer], placement: Placement, layer: int = 0, sources: NDArray[np.integer] | None = None
) -> Ints:
    """How many other nodes each token is sent to, int64 [tokens]; the sum is the token copies that cross nodes.

    ``routes`` [tokens, k] holds the logical experts of each token in ``layer``, and -1 where it chose none; ``sources``
    [tokens] the GPU that the token is on, by default in equal blocks over all GPUs. The replicas of an expert serve
    those who chose it in turn, first token first, as ``Placement.gpu_loads`` assumes. A token is sent once to each
    node, other than its own, that holds one of the replicas serving it, however many of them it holds.

    Raises:
        PlacementError: the routes or sources are no such arrays, or name an expert, layer or GPU that does not exist.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts import Placement, node_copies
        >>> placement = Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=4, num_nodes=2)
        >>> node_copies(np.array([[0, 1], [0, 2], [2, 3]]), placement, sources=np.array([0, 0, 0])).tolist()
        [0, 1, 1]
    """
    routes = as_routes(routes, placement.num_experts, ("tokens", "k"))
    layer = int(_indices("the layer", [layer], placement.num_layers, "layers", ("layer",))[0])
    return copies_in_layer(routes, placement, layer, as_sources(sources, len(routes), placement.num_gpus))


def copies_in_layer(routes: Ints, placement: Placement, layer: int, sources: Ints) -> Ints:
    """As ``node_copies``, of routes [tokens, k] and sources [tokens] that are known to be such."""
    tokens, nodes = len(routes), placement.num_nodes
    node_of_slot = np.arange(placement.num_slots) // (placement.num_slots // nodes)
    node = np.full(routes.shape, nodes)  # a node beyond the last one, for choices that are none
    chosen = routes != NO_EXPERT
    node[chosen] = node_of_slot[_serving_slots(routes[chosen], placement, layer)]
    sent = np.zeros((tokens, nodes + 1), dtype=bool)
    np.put_along_axis(sent, node, True, axis=1)
    sent[np.arange(tokens), sources // (placement.num_gpus // nodes)] = False
    return np.asarray(sent[:, :nodes].sum(axis=1), dtype=np.int64)


def as_routes(routes: object, num_experts: int, axes: tuple[str, ...] = ("tokens", "layers", "k")) -> Ints:
    """``routes`` as int64 with these axes: logical experts, and -1 where none was chosen.

    Raises:
        PlacementError: they are no such array, or name an expert that does not exist.
    """
    return _indices("the routes", routes, num_experts, "experts", axes, least=NO_EXPERT)


def as_sources(sources: object, tokens: int, num_gpus: int) -> Ints:
    """The GPU that each token is on, int64 [tokens]; where nobody knows, equal blocks over all GPUs.

    Raises:
        PlacementError: they are no such array, or name a GPU that does not exist.
    """
    if sources is None:
        return np.arange(tokens) * num_gpus // tokens
    known = _indices("the sources", sources, num_gpus, "GPUs", ("tokens",))
    if len(known) != tokens:
        raise PlacementError(f"there are {len(known)} sources for {tokens} tokens; give the GPU of each token")
    return known


def _serving_slots(chosen: Ints, placement: Placement, layer: int) -> Ints:
    """The slot that serves each choice [choices]: the n-th choice of an expert goes to its replica n modulo count."""
    order = np.argsort(chosen, kind="stable")
    first = np.searchsorted(chosen[order], np.arange(placement.num_experts))
    turn = np.empty_like(chosen)
    turn[order] = np.arange(len(chosen)) - first[chosen[order]]
    slots = placement.physical_to_logical[layer]
    by_expert = np.argsort(slots, kind="stable")
    start = np.searchsorted(slots[by_expert], np.arange(placement.num_experts))
    count = placement.logical_count[layer]
    return np.asarray(by_expert[start[chosen] + turn % count[chosen]])


def _indices(what: str, value: Any, end: int, of: str, axes: tuple[str, ...], least: int = 0) -> Ints:
    try:
        array = np.asarray(value.detach().cpu() if is_tensor(value) else value)
    except Exception as error:  # whatever it is: the caller is owed one sentence about it
        raise PlacementError(f"{what}, a {type(value).__name__}, are no array; give [{', '.join(axes)}]") from error
    if array.dtype.kind not in "iu" or array.ndim != len(axes) or array.size == 0:
        raise PlacementError(
            f"{what} have type {array.dtype} and shape {list(array.shape)}; give whole numbers, [{', '.join(axes)}]"
        )
    if array.min() < least or array.max() >= end:
        raise PlacementError(f"{what}: {of} go from 0 to {end - 1}, and {array.min()} to {array.max()} were given")
    return array.astype(np.int64)
