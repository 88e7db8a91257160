"""Balancing from the placement that serves: no more moves than it takes, none where none is needed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Placement, balance, plan_migration, rebalance_experts
from counterflow.errors import PlacementError
from counterflow.experts.moves import lower, redealt, spend
from experts.loads import loads, sizes

LOADS = np.random.default_rng(0).lognormal(0, 1, (6, 32))
LATER = LOADS * np.random.default_rng(1).lognormal(0, 0.2, LOADS.shape)
SIZES = (40, 8)
CURRENT = balance(LOADS, *SIZES)


def no_lower(even: np.ndarray, than: np.ndarray) -> bool:
    return bool((even >= than * (1 - 1e-9)).all())


@st.composite
def drifts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """Loads, those of the same model later, and replicas, GPUs, nodes, groups."""
    experts, replicas, groups, nodes, gpus = draw(sizes())
    before = draw(loads(experts))
    later = draw(
        st.sampled_from([before, before[:, ::-1].copy(), np.random.default_rng(0).lognormal(0, 1, before.shape)])
    )
    return before, later, (replicas, gpus, nodes, groups)


@given(drifts(), st.sampled_from(["auto", "none"]))
def test_no_layer_ends_below_the_published_nor_below_what_serves(
    drift: tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]], hierarchy: str
) -> None:
    before, later, (replicas, gpus, nodes, groups) = drift
    current = balance(before, replicas, gpus, nodes, groups, hierarchy)
    placement = balance(later, replicas, gpus, nodes, groups, hierarchy, current=current)
    by = (groups, nodes) if placement.hierarchy == "node" else (1, 1)
    published = Placement(rebalance_experts(later, replicas, *by, gpus)[0], later.shape[1], gpus)
    assert no_lower(placement.balancedness(later), published.balancedness(later))
    assert no_lower(placement.balancedness(later), current.balancedness(later))
    assert placement.hierarchy == current.hierarchy
    largest = placement.gpu_loads(later).max(axis=1)
    assert placement.certificate.max_load.tolist() == largest.tolist()
    assert (placement.certificate.max_load_bound <= largest).all()
    if placement.hierarchy == "node":
        node = placement.physical_to_logical.reshape(len(later), nodes, -1) // (later.shape[1] // groups)
        assert all(len({n for n in range(nodes) if g in row[n]}) == 1 for row in node for g in range(groups))


@given(drifts(), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 2**32 - 1))
def test_any_placement_will_do_to_start_from_and_where_it_ends_nothing_moves(
    drift: tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]], spill: float, seed: int
) -> None:
    _, later, (replicas, gpus, nodes, groups) = drift
    rng, (layers, experts) = np.random.default_rng(seed), later.shape
    rows = [rng.permutation([*range(experts), *rng.integers(0, experts, replicas - experts)]) for _ in range(layers)]
    current = Placement(np.array(rows), experts, gpus, nodes)
    spill = spill if nodes > 1 else 0.0
    placement = balance(later, replicas, gpus, nodes, groups, node_spill=spill, current=current)
    by = (groups, nodes) if nodes > 1 else (1, 1)
    published = Placement(rebalance_experts(later, replicas, *by, gpus)[0], experts, gpus)
    assert no_lower(placement.balancedness(later), published.balancedness(later))
    held = placement.physical_to_logical.reshape(layers, nodes, -1)
    assert nodes == 1 or all(sum(len(np.unique(node)) for node in row) == experts for row in held)
    again = balance(later, replicas, gpus, nodes, groups, node_spill=spill, current=placement)
    assert not plan_migration(placement, again).moves.any()


@given(drifts(), st.integers(0, 12))
def test_no_more_moves_than_allowed_and_no_layer_below_what_serves(
    drift: tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]], most: int
) -> None:
    before, later, sizes = drift
    current = balance(before, *sizes)
    placement = balance(later, *sizes, current=current, max_moves=most)
    assert plan_migration(current, placement).moves.sum() <= most
    assert no_lower(placement.balancedness(later), current.balancedness(later))


@given(drifts())
def test_what_is_balanced_stays_as_it_is(
    drift: tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]],
) -> None:
    _, later, sizes = drift
    current = balance(later, *sizes)
    assert np.array_equal(balance(later, *sizes, current=current).physical_to_logical, current.physical_to_logical)


def test_only_layers_below_the_published_change() -> None:
    later = LOADS.copy()
    later[2] = later[2, ::-1]
    placement = balance(later, *SIZES, current=CURRENT)
    assert plan_migration(CURRENT, placement).layers == (2,)


def test_a_drift_moves_a_fraction_of_what_a_fresh_placement_does() -> None:
    fresh = plan_migration(CURRENT, balance(LATER, *SIZES)).moves.sum()
    assert 0 < plan_migration(CURRENT, balance(LATER, *SIZES, current=CURRENT)).moves.sum() < fresh / 3


def test_more_moves_bring_more_and_all_that_are_needed_bring_all() -> None:
    needed = balance(LATER, *SIZES, current=CURRENT)
    most = int(plan_migration(CURRENT, needed).moves.sum())
    even = [
        balance(LATER, *SIZES, current=CURRENT, max_moves=moves).balancedness(LATER).mean()
        for moves in range(most + 20)
    ]
    assert even[0] == CURRENT.balancedness(LATER).mean()
    assert even[0] < even[most // 2] < even[-1] == needed.balancedness(LATER).mean()
    assert balance(LATER, *SIZES, current=CURRENT, max_moves=0).physical_to_logical.tolist() == (
        CURRENT.physical_to_logical.tolist()
    )


def test_the_same_input_gives_the_same_placement() -> None:
    slots = [balance(LATER, *SIZES, current=CURRENT, max_moves=9).physical_to_logical.tolist() for _ in range(2)]
    assert slots[0] == slots[1]


def test_a_layer_without_load_does_not_move() -> None:
    placement = balance(np.zeros_like(LOADS), *SIZES, current=CURRENT)
    assert np.array_equal(placement.physical_to_logical, CURRENT.physical_to_logical)


def test_groups_get_to_their_nodes_from_a_placement_that_knew_none() -> None:
    placement = balance(LATER, *SIZES, 2, 4, current=CURRENT)
    node = placement.physical_to_logical.reshape(6, 2, -1) // 8
    assert all(not {*row[0].tolist()} & {*row[1].tolist()} for row in node)
    with pytest.raises(PlacementError, match="layer 0 of the current placement does not keep its groups on nodes"):
        balance(LATER, *SIZES, 2, 4, current=CURRENT, max_moves=3)


def test_what_left_its_node_may_stay_away_within_the_share_allowed() -> None:
    spilled = balance(LOADS, *SIZES, 2, 4, node_spill=0.2)
    again = balance(LOADS, *SIZES, 2, 4, node_spill=0.2, current=spilled)
    assert np.array_equal(again.physical_to_logical, spilled.physical_to_logical)
    strict = balance(LOADS, *SIZES, 2, 4, current=spilled)
    node = strict.physical_to_logical.reshape(6, 2, -1) // 8
    assert all(not {*row[0].tolist()} & {*row[1].tolist()} for row in node)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"current": [[0, 1]]}, "current is a list; it has to be a Placement"),
        ({"current": balance(LOADS[:2], *SIZES)}, "has 2 layers of 32 experts and the loads 6 of 32"),
        ({"current": balance(LOADS, 48, 8)}, "has 48 slots on 8 GPUs and the new one 40 on 8: .* plan_migration"),
        ({"current": balance(LOADS, 40, 4)}, "has 40 slots on 4 GPUs and the new one 40 on 8"),
        ({"max_moves": 3}, "there is nothing to move from"),
        ({"current": CURRENT, "max_moves": -1}, "max_moves is -1; it has to be a whole number from 0"),
        ({"current": CURRENT, "max_moves": 2.5}, "max_moves is 2.5"),
        ({"current": CURRENT, "max_moves": True}, "max_moves is True"),
        ({"current": CURRENT, "max_moves": float("nan")}, "max_moves is nan"),
    ],
)
def test_what_it_cannot_start_from_is_refused_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlacementError, match=sentence) as error:
        balance(LATER, *SIZES, **options)
    assert "\n" not in str(error.value)


# --- the parts ----------------------------------------------------------------------------------------------


def test_every_change_is_told_with_its_moves_and_the_largest_load_after_it() -> None:
    slots = CURRENT.physical_to_logical
    paths = lower(LATER, slots, 8, 1, LATER.sum(axis=1) / 8)
    for length in range(int(paths.lengths.max()) + 1):
        lengths = np.minimum(length, paths.lengths)
        there = replace(CURRENT, physical_to_logical=paths.after(slots, lengths), certificate=None)
        peaks, moves = there.gpu_loads(LATER).max(axis=1), plan_migration(CURRENT, there).moves
        for layer in np.flatnonzero(lengths):
            assert peaks[layer] == pytest.approx(paths.peaks[layer, lengths[layer] - 1], rel=1e-12)
            assert moves[layer] <= paths.moves[layer, lengths[layer] - 1]
    assert (paths.lengths > 0).all()


def test_other_groups_come_to_the_nodes_and_what_stays_keeps_its_slots() -> None:
    old, new = (balance(load, *SIZES, 2, 4) for load in (LOADS, LATER[::-1]))
    slots = redealt(LATER, old.physical_to_logical, new.physical_to_logical, 8, 2).reshape(6, 2, -1)
    moved = 0
    for row, before, wanted in zip(
        slots, old.physical_to_logical.reshape(6, 2, -1), new.physical_to_logical.reshape(6, 2, -1), strict=True
    ):
        for node in range(2):
            assert {*row[node].tolist()} == {*wanted[node].tolist()}
            stays = np.isin(before[node], wanted[node])
            assert (row[node] == before[node])[stays].all()
            moved += int((~stays).sum())
    assert moved


def test_moves_are_spent_where_they_gain_most() -> None:
    moves, peaks = [[0, 2], [0, 1, 2], [0]], [[9.0, 5.0], [7.0, 6.5, 2.0], [4.0]]
    assert [spend(moves, peaks, most) for most in (0, 1, 2, 3, 4)] == [
        [0, 0, 0],
        [0, 1, 0],
        [0, 2, 0],
        [0, 2, 0],
        [1, 2, 0],
    ]
