"""The better placement: every trap of the published one, bounds that hold, and input that is none."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Placement, balance, loops, rebalance_experts
from counterflow.errors import PlacementError
from counterflow.experts import replicas
from experts.loads import problems


def peaks(slots: np.ndarray, loads: np.ndarray, num_gpus: int) -> np.ndarray:
    """The largest GPU load of each layer, slot by slot."""
    result = []
    for row, load in zip(slots, loads, strict=True):
        share = load / np.maximum(np.bincount(row, minlength=len(load)), 1)
        result.append(share[row].reshape(num_gpus, -1).sum(axis=1).max())
    return np.array(result)


def copies_on_one_gpu(placement: Placement) -> list[tuple[int, int]]:
    """(layer, slot) wherever an earlier slot of the same GPU holds the same expert."""
    room = placement.num_slots // placement.num_gpus
    return [
        (layer, slot)
        for layer, row in enumerate(placement.physical_to_logical.tolist())
        for slot in range(len(row))
        if row[slot] in row[slot // room * room : slot]
    ]


# --- the traps of the published algorithm -------------------------------------------------------------------


def test_trap_a_layer_without_load_is_spread_evenly() -> None:
    placement = balance(np.zeros((1, 4)), 12, 2)
    assert placement.logical_count.tolist() == [[3, 3, 3, 3]]
    assert placement.balancedness(np.zeros((1, 4))).tolist() == [1.0]
    assert placement.certificate.max_load.tolist() == placement.certificate.max_load_bound.tolist() == [0.0]


def test_trap_copies_of_experts_with_equal_loads_lie_apart() -> None:
    loads = np.ones((1, 4))
    published = Placement(rebalance_experts(loads, 8, 1, 1, 4)[0], 4, 4)
    assert copies_on_one_gpu(published)
    assert copies_on_one_gpu(balance(loads, 8, 4)) == []


def test_trap_no_copies_share_a_gpu_where_that_can_be_avoided() -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (20, 64))
    published = Placement(rebalance_experts(loads, 80, 1, 1, 8)[0], 64, 8)
    assert copies_on_one_gpu(published)
    assert copies_on_one_gpu(balance(loads, 80, 8)) == []


def test_trap_a_hot_expert_gets_no_more_copies_than_gpus() -> None:
    loads = np.array([[1000.0, 1, 1, 1]])
    assert rebalance_experts(loads, 8, 1, 1, 2)[2].tolist() == [[5, 1, 1, 1]]
    assert balance(loads, 8, 2).logical_count.tolist() == [[2, 2, 2, 2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e39])
def test_trap_a_load_that_is_none_is_an_error(bad: float) -> None:
    with pytest.raises(PlacementError, match="expert 2 in layer 0"):
        balance([[1.0, 2.0, bad, 3.0]], 8, 2)


def test_trap_counts_beyond_2_to_the_24_are_told_apart() -> None:
    loads = np.array([[2.0**24, 2.0**24 + 1]])
    assert rebalance_experts(loads, 3, 1, 1, 3)[2].tolist() == [[2, 1]]
    assert balance(loads, 3, 3).logical_count.tolist() == [[1, 2]]


def test_trap_groups_that_do_not_divide_over_nodes_are_an_error_or_said() -> None:
    loads = np.ones((1, 6))
    with pytest.raises(PlacementError, match="3 groups do not divide over 2 nodes"):
        balance(loads, 8, 4, num_nodes=2, num_groups=3, hierarchy="node")
    assert balance(loads, 8, 4, num_nodes=2, num_groups=3).hierarchy == "none"
    assert balance(loads, 8, 4, num_nodes=2, num_groups=2).hierarchy == "node"


def test_trap_a_starved_node_is_named_as_the_limit() -> None:
    placement = balance([[90, 80, 70, 60, 1, 1, 1, 1]], 8, 4, num_nodes=2, num_groups=2)
    assert placement.certificate.limited_by == ("node groups",)
    assert placement.certificate.gap.tolist() == [0.0]


@pytest.mark.parametrize(
    "loads", [[], [[]], [[[1.0]]], "loads", None, [[1], [1, 2]], [["a"]], [[1j]], 3.0, {}, object()]
)
def test_trap_bad_shapes_and_types_are_one_sentence(loads: object) -> None:
    with pytest.raises(PlacementError) as caught:
        balance(loads, 4, 2)
    assert "\n" not in str(caught.value)


def test_trap_numpy_and_lists_and_tensors_give_the_same() -> None:
    rows = [[90, 132, 40, 61], [5, 4, 3, 2]]
    maps = [balance(make(rows), 6, 2).physical_to_logical.tolist() for make in (list, np.array, torch.tensor)]
    assert maps[0] == maps[1] == maps[2]


def test_trap_the_width_of_the_map_follows_from_the_sizes() -> None:
    even, hot = balance(np.ones((1, 4)), 8, 4), balance([[100, 1, 1, 1]], 8, 4)
    assert even.logical_to_physical.shape == hot.logical_to_physical.shape == (1, 4, 5)


def test_copies_share_a_gpu_where_that_lowers_the_largest_load_and_it_is_said() -> None:
    placement = balance([[4, 3, 1]], 4, 2)
    assert placement.certificate.max_load.tolist() == [4.0]
    assert list(placement.certificate.co_located) == copies_on_one_gpu(placement) != []


def test_copies_share_a_gpu_where_there_are_more_slots_than_gpus_for_them() -> None:
    placement = balance([[2, 1]], 12, 3)
    assert placement.logical_count.tolist() == [[6, 6]]
    assert len(placement.certificate.co_located) == 6
    assert placement.balancedness([[2, 1]]).tolist() == [1.0]


@pytest.mark.parametrize("sizes", [(9, 3), (9, 3, 1, 2), (14, 2), (20, 4, 2, 2)])
def test_gpus_with_room_for_more_than_every_expert_are_even_whatever_the_loads(sizes: tuple[int, ...]) -> None:
    loads = [[1, 1], [5, 3], [0, 7]]
    assert balance(loads, *sizes).certificate.gap.tolist() == pytest.approx([0, 0, 0], abs=1e-9)


# --- what holds for all of them -----------------------------------------------------------------------------


@given(problems(), st.sampled_from(["auto", "node", "none"]))
@settings(max_examples=200)
def test_no_layer_is_less_even_than_published_nor_below_its_bound(
    problem: tuple[np.ndarray, tuple[int, int, int, int]], hierarchy: str
) -> None:
    loads, (replicas, groups, nodes, gpus) = problem
    placement = balance(loads, replicas, gpus, nodes, groups, hierarchy)
    by_node = placement.hierarchy == "node"
    certificate = placement.certificate
    published, _, _ = rebalance_experts(loads, replicas, *((groups, nodes) if by_node else (1, 1)), gpus)
    ours = peaks(placement.physical_to_logical, loads, gpus)
    assert (ours <= peaks(published, loads, gpus) * (1 + 1e-9)).all()
    assert np.allclose(certificate.max_load, ours, rtol=1e-12)
    assert (certificate.max_load_bound <= ours * (1 + 1e-12)).all()
    assert (certificate.gap >= 0).all()
    assert list(certificate.co_located) == copies_on_one_gpu(placement)
    if by_node:
        node = np.arange(replicas) // (replicas // nodes)
        for row in placement.physical_to_logical:
            homes = [set(node[row // (loads.shape[1] // groups) == group]) for group in range(groups)]
            assert all(len(home) == 1 for home in homes)


def placements(num_experts: int, num_slots: int) -> list[tuple[int, ...]]:
    return [row for row in itertools.product(range(num_experts), repeat=num_slots) if len(set(row)) == num_experts]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=4), st.sampled_from([(4, 2), (6, 2), (6, 3), (4, 4)]))
@settings(max_examples=60)
def test_the_bound_is_below_the_optimum_and_we_are_near_it(values: list[int], sizes: tuple[int, int]) -> None:
    replicas, gpus = sizes
    loads = np.array([values], dtype=float)
    best = min(peaks(np.array([row]), loads, gpus)[0] for row in placements(len(values), replicas))
    certificate = balance(loads, replicas, gpus).certificate
    assert certificate.max_load_bound[0] <= best * (1 + 1e-12)
    assert best <= certificate.max_load[0] * (1 + 1e-12)
    assert certificate.max_load[0] <= best * 1.34


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4))
@settings(max_examples=40)
def test_the_bound_with_groups_is_below_the_optimum(values: list[int]) -> None:
    loads = np.array([values], dtype=float)
    best = min(
        peaks(np.array([row]), loads, 4)[0]
        for pairing in ([0, 1, 2, 3], [2, 3, 0, 1])
        for row in placements(4, 4)
        if set(row[:2]) == set(pairing[:2])
    )
    certificate = balance(loads, 4, 4, num_nodes=2, num_groups=2).certificate
    assert certificate.max_load_bound[0] <= best * (1 + 1e-12)
    assert certificate.max_load[0] == pytest.approx(best)


def test_the_best_pairing_of_groups_with_nodes_is_found() -> None:
    rng = np.random.default_rng(3)
    loads = rng.lognormal(0, 1, (5, 64))
    certificate = balance(loads, 96, 16, num_nodes=4, num_groups=8).certificate
    sums = loads.reshape(5, 8, 8).sum(axis=2)
    for layer in range(5):
        least = min(
            max(sums[layer, list(order[2 * node : 2 * node + 2])].sum() for node in range(4)) / 4
            for order in itertools.permutations(range(8))
        )
        assert certificate.max_load_bound[layer] >= least * (1 - 1e-12)
        if certificate.max_load[layer] <= least * 1.001:
            assert certificate.max_load_bound[layer] == pytest.approx(least)


def test_where_there_are_too_many_pairings_one_is_searched_for() -> None:
    loads = np.random.default_rng(1).lognormal(0, 1, (3, 64))
    placement = balance(loads, 96, 16, num_nodes=8, num_groups=32)
    assert (placement.certificate.max_load_bound <= placement.certificate.max_load).all()
    published, _, _ = rebalance_experts(loads, 96, 32, 8, 16)
    assert (placement.certificate.max_load <= peaks(published, loads, 16) * (1 + 1e-12)).all()


@pytest.mark.parametrize("sizes", [(64, 8), (64, 8, 2, 4), (40, 4)])
def test_the_same_input_gives_the_same_placement_compiled_or_not(sizes: tuple[int, ...]) -> None:
    loads = np.random.default_rng(5).lognormal(0, 1, (4, 40))
    placements = []
    for compiled_from in (0, 10**12, 10**12):
        with pytest.MonkeyPatch.context() as patch:
            for module in (loops, replicas):
                patch.setattr(module, "COMPILED_FROM", compiled_from)
            placements.append(balance(loads, *sizes).physical_to_logical.tolist())
    assert placements[0] == placements[1] == placements[2]


@pytest.mark.parametrize("factor", [2.0**-140, 2.0**100, 1000.0])
def test_loads_in_another_unit_are_placed_alike(factor: float) -> None:
    loads = np.random.default_rng(6).lognormal(0, 1, (2, 16))
    ours, theirs = (balance(load, 24, 4).balancedness(load) for load in (loads, loads * factor))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_lognormal_loads_come_within_a_thousandth_of_their_bound() -> None:
    loads = np.random.default_rng(7).lognormal(0, 1, (10, 256))
    for sizes in ((288, 32), (288, 32, 4, 8)):
        assert balance(loads, *sizes).certificate.gap.max() < 1e-3


def test_a_steep_popularity_is_even_on_128_gpus() -> None:
    rng = np.random.default_rng(8)
    loads = np.stack([rng.permutation(np.arange(1, 513.0) ** -1.2) for _ in range(3)])
    assert (balance(loads, 640, 128).balancedness(loads) > 0.99).all()


# --- load that leaves the node of its group -----------------------------------------------------------------


def least_spilled(row: np.ndarray, load: np.ndarray, groups: int, nodes: int) -> float:
    """The share of the load off the node of its group, for the homes that make it least."""
    node = np.arange(len(row)) // (len(row) // nodes)
    share = load / np.bincount(row, minlength=len(load))
    held = np.zeros((groups, nodes))
    np.add.at(held, (row // (len(load) // groups), node), share[row])
    each = groups // nodes
    return min(
        1 - sum(held[group, place // each] for place, group in enumerate(order)) / load.sum()
        for order in itertools.permutations(range(groups))
    )


@pytest.mark.parametrize("allowed", [0.02, 0.05, 0.2])
def test_no_more_load_leaves_its_node_than_allowed_and_it_helps(allowed: float) -> None:
    loads = np.random.default_rng(9).lognormal(0, 1, (4, 64))
    kept = balance(loads, 96, 16, num_nodes=2, num_groups=4)
    spilled = balance(loads, 96, 16, num_nodes=2, num_groups=4, node_spill=allowed)
    assert (spilled.balancedness(loads) >= kept.balancedness(loads) - 1e-12).all()
    assert spilled.balancedness(loads).mean() > kept.balancedness(loads).mean()
    assert (spilled.certificate.max_load_bound <= spilled.certificate.max_load).all()
    for row, load in zip(spilled.physical_to_logical, loads, strict=True):
        assert least_spilled(row, load, 4, 2) <= allowed + 1e-9


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "much", None])
def test_a_spill_that_is_no_share_is_one_sentence(share: Any) -> None:
    with pytest.raises(PlacementError, match="it has to be a share of the load, from 0 to 1"):
        balance(np.ones((1, 4)), 4, 4, 2, 2, node_spill=share)


def test_a_spill_without_groups_on_nodes_is_one_sentence() -> None:
    with pytest.raises(PlacementError, match="no groups are kept on nodes here"):
        balance(np.ones((1, 4)), 4, 4, node_spill=0.1)


# --- hostile input ------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.complex_numbers(),
    st.binary(max_size=2),
)
numbers = st.floats(0, 1e6) | st.integers(0, 2**70) | st.floats()
anything = st.one_of(
    scalars,
    st.lists(st.lists(numbers, max_size=6), max_size=4),
    st.lists(st.lists(scalars, min_size=2, max_size=2), max_size=4),
    st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=3)),
    st.dictionaries(scalars.filter(lambda key: key == key), scalars, max_size=2),
)
any_size = st.integers(-2, 12) | st.just(10**30) | scalars


@pytest.mark.parametrize(
    "odd",
    [
        {"num_gpus": torch.tensor(2, device="meta")},
        {"hierarchy": np.array(["node", "none"])},
        {"node_spill": torch.tensor(0.1, device="meta")},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_numbers_and_words_whose_own_methods_raise_are_one_sentence(odd: dict[str, Any]) -> None:
    with pytest.raises(PlacementError, match="; it has to be "):
        balance(np.ones((1, 4)), **({"num_replicas": 4, "num_gpus": 2, "num_nodes": 2, "num_groups": 2} | odd))


@given(anything, st.lists(any_size, min_size=4, max_size=4), st.sampled_from(["auto", "node", "none", "x", 3]))
@settings(max_examples=400)
def test_whatever_comes_is_a_valid_placement_or_one_sentence(loads: Any, sizes: list[Any], hierarchy: Any) -> None:
    replicas, gpus, nodes, groups = sizes
    for call in (
        lambda: balance(loads, replicas, gpus, nodes, groups, hierarchy).physical_to_logical,
        lambda: rebalance_experts(loads, replicas, groups, nodes, gpus)[0],
    ):
        sentence, slots = None, None
        try:
            slots = call()
        except PlacementError as error:
            sentence = str(error)
        if slots is None:
            assert "\n" not in sentence
        else:
            experts = np.atleast_2d(np.array(loads)).shape[1]
            assert slots.shape[1] == replicas
            assert all(set(row) == set(range(experts)) for row in slots.tolist())
