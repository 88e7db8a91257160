"""The published algorithm: its worked example, what it gave elsewhere, and the fast path against the slow one."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import CounterflowError, rebalance_experts
from counterflow.errors import PlacementError
from counterflow.experts import replicas
from counterflow.experts.published_reference import rebalance_reference, sorted_as_cpp
from counterflow.experts.torch_order import DEEPEST, sort_rows, sum_as_torch
from counterflow.loops import compiled
from experts.loads import problems

WORKED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]

RECORDED = {  # what the published code gave: loads, replicas, groups, nodes, GPUs, then the slots
    "worked example": (
        WORKED,
        (16, 4, 2, 8),
        [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]],
    ),
    "equal loads, in the order of an unstable sort": (
        [[1] * 20],
        (24, 1, 1, 2),
        [[10, 18, 16, 14, 12, 9, 7, 5, 3, 2, 0, 2, 19, 17, 15, 13, 11, 8, 6, 4, 1, 0, 3, 1]],
    ),
    "ties among groups and experts": (
        [[7, 7, 1, 3, 9, 9, 2, 2, 5, 5, 4, 6]],
        (16, 6, 2, 4),
        [[11, 4, 10, 7, 4, 5, 5, 6, 8, 0, 0, 3, 9, 1, 1, 2]],
    ),
    "groups that do not divide over the nodes": ([[5, 1, 2, 8, 3, 9]], (9, 3, 2, 3), [[5, 4, 2, 5, 0, 0, 3, 3, 1]]),
    "one slot for each GPU": ([[3.5, 0.5]], (2, 1, 1, 2), [[0, 1]]),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_outputs_of_the_published_code_come_out_again(name: str) -> None:
    loads, sizes, slots = RECORDED[name]
    assert rebalance_experts(np.array(loads), *sizes)[0].tolist() == slots


def test_the_three_maps_of_a_recorded_output() -> None:
    slots, where, counts = rebalance_experts(np.zeros((1, 4)), 12, 1, 1, 2)
    assert slots.tolist() == [[0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert where.tolist() == [[[0, 4, 5, 6, 7, 8, 9, 10, 11], *([slot] + [-1] * 8 for slot in (1, 2, 3))]]
    assert counts.tolist() == [[9, 1, 1, 1]]


@given(problems())
@settings(max_examples=150)
@pytest.mark.parametrize("compiled_from", [0, 10**9], ids=["compiled", "as it stands"])
def test_the_fast_path_equals_the_slow_one(
    compiled_from: int, problem: tuple[np.ndarray, tuple[int, int, int, int]]
) -> None:
    loads, sizes = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "COMPILED_FROM", compiled_from)
        patch.setattr(replicas, "_turns_so_far", Counter())
        ours = rebalance_experts(loads, *sizes)
    for fast, slow in zip(ours, rebalance_reference(loads.astype(np.float32), *sizes), strict=True):
        assert np.array_equal(fast, slow)


def test_torch_in_gives_torch_out_and_the_same_numbers() -> None:
    maps = rebalance_experts(torch.tensor(WORKED), 16, 4, 2, 8)
    assert all(isinstance(array, torch.Tensor) and array.dtype == torch.int64 for array in maps)
    for ours, theirs in zip(rebalance_experts(np.array(WORKED), 16, 4, 2, 8), maps, strict=True):
        assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int32, torch.bool])
def test_every_type_of_tensor_is_read(dtype: torch.dtype) -> None:
    tensor = torch.tensor(WORKED).clamp(max=120).to(dtype).requires_grad_(dtype == torch.float64)
    expected = rebalance_experts(tensor.detach().float().numpy(), 16, 4, 2, 8)[0]
    assert rebalance_experts(tensor, 16, 4, 2, 8)[0].tolist() == expected.tolist()


# --- the order in which torch works -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [*range(1, 70), 96, 127, 128, 200, 256, 1000, 5000])
def test_group_loads_are_added_in_the_order_of_torch(length: int) -> None:
    values = np.random.default_rng(length).lognormal(0, 3, (5, length)).astype(np.float32)
    assert np.array_equal(sum_as_torch(values), torch.from_numpy(values).sum(-1).numpy())


def order_of_both(keys: np.ndarray) -> tuple[list[int], list[int]]:
    """The order that the kernel gives, and the reference's."""
    order, scratch = np.arange(len(keys)), np.zeros(3 * DEEPEST, dtype=np.int64)
    compiled(sort_rows)(keys.copy(), order, 1, len(keys), scratch)
    return order.tolist(), sorted_as_cpp(range(len(keys)), lambda a, b: bool(keys[a] > keys[b]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200))
