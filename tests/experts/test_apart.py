"""Copies of one expert part wherever that makes no GPU heavier than the heaviest, and nothing else changes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from counterflow import balance
from counterflow.experts.apart import parted
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
