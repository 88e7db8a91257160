"""Other numbers of replicas for the heaviest experts, dealings near to the current, and what need not be worked out."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Placement, balance, plan_migration, rebalance_experts
from counterflow.experts.nodes import nearest_groups
from counterflow.experts.peaks import gpu_peaks
from counterflow.experts.published import published_peaks
from counterflow.experts.search import heaviest_first, pack, replica_counts
from counterflow.experts.splits import split_otherwise
from experts.loads import loads, problems


def test_two_hot_experts_of_one_node_are_split_so_that_their_shares_fit() -> None:
    hot = np.array([[3.92, 2.03, 0.76, *np.linspace(0.04, 0.002, 61)]])
    usual = pack(hot, replica_counts(hot, 72, 8), 8, 1)
    bound = hot.sum(axis=1) / 8
    slots = split_otherwise(hot, usual, 8, bound, 1e-3)
    assert gpu_peaks(hot, usual, 8)[0] > 1.05 * bound[0]
    assert gpu_peaks(hot, slots, 8)[0] < 1.001 * bound[0]


@given(problems())
@settings(max_examples=40)
def test_other_numbers_of_replicas_are_taken_only_where_they_are_more_even(
    problem: tuple[np.ndarray, tuple[int, int, int, int]],
) -> None:
    load, (replicas, _, _, gpus) = problem
    load = load / max(load.max(), 1.0) + 1e-3
    if replicas > load.shape[1] * gpus:
        return
    usual = pack(load, replica_counts(load, replicas, gpus), gpus, 1)
    slots = split_otherwise(load, usual, gpus, load.sum(axis=1) / gpus, 1e-3)
    assert (gpu_peaks(load, slots, gpus) <= gpu_peaks(load, usual, gpus)).all()
    assert all({*row} == {*range(load.shape[1])} for row in slots.tolist())
    by_gpu = np.sort(slots.reshape(len(slots), gpus, -1), axis=2)
    changed = (slots != usual).any(axis=1)
    assert (np.diff(by_gpu[changed], axis=2) > 0).all()  # what was searched holds no expert twice on a GPU


def test_a_steep_popularity_with_groups_on_nodes_comes_near_to_its_bound() -> None:
    rng = np.random.default_rng(3)
    steep = np.stack([rng.permutation(np.arange(1, 257.0) ** -1.2) for _ in range(20)])
    steep *= rng.lognormal(0, 0.2, steep.shape)
    assert balance(steep, 288, 32, 4, 8).certificate.gap.mean() < 3e-3


@given(loads(12), st.sampled_from([12, 16, 24]))
@settings(max_examples=50)
def test_the_largest_load_of_a_published_gpu_is_known_without_its_placement(load: np.ndarray, slots: int) -> None:
    load = np.minimum(load, 1e30)
    published, _, _ = rebalance_experts(load, slots, 1, 1, 4)
    peaks = published_peaks(load.astype(np.float32), slots, 4)
    assert peaks == pytest.approx(gpu_peaks(load, published, 4), rel=1e-5, abs=1e-30)


@given(loads(9))
@settings(max_examples=50)
def test_experts_stand_by_descending_load_of_equals_the_first_first(load: np.ndarray) -> None:
    order = heaviest_first(load)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(9), (len(load), 1)))
    falling = np.take_along_axis(load, order, axis=1)
    assert (falling[:, 1:] <= falling[:, :-1] * (1 + 1e-9)).all()
    assert (order[:, 1:] > order[:, :-1])[falling[:, 1:] == falling[:, :-1]].all()


def test_of_the_dealings_that_will_do_the_nearest_is_taken() -> None:
    rng = np.random.default_rng(4)
    load = rng.lognormal(0, 1, (12, 48))
    home = np.tile([0, 0, 1, 1, 2, 2], (12, 1))
    sums = load.reshape(12, 6, 8).sum(axis=2)
    for factor in (1.02, 1.1, 1.3):
        reach = factor * load.sum(axis=1) / 6
        dealt = nearest_groups(load, home, 3, 96, 6, reach).reshape(12, 3, 2)
        for layer in range(12):
            kept = {}
            for order in itertools.permutations(range(6)):
                nodes = sums[layer, list(order)].reshape(3, 2).sum(axis=1) / 2
                stay = sum(home[layer, group] == place // 2 for place, group in enumerate(order))
                if nodes.max() < reach[layer]:
                    kept[stay] = order
            stays = int((home[layer][dealt[layer]] == np.arange(3)[:, None]).sum())
            assert stays == max(kept, default=6)


def test_after_many_rebalances_no_replica_is_much_larger_than_in_the_best_placement() -> None:
    rng = np.random.default_rng(5)
    logs = rng.normal(0, 1, (6, 64))
    placement = balance(np.exp(logs), 80, 8)
    for _ in range(6):
        logs = np.sqrt(1 - 0.2**2) * logs + 0.2 * rng.normal(0, 1, logs.shape)
        load = np.exp(logs)
        placement = balance(load, 80, 8, current=placement)
    fresh = balance(load, 80, 8)
    largest, best = ((load / each.logical_count).max(axis=1) for each in (placement, fresh))
    assert np.median(largest / best) < 1.1


def test_groups_that_need_not_change_their_node_do_not() -> None:
    rng = np.random.default_rng(6)
    logs = rng.normal(0, 1, (10, 128))
    before = balance(np.exp(logs), 160, 16, 4, 8)
    load = np.exp(np.sqrt(1 - 0.05**2) * logs + 0.05 * rng.normal(0, 1, logs.shape))
    after = balance(load, 160, 16, 4, 8, current=before)
    published = Placement(rebalance_experts(load, 160, 8, 4, 16)[0], 128, 16, 4)
    assert (after.balancedness(load) >= published.balancedness(load) * (1 - 1e-9)).all()
    assert plan_migration(before, after).share.mean() < 0.2


NOWHERE = """
from counterflow import balance, loops
from counterflow.experts import replicas
loops.COMPILED_FROM = replicas.COMPILED_FROM = 0
print(balance([[9.0, 1.0, 2.0]], 4, 2).gpu_loads([[9.0, 1.0, 2.0]]).tolist())
"""


def test_it_is_compiled_where_no_cache_can_be_written(tmp_path: Path) -> None:
    nowhere = tmp_path / "a file, not a folder"
    nowhere.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", NOWHERE],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"NUMBA_CACHE_DIR": str(nowhere)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[[5.5, 6.5]]\n", "")
