"""How many redundant experts pay: every number is a replay of its own, and a dearer slot never pays further."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.errors import PlacementError
from counterflow.experts import Redundancy, ReplaySettings, replay, sweep_replicas, worthwhile

SKEWED = np.random.default_rng(3).zipf(1.6, (12, 2, 10)).clip(max=400)
OFTEN = ReplaySettings(window_size=3, step_interval=3)


def row(slots: int, slowdown: float) -> Redundancy:
    return Redundancy(4 * slots, 4 * slots - 8, slots, 1 / slowdown, slowdown, None)


def test_every_number_that_gives_all_gpus_as_many_slots_is_replayed() -> None:
    rows = sweep_replicas(SKEWED, "published", 21, 4, settings=OFTEN)
    assert [(each.num_replicas, each.num_redundant_experts, each.slots) for each in rows] == [
        (12, 2, 3),
        (16, 6, 4),
        (20, 10, 5),
    ]
    for each in rows:
        alone = replay(SKEWED, "published", each.num_replicas, 4, settings=OFTEN)
        assert (each.balancedness, each.slowdown) == (alone.balancedness.mean(), alone.slowdown)


def test_the_gain_is_by_how_much_a_further_slot_makes_the_experts_faster() -> None:
    first, second, *_ = sweep_replicas(SKEWED, "balance", 20, 4, settings=OFTEN)
    assert first.gain is None
    assert second.gain == pytest.approx(first.slowdown / second.slowdown - 1)


def test_slots_pay_until_none_beyond_gains_what_it_costs() -> None:
    rows = (row(2, 2.0), row(3, 1.5), row(4, 1.2), row(5, 1.19), row(6, 1.19))
    assert worthwhile(rows, 0.05) is rows[2]
    assert worthwhile(rows, 0.001) is rows[3]
    assert worthwhile(rows, 0.5) is rows[0]


def test_a_slot_that_gains_nothing_does_not_hide_a_later_one_that_does() -> None:
    rows = (row(2, 2.0), row(3, 2.0), row(4, 1.0))
    assert worthwhile(rows, 0.1) is rows[2]


def test_slots_for_nothing_are_taken_only_while_they_gain() -> None:
    rows = (row(2, 2.0), row(3, 1.0), row(4, 1.0))
    assert worthwhile(rows, 0.0) is rows[1]


@settings(max_examples=50)
@given(st.lists(st.floats(1, 4), min_size=1, max_size=8), st.floats(0, 0.5), st.floats(0, 0.5))
def test_where_a_slot_costs_more_fewer_pay(slowdowns: list[float], one: float, other: float) -> None:
    rows = tuple(row(2 + index, slowdown) for index, slowdown in enumerate(slowdowns))
    cheap, dear = sorted((one, other))
    assert worthwhile(rows, dear).slots <= worthwhile(rows, cheap).slots


def test_progress_goes_on_from_one_number_to_the_next() -> None:
    told: list[tuple[int, int]] = []
    sweep_replicas(SKEWED, "none", 20, 4, settings=OFTEN, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 36) for done in range(1, 37)]


@pytest.mark.parametrize(
    ("windows", "sizes", "message"),
    [
        (SKEWED, (8, 4), "at most 8 replicas on 4 GPUs cannot hold 10 experts: sweep up to 12 or more"),
        (SKEWED, (12, 0), "num_gpus is 0"),
        (SKEWED, (0, 4), "most_replicas is 0"),
        (SKEWED[0], (20, 4), "the windows have shape [2, 10]"),
        (3, (20, 4), "the windows have shape []"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(windows: Any, sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(PlacementError, match=re.escape(message)):
        sweep_replicas(windows, "balance", *sizes)


@pytest.mark.parametrize("cost", [-0.1, 1.0, float("nan")])
def test_the_cost_of_a_slot_is_a_share(cost: float) -> None:
    with pytest.raises(PlacementError, match=r"slot_cost is .*; it has to be a share, from 0 to less than 1"):
        worthwhile((row(2, 1.0),), cost)
