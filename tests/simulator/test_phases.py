"""The bubble's three parts are all of it, and stand where the pipeline fills, is full, and drains."""

import numpy as np
from hypothesis import given

from counterflow import Costs, Schedule, Timeline, dualpipe, gpipe, one_f_one_b, simulate
from counterflow.simulator import bubble_phases
from counterflow.timeline import Span
from strategies import runnable_schedules, timelines


@given(runnable_schedules)
def test_the_three_parts_are_the_bubble(schedule: Schedule) -> None:
    timeline = simulate(schedule, Costs(1, 2.5, None, 1))
    assert np.array_equal(sum(bubble_phases(timeline)), timeline.bubble_ns())


@given(timelines())
def test_so_they_are_of_any_timeline(timeline: Timeline) -> None:
    assert np.array_equal(sum(bubble_phases(timeline)), timeline.bubble_ns())


def test_gpipe_has_no_steady_part() -> None:
    phases = bubble_phases(simulate(gpipe(4, 8), Costs()))
    assert phases.steady_ns.tolist() == [0, 0, 0, 0]
    # Between its last forward and its first backward a rank still fills the pipeline.
    assert phases.warm_up_ns.tolist() == [9000, 7000, 5000, 3000]


def test_what_a_wire_without_hurry_costs_in_the_middle_is_steady() -> None:
    quick, slow = (bubble_phases(simulate(one_f_one_b(2, 20), Costs(latency_us=us))) for us in (0, 0.5))
    assert quick.steady_ns.tolist() == [0, 0]
    assert slow.steady_ns.min() > 0


def test_dualpipe_idles_while_it_fills_and_while_it_drains() -> None:
    phases = bubble_phases(simulate(dualpipe(8, 20), Costs(1, 2, None, 1, 3)))
    assert phases.warm_up_ns.tolist() == phases.warm_up_ns.tolist()[::-1]
    assert sum(phases).tolist() == [6000] * 8


def test_a_rank_that_only_waits_waits_in_the_steady_part() -> None:
    timeline = Timeline.from_spans([Span(0, "0F0", 0, 4), Span(2, "1F0", 4, 9)])
    phases = bubble_phases(timeline)
    assert phases.steady_ns.tolist() == [0, 9, 0]
    assert phases.warm_up_ns.tolist() == [0, 0, 4]
    assert phases.cool_down_ns.tolist() == [5, 0, 0]


def test_nothing_has_no_bubble() -> None:
    assert [part.tolist() for part in bubble_phases(Timeline.from_spans([]))] == [[], [], []]
