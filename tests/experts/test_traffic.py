"""Token copies that cross nodes in every layer, for the ways to place the same experts."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Placement, balance, rebalance_experts
from counterflow.errors import PlacementError
from counterflow.experts import alternatives, copies_per_token, node_copies, route_loads

EXPERTS, GROUPS, NODES, GPUS, SLOTS = 32, 8, 4, 8, 40


def limited_routes(seed: int, tokens: int, layers: int = 2, k: int = 4, groups: int = 2) -> np.ndarray:
    """Top-k of random scores, but only out of the best ``groups`` of 8 groups, as a group-limited router does."""
    rng = np.random.default_rng(seed)
    score = rng.normal(0, 1, (1, layers, EXPERTS)) + rng.gumbel(0, 1, (tokens, layers, EXPERTS))
    by_group = score.reshape(tokens, layers, GROUPS, -1)
    best = by_group.max(axis=3)
    by_group[best < np.sort(best, axis=2)[:, :, -groups][:, :, None]] = -np.inf
    return np.argsort(-score, axis=2)[:, :, :k]


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.booleans())
def test_the_mean_is_that_of_each_layer_alone(seed: int, tokens: int, known: bool) -> None:
    rng = np.random.default_rng(seed)
    routes = rng.integers(0, 8, (tokens, 3, 2))
    placement = balance(rng.random((3, 8)), 12, 6, num_nodes=3)
    sources = rng.integers(0, 6, tokens) if known else None
    alone = [node_copies(routes[:, layer], placement, layer, sources).mean() for layer in range(3)]
    assert copies_per_token(routes, placement, sources).tolist() == alone


def test_where_none_was_chosen_nothing_is_sent() -> None:
    placement = Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=2, num_nodes=2)
    routes = np.array([[0, 3, -1], [2, -1, -1], [-1, -1, -1]])
    assert node_copies(routes, placement, sources=np.array([0, 1, 0])).tolist() == [1, 0, 0]
    assert copies_per_token(routes[:, None], placement, np.array([0, 1, 0])).tolist() == [0.5]


def test_a_layer_that_nothing_was_routed_in_has_no_figure() -> None:
    routes = np.array([[[-1, -1], [0, 1]]])
    copies = copies_per_token(routes, Placement([[0, 1]] * 2, 2, 2, 2))
    assert np.isnan(copies).tolist() == [True, False]


def test_a_token_of_few_groups_crosses_to_few_nodes_where_groups_stay_on_one() -> None:
    routes = limited_routes(0, 500)
    loads = route_loads(routes, EXPERTS)
    ways = alternatives(loads, SLOTS, GPUS, NODES, GROUPS)
    copies = {name: copies_per_token(routes, placement) for name, placement in ways.items()}
    for name in ("published", "hierarchical"):
        for layer in range(2):
            assert node_copies(routes[:, layer], ways[name], layer).max() <= 2  # two groups, so two nodes at most
    assert (copies["global"] > 1.3 * copies["hierarchical"]).all()
    assert (copies["spill"] < copies["global"]).all()


def test_the_ways_are_those_that_their_names_say() -> None:
    loads = np.random.default_rng(1).lognormal(0, 1, (2, EXPERTS))
    ways = alternatives(loads, SLOTS, GPUS, NODES, GROUPS, node_spill=0.1)
    assert list(ways) == ["published", "hierarchical", "global", "spill"]
    expected = {
        "hierarchical": balance(loads, SLOTS, GPUS, NODES, GROUPS),
        "global": balance(loads, SLOTS, GPUS, NODES, GROUPS, "none"),
        "spill": balance(loads, SLOTS, GPUS, NODES, GROUPS, node_spill=0.1),
    }
    for name, placement in expected.items():
        assert ways[name].physical_to_logical.tolist() == placement.physical_to_logical.tolist()
    published, _, _ = rebalance_experts(loads, SLOTS, GROUPS, NODES, GPUS)
    assert ways["published"].physical_to_logical.tolist() == published.tolist()
    even = {name: placement.balancedness(loads).mean() for name, placement in ways.items()}
    assert even["published"] <= even["hierarchical"] <= even["spill"] <= even["global"] + 1e-3


@pytest.mark.parametrize(("experts", "groups"), [(6, 3), (8, 6)])
def test_groups_that_do_not_divide_leave_two_ways(experts: int, groups: int) -> None:
    assert list(alternatives(np.ones((1, experts)), 8, 4, 2, groups)) == ["published", "global"]


@given(st.integers(0, 2**32 - 1))
def test_the_loads_of_routes_are_counted_layer_by_layer(seed: int) -> None:
    routes = np.random.default_rng(seed).integers(-1, 5, (7, 2, 3))
    loads = route_loads(routes, 6)
    for layer in range(2):
        for expert in range(6):
            assert loads[layer, expert] == (routes[:, layer] == expert).sum()


def test_tensors_are_routes_as_well() -> None:
    routes = torch.tensor([[[0, 1]], [[0, 3]]], dtype=torch.int16)
    placement = Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=2, num_nodes=2)
    assert copies_per_token(routes, placement).tolist() == copies_per_token(routes.numpy(), placement).tolist()


@pytest.mark.parametrize(
    ("routes", "sources", "sentence"),
    [
        ([[[0, 4]]], None, "the routes: experts go from 0 to 3, and 0 to 4 were given"),
        ([[[0, -2]]], None, "the routes: experts go from 0 to 3, and -2 to 0 were given"),
        ([[0, 1]], None, "the routes have type int64 and shape [1, 2]; give whole numbers, [tokens, layers, k]"),
        ([[[0, 1]] * 2], None, "the routes are of 2 layers and the placement of 1; give routes of the same model"),
        ([[[0, 1]]], [9], "the sources: GPUs go from 0 to 3, and 9 to 9 were given"),
    ],
)
def test_routes_that_do_not_fit_are_one_sentence(routes: Any, sources: Any, sentence: str) -> None:
    placement = Placement([[0, 1, 2, 3]], num_experts=4, num_gpus=4, num_nodes=2)
    with pytest.raises(PlacementError) as caught:
        copies_per_token(routes, placement, sources)
    assert str(caught.value) == sentence


def test_whatever_counts_as_a_whole_number_counts_as_the_groups_too() -> None:
    class Two:
        def __index__(self) -> int:
            return 2

    ways = alternatives(np.ones((1, 4)), 4, 4, 2, Two())  # type: ignore[arg-type]
    assert list(ways) == ["published", "hierarchical", "global", "spill"]
