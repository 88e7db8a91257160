"""A timeline is its spans: sorted, in columns, equal when they are."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Timeline
from counterflow.errors import TimelineError
from counterflow.timeline import COMPUTE, Span
from strategies import spans, timelines


@given(st.lists(spans()), st.randoms(use_true_random=False))
def test_spans_come_back_sorted_by_rank_lane_and_time_whatever_their_order(given_spans: list[Span], random) -> None:
    timeline = Timeline.from_spans(given_spans)
    assert len(timeline) == len(given_spans)
    assert list(timeline) == sorted(given_spans, key=lambda s: (s.rank, s.lane, s.start_ns, s.end_ns, s.name))
    shuffled = given_spans.copy()
    random.shuffle(shuffled)
    assert Timeline.from_spans(shuffled) == timeline


@given(timelines(), timelines())
def test_timelines_are_equal_when_their_spans_are(one: Timeline, other: Timeline) -> None:
    assert (one == other) == (list(one) == list(other))
    assert one == Timeline.from_spans(iter(one))
    assert one != list(one)


@given(timelines())
def test_columns_are_int64_and_as_long_as_the_timeline(timeline: Timeline) -> None:
    for column in (timeline.rank, timeline.start_ns, timeline.end_ns, timeline.lane, timeline.name):
        assert column.dtype == np.int64
        assert column.shape == (len(timeline),)


def test_a_timeline_is_frozen_and_not_hashable() -> None:
    timeline = Timeline.from_spans([])
    with pytest.raises(FrozenInstanceError):
        timeline.lanes = ()  # type: ignore[misc]
    with pytest.raises(TypeError, match="unhashable"):
        hash(timeline)


@given(st.lists(spans(), min_size=1))
def test_busy_and_bubble_by_counting_points(given_spans: list[Span]) -> None:
    timeline = Timeline.from_spans(given_spans)
    actions = [span for span in given_spans if span.lane == COMPUTE]
    step = range(min((span.start_ns for span in actions), default=0), max((span.end_ns for span in actions), default=0))
    for rank in range(timeline.num_ranks):
        busy = {point for span in actions if span.rank == rank for point in range(span.start_ns, span.end_ns)}
        assert timeline.busy_ns()[rank] == len(busy)
        assert timeline.bubble_ns()[rank] == len(set(step) - busy)
    assert len(timeline.busy_ns("no such lane")) == timeline.num_ranks
    assert not timeline.busy_ns("no such lane").any()


def test_transfers_before_and_after_the_step_are_no_bubble() -> None:
    timeline = Timeline.from_spans(
        [Span(0, "0F0", 10, 20), Span(1, "1F0", 20, 30), Span(1, "send", 0, 90, lane="communication")]
    )
    assert timeline.makespan_ns == 90
    assert timeline.bubble_ns().tolist() == [10, 10]


def test_an_empty_timeline_has_no_ranks_and_takes_no_time() -> None:
    timeline = Timeline.from_spans([])
    assert (len(timeline), timeline.num_ranks, timeline.makespan_ns) == (0, 0, 0)
    assert timeline.busy_ns().tolist() == timeline.bubble_ns().tolist() == []


def test_a_rank_without_spans_counts_when_a_higher_one_has_some() -> None:
    timeline = Timeline.from_spans([Span(2, "2F0", 5, 9)])
    assert timeline.num_ranks == 3
    assert timeline.bubble_ns().tolist() == [4, 4, 0]


BEYOND = (
    "span 'a' lies beyond rank 65535 or more than 146 years from its origin; correct its rank and times (nanoseconds)"
)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (
            Span(0, "a", 5, 4),
            "span 'a' of rank 0 runs from 5 to 4 ns; "
            "a span needs a rank from 0 and an end that is not before its start",
        ),
        (
            Span(-1, "a", 5, 6),
            "span 'a' of rank -1 runs from 5 to 6 ns; "
            "a span needs a rank from 0 and an end that is not before its start",
        ),
        (Span(10**12, "a", 5, 6), BEYOND),
        (Span(0, "a", 0, 2**62), BEYOND),
        (Span(0, "a", -(2**62), 0), BEYOND),
        (Span(0, "a", 10**5000, 10**5000), BEYOND),
    ],
)
def test_a_span_that_cannot_be_is_refused(span: Span, message: str) -> None:
    with pytest.raises(TimelineError) as caught:
        Timeline.from_spans([Span(0, "fine", 0, 1), span])
    assert str(caught.value) == message


def test_the_furthest_times_can_still_be_subtracted() -> None:
    timeline = Timeline.from_spans([Span(0, "a", 1 - 2**62, 1 - 2**62), Span(0, "b", 2**62 - 1, 2**62 - 1)])
    assert timeline.makespan_ns == timeline.bubble_ns()[0] == 2**63 - 2
