"""GPUs lost and added: every expert lives, no placement of those sizes takes fewer moves, and what is gone is named."""

from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Placement, balance, plan_migration
from counterflow.errors import PlacementError
from counterflow.experts import Resized, resize
from experts.test_migration import placements


def fewest_of_all(rows: list[list[int]], num_experts: int, num_gpus: int, room: int) -> int:
    """The fewest moves into any placement at all of one layer, slow and obvious; GPUs beyond ``rows`` are empty."""
    held = [set(row) for row in rows] + [set[int]()] * (num_gpus - len(rows))
    contents = [set(each) for each in combinations_with_replacement(range(num_experts), room)]
    return min(
        sum(len(new - old) for new, old in zip(choice, held, strict=True))
        for choice in product(contents, repeat=num_gpus)
        if len(set().union(*choice)) == num_experts
    )


def left_of(current: Placement, layer: int, lost: set[int]) -> list[list[int]]:
    rows = current.physical_to_logical[layer].reshape(current.num_gpus, -1).tolist()
    return [row for gpu, row in enumerate(rows) if gpu not in lost]


@st.composite
def changes(draw: st.DrawFn, most_gpus: int = 4, most_room: int = 3) -> tuple[Placement, set[int], int, int]:
    """A placement, the GPUs it loses, how many there are then, and their slots: enough for all experts."""
    gpus, room = draw(st.integers(1, most_gpus)), draw(st.integers(1, most_room))
    experts = draw(st.integers(1, gpus * room))
    current = draw(placements(experts, gpus, 1, room, draw(st.integers(1, 2))))
    lost = draw(st.sets(st.integers(0, gpus - 1), max_size=gpus - 1))
    then = draw(st.integers(gpus - len(lost), max(gpus - len(lost), most_gpus)))
    fewest = -(-experts // then)
    return current, lost, then, draw(st.integers(fewest, max(fewest, most_room)))


def is_whole(found: Resized, current: Placement, lost: set[int], room: int) -> None:
    """Everything that has to hold of a result, by other means than its own."""
    new = found.placement
    assert new.num_slots == new.num_gpus * room
    for layer in range(current.num_layers):
        assert set(new.physical_to_logical[layer].tolist()) == set(range(current.num_experts))
        left = {expert for row in left_of(current, layer, lost) for expert in row}
        gone = [expert for expert in range(current.num_experts) if expert not in left]
        assert [expert for at, expert in found.reload if at == layer] == gone
        fetched = [fetch for swap in found.plan.swaps(layer) for fetch in swap.fetches]
        assert {fetch.expert for fetch in fetched if fetch.from_gpu < 0} == set(gone)
    assert found.plan.moves.tolist() == found.fewest.tolist()


@settings(max_examples=60)
@given(changes(most_gpus=3, most_room=2), st.integers(0, 2**32 - 1))
def test_no_placement_of_those_sizes_takes_fewer_moves(change: tuple[Placement, set[int], int, int], seed: int) -> None:
    current, lost, gpus, room = change
    loads = np.random.default_rng(seed).integers(0, 9, (current.num_layers, current.num_experts))
    found = resize(current, loads, lost_gpus=lost, num_gpus=gpus, num_replicas=gpus * room)
    is_whole(found, current, lost, room)
    for layer in range(current.num_layers):
        rows = left_of(current, layer, lost)
        assert found.fewest[layer] == fewest_of_all(rows, current.num_experts, gpus, room)


@given(changes(most_gpus=6, most_room=5), st.integers(0, 2**32 - 1))
def test_the_fewest_are_what_nobody_holds_where_gpus_go_and_slots_stay(
    change: tuple[Placement, set[int], int, int], seed: int
) -> None:
    current, lost, gpus, room = change
    loads = np.random.default_rng(seed).lognormal(0, 1, (current.num_layers, current.num_experts))
    found = resize(current, loads, lost_gpus=lost, num_gpus=gpus, num_replicas=gpus * room)
    is_whole(found, current, lost, room)
    again = resize(current, loads, lost_gpus=sorted(lost), num_gpus=gpus, num_replicas=gpus * room)
    assert again.placement.physical_to_logical.tolist() == found.placement.physical_to_logical.tolist()
    if room >= current.num_slots // current.num_gpus:
        added = gpus - (current.num_gpus - len(lost))
        gone = np.bincount([layer for layer, _ in found.reload], minlength=current.num_layers)
        assert found.fewest.tolist() == np.maximum(gone, added).tolist()


def test_a_large_model_loses_two_gpus_and_moves_only_what_is_gone() -> None:
    loads = np.random.default_rng(3).lognormal(0, 1, (4, 256))
    current = balance(loads, 288, 32)
    found = resize(current, loads, lost_gpus=[3, 7])
    is_whole(found, current, {3, 7}, 9)
    assert found.fewest.tolist() == [sum(at == layer for at, _ in found.reload) for layer in range(4)]
    assert found.fewest.max() <= 18
    blind = resize(current, lost_gpus=[3, 7])
    assert found.placement.balancedness(loads).mean() > blind.placement.balancedness(loads).mean()


@settings(max_examples=40)
@given(changes(most_gpus=3, most_room=2), st.integers(0, 2**32 - 1))
def test_among_the_fewest_moves_it_is_never_half_as_uneven_again_as_the_most_even(
    change: tuple[Placement, set[int], int, int], seed: int
) -> None:
    current, lost, gpus, room = change
    loads = np.random.default_rng(seed).integers(1, 9, (current.num_layers, current.num_experts))
    found = resize(current, loads, lost_gpus=lost, num_gpus=gpus, num_replicas=gpus * room)
    if not lost and (gpus, gpus * room) == (current.num_gpus, current.num_slots):
        return  # stays as it is
    for layer in range(current.num_layers):
        held = [set(row) for row in left_of(current, layer, lost)]
        held += [set[int]()] * (gpus - len(held))
        contents = list(combinations_with_replacement(range(current.num_experts), room))
        best = min(
            Placement([sum(choice, ())], current.num_experts, gpus).gpu_loads(loads[layer]).max()
            for choice in product(contents, repeat=gpus)
            if len(set().union(*choice)) == current.num_experts
            and sum(len({*new} - old) for new, old in zip(choice, held, strict=True)) == found.fewest[layer]
        )
        assert found.placement.gpu_loads(loads)[layer].max() <= 1.5 * best


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    current = balance([[5, 3, 2, 1]], 6, 3)
    found = resize(current, [[1, 1, 1, 9]])
    assert found.placement.physical_to_logical.tolist() == current.physical_to_logical.tolist()
    assert (found.plan.layers, found.reload, found.fewest.tolist()) == ((), (), [0])


def test_groups_stay_on_their_nodes_where_all_nodes_lose_as_many_gpus() -> None:
    loads = np.random.default_rng(1).lognormal(0, 1, (3, 32))
    current = balance(loads, 48, 8, 2, 4)
    found = resize(current, loads, lost_gpus=[1, 6])
    assert (found.placement.num_nodes, found.placement.hierarchy) == (2, "node")
    for old, new in zip(current.physical_to_logical, found.placement.physical_to_logical, strict=True):
        homes = [{frozenset(node) for node in row.reshape(2, -1).tolist()} for row in (old, new)]
        assert homes[0] == homes[1]
    uneven = resize(current, loads, lost_gpus=[1, 2], num_replicas=48)
    assert (uneven.placement.num_nodes, uneven.placement.hierarchy) == (1, "none")
    whole = resize(current, loads, lost_gpus=[4, 5, 6, 7], num_replicas=32)
    assert (whole.placement.num_nodes, whole.placement.num_gpus) == (1, 4)
    is_whole(whole, current, {4, 5, 6, 7}, 8)


def test_from_there_balance_goes_on_with_as_many_moves_as_are_allowed() -> None:
    loads = np.random.default_rng(2).lognormal(0, 1, (3, 32))
    current = balance(loads, 48, 8)
    found = resize(current, loads, num_gpus=10)
    assert found.fewest.tolist() == [2, 2, 2]
    even = [found.placement.balancedness(loads).mean()]
    for most in (10, 40):
        further = balance(loads, 60, 10, current=found.placement, max_moves=most)
        assert plan_migration(current, further).moves.sum() <= found.fewest.sum() + most
        even.append(further.balancedness(loads).mean())
    assert even == sorted(even)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"lost_gpus": [0, 1]},
            "2 slots on 1 GPUs cannot hold 4 experts, and in layer 0 there would be none for 1, 3: "
            "give at least 4 replicas, or more GPUs",
        ),
        ({"lost_gpus": [0, 1, 2]}, "all 3 GPUs are lost: make a new placement, with balance"),
        ({"lost_gpus": [3]}, "the lost GPU 3 is none of the current placement: give numbers from 0 to 2"),
        ({"lost_gpus": ["1"]}, "the lost GPU '1' is none of the current placement: give numbers from 0 to 2"),
        ({"num_gpus": 2}, "3 GPUs are left and 2 are asked for: say which 1 more are lost"),
        ({"num_gpus": 4, "num_replicas": 6}, "6 replicas do not divide over 4 GPUs: give 8, or another multiple"),
        ({"loads": [1, 2]}, "the loads are for 1 layers and 2 experts, the placement for 1 and 4: give loads of the"),
    ],
)
def test_what_cannot_be_is_one_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(PlacementError) as caught:
        resize(Placement([[0, 1, 2, 3, 0, 2]], num_experts=4, num_gpus=3), **options)
    assert str(caught.value).startswith(sentence)
