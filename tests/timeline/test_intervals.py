"""Covered time against the set of its points."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from counterflow.timeline.intervals import covered_ns

intervals = st.lists(st.tuples(st.integers(-20, 40), st.integers(0, 15)), max_size=12)


def columns(pairs: list[tuple[int, int]], origin: int = 0) -> tuple[np.ndarray, np.ndarray]:
    start = np.array([origin + start for start, _ in pairs], dtype=np.int64)
    return start, start + np.array([length for _, length in pairs], dtype=np.int64)


@given(intervals)
def test_covered_time_is_the_number_of_its_points(pairs: list[tuple[int, int]]) -> None:
    points = {point for start, length in pairs for point in range(start, start + length)}
    assert covered_ns(*columns(pairs)) == len(points)


@given(intervals, st.sampled_from([10**18, -(10**18), 2**61]))
def test_the_origin_does_not_matter(pairs: list[tuple[int, int]], origin: int) -> None:
    assert covered_ns(*columns(pairs, origin)) == covered_ns(*columns(pairs))


@given(intervals, st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(pairs: list[tuple[int, int]], random) -> None:
    again = pairs + pairs
    random.shuffle(again)
    assert covered_ns(*columns(again)) == covered_ns(*columns(pairs))


def test_what_only_touches_does_not_overlap() -> None:
    assert covered_ns(*columns([(0, 10), (10, 5), (30, 0)])) == 15