def test_equal_loads_come_in_the_order_of_torch(values: list[int]) -> None:
    keys = np.array(values, dtype=np.float32)
    kernel, reference = order_of_both(keys)
    assert kernel == reference == torch.from_numpy(keys).sort(-1, descending=True).indices.tolist()


def killer(length: int) -> np.ndarray:
    """Keys on which this quicksort goes as deep as it can (McIlroy, A Killer Adversary for Quicksort, 1999)."""
    value = [float("-inf")] * length  # not yet decided, so lower than any
    decided, candidate = 0, 0

    def before(a: int, b: int) -> bool:
        nonlocal decided, candidate
        if value[a] == value[b] == float("-inf"):
            frozen = a if a == candidate else b
            value[frozen] = float(length - decided)
            decided += 1
        if value[a] == float("-inf"):
            candidate = a
        elif value[b] == float("-inf"):
            candidate = b
        return value[a] > value[b]

    sorted_as_cpp(range(length), before)
    return np.maximum(np.array(value, dtype=np.float32), 0)


@pytest.mark.parametrize("length", [100, 1000, 1001])
def test_loads_that_drive_the_sort_into_its_heap(length: int) -> None:
    keys = killer(length) // 2  # with ties
    compared = 0

    def before(a: int, b: int) -> bool:
        nonlocal compared
        compared += 1
        return bool(keys[a] > keys[b])

    sorted_as_cpp(range(length), before)
    kernel, reference = order_of_both(keys)
    assert kernel == reference == torch.from_numpy(keys).sort(-1, descending=True).indices.tolist()


# --- what it refuses, where the published code says nothing -------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((5, 1, 1, 2), "5 replicas do not divide over 2 GPUs: give 6, or another multiple"),
        ((2, 1, 1, 2), "2 replicas cannot hold 4 experts: give at least 4"),
        ((6, 4, 2, 3), "3 GPUs do not divide over 2 nodes: give a multiple of 2"),
        ((6, 3, 1, 2), "4 experts do not divide into 3 groups: give a divisor of 4"),
        ((6, 1, 0, 2), "num_nodes is 0; it has to be a whole number from 1 to 16777216"),
        ((6, -1, 1, 2), "num_groups is -1; it has to be a whole number from 1 to 16777216"),
        ((6.0, 1, 1, 2), "num_replicas is 6.0; it has to be a whole number from 1 to 16777216"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence(sizes: tuple[int, int, int, int], sentence: str) -> None:
    with pytest.raises(PlacementError) as caught:
        rebalance_experts(np.ones((1, 4)), *sizes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("loads", "sentence"),
    [
        (
            [[1.0, float("nan")]],
            "the load of expert 1 in layer 0 is nan; a load has to be finite: leave out the steps that gave it",
        ),
        (
            [[1.0, 2.0], [float("inf"), 1.0]],
            "the load of expert 0 in layer 1 is inf; a load has to be finite: leave out the steps that gave it",
        ),
        ([[1.0, -2.0]], "the load of expert 1 in layer 0 is -2.0; a load cannot be negative: give counts of tokens"),
        (
            [[[1.0]]],
            "the loads have shape [1, 1, 1]; they have to be [layers, experts], or [experts] of one layer: "
            "sum over the other dimensions",
        ),
        (
            [[], []],
            "the loads have 2 layers and 0 experts; at least one layer and 1 to 16777216 experts are needed: "
            "give a row for each layer",
        ),
    ],
)
def test_loads_that_are_none_are_one_sentence(
    make: Callable[[list[list[float]]], object], loads: list[list[float]], sentence: str
) -> None:
    with pytest.raises(CounterflowError) as caught:
        rebalance_experts(make(loads), 2, 1, 1, 1)
    assert str(caught.value) == sentence


def test_a_load_beyond_float32_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"expert 1 in layer 0 is 1e\+39; a load has to fit float32"):
        rebalance_experts(np.array([[1, 1e39]]), 2, 1, 1, 1)


def test_more_replicas_than_can_be_meant_are_one_sentence() -> None:
    hot = np.eye(1, 1000)
    with pytest.raises(PlacementError, match="1 layers of 16777216 replicas are too many slots; give at most 4194304"):
        rebalance_experts(hot, 2**24, 1, 1, 1)
    with pytest.raises(PlacementError, match="a map of 1 layers, 1000 experts and 523289 replicas of one is too large"):
        rebalance_experts(hot, 2**19, 1, 1, 1)
