"""Measured over simulated: the picture shows both on one axis, and what differs; waits name who kept whom waiting."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from counterflow import Costs, Schedule, Timeline, dualpipe, one_f_one_b, simulate
from counterflow.errors import ReportError
from counterflow.report import deviations, overlay_svg, waits
from ranks import shifted
from strategies import generated_schedules

SLOW, USUAL = Costs((2, 1), 2), Costs(1, 2)


def titles(picture: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")]


@settings(max_examples=15)
@given(generated_schedules(4, 8))
def test_every_action_stands_in_the_picture_twice_and_tells_both_of_its_times(schedule: Schedule) -> None:
    picture = overlay_svg(schedule, simulate(schedule, Costs(3, 5, None, 2, 7)), simulate(schedule, Costs()))
    told = [title for title in titles(picture) if ": measured " in title]
    assert len(told) == 2 * schedule.rows.num_actions
    assert all(", simulated " in title for title in told)


def test_both_steps_stand_on_one_axis() -> None:
    schedule = one_f_one_b(2, 4)
    measured, simulated = simulate(schedule, Costs(2, 4)), simulate(schedule, Costs(1, 2))
    picture = overlay_svg(schedule, measured, simulated)
    widths = [
        float(found[1]) - float(found[0])
        for found in re.findall(r'class="F"><title>0F0[^<]*</title><path d="M([\d.]+)-17H([\d.]+)V', picture)
    ]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.02)


def test_the_largest_differences_come_first_and_stand_below_the_picture() -> None:
    schedule = one_f_one_b(2, 2)
    found = deviations(schedule, simulate(schedule, SLOW), simulate(schedule, USUAL))
    assert [(str(one.action), one.longer_ns) for one in found[:3]] == [("0F0", 1000), ("0F1", 1000), ("0B0", 0)]
    assert found[1].later_ns == 1000
    picture = overlay_svg(schedule, simulate(schedule, SLOW), simulate(schedule, USUAL))
    assert "rank 0: 0F1 took 1 µs longer than simulated (+100%), and started 1 µs later" in picture


def test_each_step_counts_from_its_own_first_action() -> None:
    schedule = one_f_one_b(2, 2)
    step = simulate(schedule, USUAL)
    assert all(one.later_ns == one.longer_ns == 0 for one in deviations(schedule, shifted(step, 10**15), step))
    assert overlay_svg(schedule, shifted(step, 10**15), step) == overlay_svg(schedule, step, step)
    assert "durations that differ most" not in overlay_svg(schedule, step, step)


def test_another_step_and_a_theme_that_is_none_are_refused() -> None:
    schedule = one_f_one_b(2, 2)
    step = simulate(schedule, USUAL)
    with pytest.raises(ReportError, match="0 times on rank"):
        overlay_svg(schedule, step, Timeline.from_spans(list(step)[1:]))
    with pytest.raises(ReportError, match="theme"):
        overlay_svg(schedule, step, step, theme="blue")  # type: ignore[arg-type]


# --- waits ----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(generated_schedules(4, 8))
def test_a_simulated_rank_waits_until_the_other_is_done_and_then_for_the_latency(schedule: Schedule) -> None:
    step = simulate(schedule, Costs(3, 5, None, 2, 7, latency_us=1))
    for wait in waits(schedule, step):
        assert wait.peer != wait.rank
        assert wait.arriving_ns + wait.waited_ns > 0
        assert 0 <= wait.arriving_ns <= 1000


def test_waits_are_a_part_of_the_bubble() -> None:
    schedule = dualpipe(4, 8)
    step = simulate(schedule, Costs(3, 5, None, 2, 7, latency_us=1))
    bubble = step.bubble_ns()
    for rank in range(4):
        waited = sum(one.waited_ns + one.arriving_ns for one in waits(schedule, step) if one.rank == rank)
        assert 0 < waited <= bubble[rank]
