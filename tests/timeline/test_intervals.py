"""Covered time against the set of its points, and tracks against what overlaps on them."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from counterflow.timeline.intervals import covered_ns, tracks

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


@given(intervals)
def test_tracks_hold_what_does_not_overlap_and_are_as_few_as_can_be(pairs: list[tuple[int, int]]) -> None:
    pairs = sorted((start, start + length) for start, length in pairs)
    track = tracks(*np.array(pairs, dtype=np.int64).reshape(-1, 2).T).tolist()
    for number in set(track):
        own = [pair for pair, on in zip(pairs, track, strict=True) if on == number]
        assert all(one[1] <= two[0] for one, two in pairwise(own))
    # At the start of whatever came onto the last track, one interval was open on every track.
    at_once = [sum(one <= start < end for one, end in pairs) for start, _ in pairs]
    without_length = sum(start == end for start, end in pairs)
    assert max(track, default=-1) + 1 <= max(at_once, default=0) + without_length
