"""From one placement to another: no expert travels that need not, none is ever without a slot."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Placement, balance, plan_migration
from counterflow.errors import PlacementError
from counterflow.experts import MigrationPlan
from counterflow.experts.matching import best_pairing
from counterflow.experts.migration_reference import fewest_moves


@st.composite
def placements(draw: st.DrawFn, num_experts: int, num_gpus: int, num_nodes: int, room: int, layers: int) -> Placement:
    """Any placement of that size, and often one with several copies on one GPU."""
    slots = num_gpus * room
    more = st.lists(st.integers(0, num_experts - 1), min_size=slots - num_experts, max_size=slots - num_experts)
    rows = [draw(st.permutations([*range(num_experts), *draw(more)])) for _ in range(layers)]
    return Placement(rows, num_experts, num_gpus, num_nodes)


@st.composite
def pairs(draw: st.DrawFn, same_sizes: bool = True) -> tuple[Placement, Placement]:
    gpus, nodes = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (6, 3)]))
    room, layers = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    experts = draw(st.integers(1, gpus * room))
    old = draw(placements(experts, gpus, nodes, room, layers))
    if not same_sizes:
        more_nodes = draw(st.integers(0, 1))
        room = draw(st.integers(-(-experts // gpus), 5))
        gpus, nodes = gpus // nodes * (nodes + more_nodes), nodes + more_nodes
    return old, draw(placements(experts, gpus, nodes, room, layers))


def carried_out(plan: MigrationPlan, layer: int, most: int | None) -> list[list[int]]:
    """What every slot holds in the end; on the way, what is fetched is there, and every expert has a slot."""
    held = [list(row) for row in plan.held(layer)]
    experts = {expert for row in held for expert in row}
    room = plan.new.num_slots // plan.new.num_gpus
    for swap in plan.swaps(layer, most):
        come = [fetch.to_gpu for fetch in swap.fetches]
        assert most is None or max(map(come.count, come), default=0) <= most
        for fetch in swap.fetches:
            assert held[fetch.from_gpu][fetch.from_slot] == fetch.expert
        held = [(row + [-1] * room)[:room] for row in held]
        for fetch in swap.fetches:
            held[fetch.to_gpu][fetch.to_slot] = fetch.expert
        assert [list(row) for row in swap.held] == held
        assert {expert for row in held for expert in row} == experts
    return held


def rows_of(placement: Placement, layer: int) -> list[list[int]]:
    return placement.physical_to_logical[layer].reshape(placement.num_gpus, -1).tolist()


def moved(plan: MigrationPlan, layer: int, most: int | None) -> int:
    """The experts that travel from GPU to GPU: of one step once for each GPU, wherever it keeps them."""
    return sum(
        len({(f.expert, f.to_gpu) for f in swap.fetches if f.from_gpu != f.to_gpu}) for swap in plan.swaps(layer, most)
    )


@given(pairs())
def test_the_moves_are_the_fewest_of_all_exchanges_of_nodes_and_of_gpus_within_them(
    pair: tuple[Placement, Placement],
) -> None:
    plan = plan_migration(*pair)
    assert plan.moves.tolist() == fewest_moves(*pair)
    assert plan.share.tolist() == [moves / pair[1].num_slots for moves in plan.moves.tolist()]


@given(pairs(same_sizes=False))
def test_they_are_the_fewest_with_other_slots_or_gpus_as_well(pair: tuple[Placement, Placement]) -> None:
    plan = plan_migration(*pair)
    assert plan.moves.tolist() == fewest_moves(*pair)
    for layer in range(pair[0].num_layers):
        if layer in plan.layers:
            assert carried_out(plan, layer, None) == rows_of(plan.new, layer)
            assert moved(plan, layer, None) == plan.moves[layer]
        else:
            assert rows_of(plan.new, layer) == rows_of(pair[0], layer)


@given(pairs(), st.sampled_from([1, 2, None]))
def test_a_layer_gets_there_in_steps_of_any_size_without_an_expert_ever_missing(
    pair: tuple[Placement, Placement], most: int | None
) -> None:
    plan = plan_migration(*pair)
    for layer in range(pair[0].num_layers):
        assert carried_out(plan, layer, most) == rows_of(plan.new, layer)
        assert moved(plan, layer, most) == plan.moves[layer]
        assert bool(plan.swaps(layer, most)) == (layer in plan.layers)


@given(pairs())
def test_what_was_asked_for_comes_out_but_for_the_order_of_nodes_gpus_and_slots(
    pair: tuple[Placement, Placement],
) -> None:
    old, new = pair
    settled = plan_migration(old, new).new

    def contents(placement: Placement) -> list[object]:
        per_node = placement.num_gpus // placement.num_nodes
        layers = (rows_of(placement, layer) for layer in range(placement.num_layers))
        return [
            sorted(sorted(map(sorted, rows[at : at + per_node])) for at in range(0, len(rows), per_node))
            for rows in layers
        ]

    assert contents(settled) == contents(new)


@given(pairs())
def test_who_is_there_already_moves_nothing(pair: tuple[Placement, Placement]) -> None:
    old, new = pair
    plan = plan_migration(plan_migration(old, new).new, new)
    assert (plan.layers, plan.moves.sum()) == ((), 0)
    backwards = replace(old, physical_to_logical=old.physical_to_logical[:, ::-1])
    assert plan_migration(old, backwards).moves.sum() == 0


def test_only_a_layer_that_changes_is_touched() -> None:
    old = Placement([[0, 1, 2, 3], [0, 1, 2, 3]], 4, 2)
    plan = plan_migration(old, Placement([[0, 1, 2, 3], [0, 2, 1, 3]], 4, 2))
    assert (plan.layers, plan.moves.tolist(), plan.swaps(0)) == ((1,), [0, 2], ())


def test_a_copy_on_the_same_node_is_preferred_and_the_holders_take_turns() -> None:
    # Expert 0 is on GPUs 0 and 2, and comes to 1 and 3; nodes are {0, 1} and {2, 3}.
    old = Placement([[0, 1, 2, 1, 0, 3, 4, 3]], 5, 4, 2)
    new = Placement([[0, 1, 2, 0, 0, 3, 4, 0]], 5, 4, 2)
    fetches = plan_migration(old, new).swaps(0)[0].fetches
    assert [(f.expert, f.from_gpu, f.to_gpu) for f in fetches] == [(0, 0, 1), (0, 2, 3)]
    on_one_node = plan_migration(replace(old, num_nodes=1), replace(new, num_nodes=1)).swaps(0)[0].fetches
    assert sorted(f.from_gpu for f in on_one_node) == [0, 2]


def test_who_has_a_choice_makes_way_for_who_has_none() -> None:
    # Expert 0 is on GPUs 0 and 1, expert 1 on GPU 0 only, and both come to GPU 2.
    old = Placement([[0, 1, 3, 0, 2, 3, 3, 4, 4]], 5, 3)
    new = Placement([[0, 1, 3, 0, 2, 3, 4, 0, 1]], 5, 3)
    fetches = plan_migration(old, new).swaps(0)[0].fetches
    assert {f.expert: f.from_gpu for f in fetches} == {0: 1, 1: 0}


def test_a_second_copy_on_one_gpu_is_no_move() -> None:
    plan = plan_migration(Placement([[0, 1, 2, 1]], 3, 2), Placement([[0, 1, 2, 2]], 3, 2))
    assert plan.moves.tolist() == [0]
    assert [tuple(fetch) for fetch in plan.swaps(0)[0].fetches] == [(2, 1, 0, 1, 1)]


@given(pairs(), st.data())
def test_a_lost_gpu_sends_nothing_and_what_it_alone_held_is_never_forgotten(
    pair: tuple[Placement, Placement], data: st.DataObject
) -> None:
    old = replace(pair[0], num_nodes=1)
    lost = data.draw(st.integers(0, old.num_gpus - 1))
    held = [row for gpu, row in enumerate(rows_of(old, 0)) if gpu != lost]
    gpus = max(1, old.num_gpus - 1)
    room = data.draw(st.integers(-(-old.num_experts // gpus), 6 + old.num_experts))
    new = data.draw(placements(old.num_experts, gpus, 1, room, old.num_layers))
    gone = [
        set(range(old.num_experts)).difference(*(row for g, row in enumerate(rows_of(old, layer)) if g != lost))
        for layer in range(old.num_layers)
    ]
    if any(gone):
        layer = next(layer for layer, experts in enumerate(gone) if experts)
        with pytest.raises(PlacementError) as caught:
            plan_migration(old, new, lost_gpus=[lost])
        assert str(caught.value) == (
            f"expert {min(gone[layer])} of layer {layer} has no copy left, for all were on lost GPUs: "
            f"load it from a checkpoint and say so (reload_lost=True)"
        )
    plan = plan_migration(old, new, lost_gpus=[lost], reload_lost=True)
    if old.num_gpus > 1:
        assert [list(row) for row in plan.held(0)] == held
    assert plan.moves.tolist() == fewest_moves(old, new, [lost])
    for layer, experts in enumerate(gone):
        (swap,) = plan.swaps(layer)
        assert {fetch.expert for fetch in swap.fetches if fetch.from_gpu < 0} == experts
        assert [list(row) for row in swap.held] == rows_of(plan.new, layer)


def test_a_plan_for_other_sizes_says_how_much_has_to_fit() -> None:
    plan = plan_migration(Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 1, 2, 0, 2, 3]], 4, 2))
    assert len(plan.swaps(0, 1)) == 1
    plan = plan_migration(Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 1, 2, 3, 3, 2, 0, 1]], 4, 2))
    with pytest.raises(PlacementError, match=r"layer 0 has to bring 2 experts into GPU 0 at once, and 1 may come"):
        plan.swaps(0, 1)


@pytest.mark.parametrize(
    ("new", "lost", "words"),
    [
        (Placement([[0, 1, 2, 2]], 3, 2), (), "1 layers of 4 experts and the new one 1 of 3: give two"),
        (
            Placement([[0, 1, 2, 3]], 4, 2),
            (2,),
            "the lost GPU 2 is none of the old placement: give numbers from 0 to 1",
        ),
        (Placement([[0, 1, 2, 3]], 4, 2), ("x",), "the lost GPU 'x' is none of the old placement"),
        (Placement([[0, 1, 2, 3]], 4, 1), (), "has 2 GPUs left and the new one 1: say which 1 are gone"),
    ],
)
def test_what_does_not_fit_is_refused(new: Placement, lost: tuple[int, ...], words: str) -> None:
    with pytest.raises(PlacementError) as caught:
        plan_migration(Placement([[0, 1, 2, 3]], 4, 2), new, lost_gpus=lost)
    assert words in str(caught.value)


def test_a_plan_in_json_holds_what_is_needed_to_carry_it_out() -> None:
    old = Placement([[0, 1, 2, 3], [3, 1, 2, 0]], 4, 2)
    plan = plan_migration(old, Placement([[0, 2, 1, 3], [3, 1, 0, 2]], 4, 2))
    data = json.loads(plan.to_json())
    assert (data["format"], data["moves"], data["share"], data["old_gpus"]) == (1, [2, 0], [0.5, 0.0], [0, 1])
    slots = old.physical_to_logical.copy().reshape(2, 2, 2)
    for layer in data["layers"]:
        for fetch in layer["fetches"]:
            slots[layer["layer"], fetch["to_gpu"], fetch["to_slot"]] = fetch["expert"]
    assert slots.reshape(2, 4).tolist() == data["placement"]["physical_to_logical"]


def test_a_certificate_still_names_the_slots_with_a_second_copy() -> None:
    new = balance([[4.0, 3.0, 1.0]], num_replicas=4, num_gpus=2)
    assert new.certificate is not None
    assert new.certificate.co_located
    settled = plan_migration(Placement([[2, 1, 0, 1]], 3, 2), new).new
    assert settled.certificate is not None
    ((_, slot),) = settled.certificate.co_located
    row = rows_of(settled, 0)[slot // 2]
    assert row[0] == row[1]
    assert slot % 2 == 1


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_a_pairing_is_worth_as_much_as_any(rows: list[list[int]]) -> None:
    best = max(sum(rows[i][j] for i, j in enumerate(order)) for order in permutations(range(len(rows))))
    (columns,) = best_pairing(np.array([rows])).tolist()
    assert sorted(columns) == list(range(len(rows)))
    assert sum(rows[i][j] for i, j in enumerate(columns)) == best
