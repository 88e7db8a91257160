"""The frontier of moves: every point can be had, none is less balanced than one before, the last as even as balance."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Placement, balance, plan_migration
from counterflow.errors import PlacementError
from counterflow.experts import Frontier, move_frontier
from counterflow.experts.frontier import _steps
from experts.test_migration import placements


@st.composite
def served(draw: st.DrawFn) -> tuple[np.ndarray, Placement]:
    gpus, room, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, gpus * room))
    current = draw(placements(experts, gpus, 1, room, layers))
    row = st.lists(st.integers(0, 9), min_size=experts, max_size=experts)
    return np.array(draw(st.lists(row, min_size=layers, max_size=layers))), current


def every_point_can_be_had(loads: np.ndarray, found: Frontier) -> None:
    for point, moves in enumerate(found.moves.tolist()):
        placement = found.placement(point)
        assert plan_migration(found.current, placement).moves.sum() <= moves
        assert placement.balancedness(loads).mean() == pytest.approx(found.balancedness[point])
        assert placement.balancedness(loads).min() == pytest.approx(found.worst[point])
        assert (placement.certificate.max_load_bound <= placement.certificate.max_load).all()


@settings(max_examples=60)
@given(served())
def test_every_point_can_be_had_and_none_is_less_balanced_than_one_before(case: tuple[np.ndarray, Placement]) -> None:
    loads, current = case
    found = move_frontier(loads, current)
    every_point_can_be_had(loads, found)
    assert found.placement(0).physical_to_logical.tolist() == current.physical_to_logical.tolist()
    assert (np.diff(found.moves) >= 0).all()
    assert (np.diff(found.balancedness) >= 0).all()
    assert (np.diff(found.worst) >= 0).all()
    room = current.num_slots, current.num_gpus
    assert found.balancedness[-1] >= balance(loads, *room).balancedness(loads).mean() - 1e-9
    enough = balance(loads, *room, current=current)
    assert found.balancedness[found.as_published] >= enough.balancedness(loads).mean() - 1e-9
    assert [found.at(moves) for moves in found.moves.tolist()] == [
        np.flatnonzero(found.moves == moves)[-1] for moves in found.moves.tolist()
    ]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 20)), max_size=6))
def test_no_mixture_of_stops_brings_more_for_as_many_moves(stops: list[tuple[int, int]]) -> None:
    moves, values = [0, *(stop[0] for stop in stops)], [0.5, *(stop[1] / 40 for stop in stops)]
    at = {0: (0, 0.5)}
    for number, step in enumerate(_steps(0, moves, values), start=1):
        before = at[number - 1]
        at[number] = before[0] + step.moves, before[1] + step.gain
        assert at[number] == (moves[step.stop], pytest.approx(values[step.stop]))
    hull = list(at.values())
    assert hull[-1][1] == pytest.approx(max(values))
    for move, value in zip(moves, values, strict=True):
        best = max((even for needed, even in hull if needed <= move), default=0)
        for (m0, v0), (m1, v1) in product(hull, hull):
            if m0 <= move <= m1 and m0 < m1:
                best = max(best, v0 + (v1 - v0) * (move - m0) / (m1 - m0))
        assert value <= best + 1e-9


def test_before_the_knee_a_move_brings_more_than_on_average_and_after_it_less() -> None:
    rng = np.random.default_rng(0)
    current = balance(rng.lognormal(0, 1, (8, 64)), 80, 16)
    loads = rng.lognormal(0, 1, (8, 64))
    found = move_frontier(loads, current)
    slopes = np.diff(found.balancedness) / np.diff(found.moves)
    average = (found.balancedness[-1] - found.balancedness[0]) / found.moves[-1]
    assert (slopes[: found.knee] >= average).all()
    assert (slopes[found.knee :] <= average).all()
    for point in (found.knee, found.as_published):
        limited = balance(loads, 80, 16, current=current, max_moves=int(found.moves[point]))
        assert found.balancedness[point] >= limited.balancedness(loads).mean() - 0.005


def test_what_is_as_even_as_can_be_moves_nothing() -> None:
    loads = np.random.default_rng(1).lognormal(0, 1, (3, 16))
    found = move_frontier(loads, balance(loads, 20, 4))
    assert (found.moves.tolist(), found.knee, found.as_published) == ([0], 0, 0)
    idle = move_frontier(np.zeros((1, 4)), Placement([[0, 1, 2, 3]], 4, 2))
    assert (idle.moves.tolist(), idle.balancedness.tolist()) == ([0], [1.0])


def test_groups_stay_on_their_nodes_all_along() -> None:
    rng = np.random.default_rng(2)
    current = balance(rng.lognormal(0, 1, (3, 32)), 40, 8, 2, 4)
    loads = rng.lognormal(0, 1, (3, 32))
    found = move_frontier(loads, current, 4)
    every_point_can_be_had(loads, found)
    for point in range(len(found.moves)):
        placement = found.placement(point)
        assert placement.hierarchy == "node"
        for row in placement.physical_to_logical:
            assert not {*(row[:20] // 8).tolist()} & {*(row[20:] // 8).tolist()}
    with pytest.raises(PlacementError, match="does not keep its groups on nodes"):
        move_frontier(loads, balance(loads, 40, 8, 2), 4)
