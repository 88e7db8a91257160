"""Token copies that cross nodes, counted from routes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Placement, balance
from counterflow.errors import PlacementError
from counterflow.experts import node_copies


def counted_token_by_token(routes: np.ndarray, placement: Placement, sources: np.ndarray) -> list[int]:
    gpus_per_node = placement.num_gpus // placement.num_nodes
    room = placement.num_slots // placement.num_gpus
    row = placement.physical_to_logical[0].tolist()
    turn = [0] * placement.num_experts
    copies = []
    for experts, source in zip(routes.tolist(), sources.tolist(), strict=True):
        nodes = set()
        for expert in experts:
            places = [slot for slot, held in enumerate(row) if held == expert]
            nodes.add(places[turn[expert] % len(places)] // room // gpus_per_node)
            turn[expert] += 1
        copies.append(len(nodes - {source // gpus_per_node}))
    return copies


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 4))
def test_the_count_is_what_a_walk_over_the_tokens_gives(seed: int, tokens: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    placement = balance(rng.random((1, 8)), 12, 6, num_nodes=3)
    routes, sources = rng.integers(0, 8, (tokens, k)), rng.integers(0, 6, tokens)
    assert node_copies(routes, placement, 0, sources).tolist() == counted_token_by_token(routes, placement, sources)


def test_groups_on_nodes_spare_the_network_what_groups_all_over_cost() -> None:
    rng = np.random.default_rng(1)
    group = rng.integers(0, 4, (2000, 1))
    routes = group * 16 + rng.integers(0, 16, (2000, 4))  # every token stays in one group
    loads = np.bincount(routes.ravel(), minlength=64).astype(float)[None]
    by_node = node_copies(routes, balance(loads, 80, 16, num_nodes=4, num_groups=4))
    anywhere = node_copies(routes, balance(loads, 80, 16, num_nodes=4, num_groups=4, hierarchy="none"))
    assert by_node.max() == 1
    assert anywhere.sum() > 2 * by_node.sum()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"routes": [[0, 4]]},
            "the routes: experts go from 0 to 3, and 0 to 4 were given",
        ),
        (
            {"routes": [0, 1]},
            "the routes have type int64 and shape [2]; give whole numbers, [tokens, k]",
        ),
        ({"layer": 1}, "the layer: layers go from 0 to 0, and 1 to 1 were given"),
        ({"sources": [4]}, "the sources: GPUs go from 0 to 3, and 4 to 4 were given"),
        ({"sources": [0, 1]}, "there are 2 sources for 1 tokens; give the GPU of each token"),
    ],
)
def test_routes_that_are_none_are_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    placement = Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=4, num_nodes=2)
    with pytest.raises(PlacementError) as caught:
        node_copies(**{"routes": [[0, 1]], "placement": placement} | arguments)
    assert str(caught.value) == sentence
