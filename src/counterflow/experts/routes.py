"""What a placement costs the network between nodes, from recorded routes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterflow.errors import PlacementError
from counterflow.experts.loads import Ints
from counterflow.experts.placement import Placement


def node_copies(
    routes: NDArray[np.integer], placement: Placement, layer: int = 0, sources: NDArray[np.integer] | None = None
) -> Ints:
    """How many other nodes each token is sent to, int64 [tokens]; the sum is the token copies that cross nodes.

    ``routes`` [tokens, k] holds the logical experts of each token in ``layer``; ``sources`` [tokens] the GPU that the
    token is on, by default in equal blocks over all GPUs. The replicas of an expert serve those who chose it in turn,
    first token first, as ``Placement.gpu_loads`` assumes. A token is sent once to each node, other than its own, that
    holds one of the replicas serving it, however many of them it holds.

    Raises:
        PlacementError: the routes or sources are no such arrays, or name an expert, layer or GPU that does not exist.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts import Placement, node_copies
        >>> placement = Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=4, num_nodes=2)
        >>> node_copies(np.array([[0, 1], [0, 2], [2, 3]]), placement, sources=np.array([0, 0, 0])).tolist()
        [0, 1, 1]
    """
    routes = _indices("the routes", routes, placement.num_experts, "experts", ("tokens", "k"))
    layer = int(_indices("the layer", [layer], placement.num_layers, "layers", ("layer",))[0])
    tokens, gpus = len(routes), placement.num_gpus
    if sources is None:
        sources = np.arange(tokens) * gpus // tokens
    sources = _indices("the sources", sources, gpus, "GPUs", ("tokens",))
    if len(sources) != tokens:
        raise PlacementError(f"there are {len(sources)} sources for {tokens} tokens; give the GPU of each token")
    node_of_slot = np.arange(placement.num_slots) // (placement.num_slots // placement.num_nodes)
    node = node_of_slot[_serving_slots(routes, placement, layer)]
    sent = np.zeros((tokens, placement.num_nodes), dtype=bool)
    np.put_along_axis(sent, node, True, axis=1)
    sent[np.arange(tokens), sources // (gpus // placement.num_nodes)] = False
    return np.asarray(sent.sum(axis=1), dtype=np.int64)


def _serving_slots(routes: Ints, placement: Placement, layer: int) -> Ints:
    """The slot that serves each choice [tokens, k]: the n-th choice of an expert goes to its replica n modulo count."""
    chosen = routes.ravel()
    order = np.argsort(chosen, kind="stable")
    first = np.searchsorted(chosen[order], np.arange(placement.num_experts))
    turn = np.empty_like(chosen)
    turn[order] = np.arange(len(chosen)) - first[chosen[order]]
    slots = placement.physical_to_logical[layer]
    by_expert = np.argsort(slots, kind="stable")
    start = np.searchsorted(slots[by_expert], np.arange(placement.num_experts))
    count = placement.logical_count[layer]
    return np.asarray(by_expert[start[chosen] + turn % count[chosen]].reshape(routes.shape))


def _indices(what: str, value: object, end: int, of: str, axes: tuple[str, ...]) -> Ints:
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever it is: the caller is owed one sentence about it
        raise PlacementError(f"{what}, a {type(value).__name__}, are no array; give [{', '.join(axes)}]") from error
    if array.dtype.kind not in "iu" or array.ndim != len(axes) or array.size == 0:
        raise PlacementError(
            f"{what} have type {array.dtype} and shape {list(array.shape)}; give whole numbers, [{', '.join(axes)}]"
        )
    if array.min() < 0 or array.max() >= end:
        raise PlacementError(f"{what}: {of} go from 0 to {end - 1}, and {array.min()} to {array.max()} were given")
    return array.astype(np.int64)
