"""Copies of one expert part wherever that makes no GPU heavier than the heaviest, and nothing else changes."""

from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import balance
from counterflow.experts.apart import FEW_SLOTS, apart_if_no_higher, parted
from counterflow.experts.peaks import co_located, gpu_peaks
from experts.loads import problems


def test_a_copy_that_spares_no_gpu_anything_makes_way_for_another_expert() -> None:
    placement = balance([[6, 9, 0]], 4, 2)
    assert placement.certificate.max_load.tolist() == [9.0]
    assert placement.certificate.co_located == ()


def test_copies_stay_together_where_anything_else_is_heavier() -> None:
    load, slots = np.array([4.0, 3.0, 1.0]), np.array([1, 2, 0, 0])
    assert parted(load, slots, co_located(slots[None], 2)[0], 2, 2, 4.0).tolist() == slots.tolist()


@given(problems(), st.randoms(use_true_random=False))
def test_parting_lets_no_expert_die_or_leave_its_node_and_no_gpu_get_heavier(problem, random) -> None:  # type: ignore[no-untyped-def]
    loads, (replicas, _, nodes, gpus) = problem
    experts = loads.shape[1]
    slots = [*range(experts), *random.choices(range(experts), k=replicas - experts)]
    random.shuffle(slots)
    before = np.array([slots])
    peak = gpu_peaks(loads[:1], before, gpus)
    after = parted(loads[0], before[0], co_located(before, gpus)[0], gpus, gpus // nodes, float(peak[0]))[None]
    assert (gpu_peaks(loads[:1], after, gpus) <= peak * (1 + 1e-12)).all()
    assert co_located(after, gpus).sum() <= co_located(before, gpus).sum()
    assert set(after[0]) == set(slots)
    for here, there in zip(before.reshape(nodes, -1), after.reshape(nodes, -1), strict=True):
        assert set(there) == set(here)


def least_apart(load: np.ndarray, room: int, gpus: int) -> float:
    """The least largest load with no expert twice on a GPU, of every placement that there is."""
    least = np.inf
    for dealt in combinations_with_replacement(list(combinations(range(len(load)), room)), gpus):
        counts = np.bincount(np.concatenate(dealt), minlength=len(load))
        if counts.all():
            least = min(least, max(sum(load[e] / counts[e] for e in gpu) for gpu in dealt))
    return least


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """Loads of a node, with ties and zeros, and its slots and GPUs."""
    gpus, room = int(rng.integers(2, 4)), int(rng.integers(2, 5))
    experts = int(rng.integers(room, 7))
    load = rng.integers(0, 10, experts) if rng.random() < 0.5 else rng.lognormal(0, 1, experts).round(2)
    return load.astype(np.float64), room * gpus, gpus


@pytest.mark.parametrize("nodes", [1, 2])
def test_copies_share_a_gpu_only_where_that_is_lower_than_anything_with_all_apart(nodes: int) -> None:
    rng, together = np.random.default_rng(nodes), 0
    for _ in range(700):
        load, slots, gpus = drawn(rng)
        if slots < len(load):
            continue
        loads = np.concatenate([load, rng.permutation(load)][:nodes])
        placement = balance(loads[None], slots * nodes, gpus * nodes, nodes, nodes)
        peak = placement.certificate.max_load[0]
        for node in placement.physical_to_logical.reshape(nodes, gpus, -1):
            if any(len(set(gpu)) < len(gpu) for gpu in node.tolist()):
                together += 1
                assert least_apart(loads[np.unique(node)], slots // gpus, gpus) > peak * (1 - 1e-9)
    assert together > 50


def test_nodes_of_many_slots_and_of_shared_experts_stay_as_they_are() -> None:
    many = np.array([0, 0, *range(1, FEW_SLOTS)])
    assert apart_if_no_higher(np.ones(FEW_SLOTS), many, 2, 1, 100.0).tolist() == many.tolist()
    shared = np.array([0, 0, 1, 2, 0, 3, 4, 4])
    assert apart_if_no_higher(np.ones(5), shared, 4, 2, 100.0).tolist() == shared.tolist()
