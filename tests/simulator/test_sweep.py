"""Sweeps: what latency and the gain of F&B do to every schedule, and where the best one changes."""

import json
from typing import Any

import pytest

from counterflow import Costs, compare, simulate
from counterflow.errors import ScheduleError, SimulatorError
from counterflow.schedule import GENERATORS, generate
from counterflow.simulator import sweep

COSTS = Costs(forward_us=1, backward_us=2, weight_us=1, overlapped_us=2.4)
DUALPIPES = ["dualpipe", "dualpipev"]


def equal_devices(**costs: Any) -> dict[str, float]:
    given = {"forward_us": 1, "backward_us": 2, "weight_us": 1, "overlapped_us": 2.4} | costs
    return {row.label: row.makespan_us for row in compare(4, 8, Costs(**given)).equal_devices}


def test_each_value_is_a_comparison_on_equal_devices() -> None:
    swept = sweep(4, 8, COSTS, "latency", [0, 0.3])
    assert {name: steps[1] for name, steps in swept.makespan_us.items()} == equal_devices(latency_us=0.3)
    swept = sweep(4, 8, COSTS, "overlap", [3, 2.2])
    assert {name: steps[1] for name, steps in swept.makespan_us.items()} == equal_devices(overlapped_us=2.2)


def test_latency_hurts_the_v_more_because_it_crosses_twice_as_many_boundaries() -> None:
    swept = sweep(8, 20, COSTS, "latency", [0, 0.1], DUALPIPES)
    assert swept.makespan_us == {"dualpipe": [57.6, 60.2], "dualpipev": [58, 63.5]}


def test_the_usual_range_of_latencies_ends_at_half_a_forward() -> None:
    values_us = sweep(2, 4, Costs(forward_us=(2, 6), backward_us=8), names=["1f1b"]).values_us
    assert (values_us[0], values_us[1], values_us[-1]) == (0, 0.2, 2)


def test_the_usual_range_of_overlap_goes_from_no_gain_to_the_shorter_one_hidden() -> None:
    values_us = sweep(2, 4, Costs(2, 5), "overlap", names=["1f1b"]).values_us
    assert (values_us[0], values_us[1], values_us[-1]) == (7, 6.8, 5)
    assert sweep(2, 4, Costs(5, 2), "overlap", names=["1f1b"]).values_us[-1] == 5


def test_where_stages_differ_each_hides_the_same_part_of_what_it_could() -> None:
    costs = Costs(forward_us=(1, 3), backward_us=(2, 2), weight_us=1)
    swept = sweep(2, 4, costs, "overlap", [2.5 + 0.75], ["dualpipe"])
    halves = Costs(forward_us=(1, 3), backward_us=(2, 2), weight_us=1, overlapped_us=(2.5, 4))
    assert swept.makespan_us["dualpipe"] == [simulate(generate("dualpipe", 2, 4), halves).makespan_ns / 1000]


def test_longer_first_and_last_stages_are_swept_as_they_are_compared() -> None:
    ends = {"first_stage_weight": 1.5, "last_stage_weight": 2.0}
    swept = sweep(4, 8, COSTS, "latency", [0], **ends)
    compared = {row.label: row.makespan_us for row in compare(4, 8, COSTS, **ends).equal_devices}
    assert {name: steps[0] for name, steps in swept.makespan_us.items()} == compared


def test_the_best_is_the_shortest_and_the_first_of_several() -> None:
    swept = sweep(8, 16, COSTS, "overlap", [3, 2.4], ["1f1b", "gpipe", "zb1p", "dualpipe"])
    assert swept.best == ["dualpipe", "dualpipe"]
    assert sweep(8, 16, COSTS, "overlap", [3, 2.4], ["1f1b", "gpipe"]).best == ["1f1b", "1f1b"]


def test_the_runs_of_the_best_say_where_it_changes() -> None:
    names = ["zbv", "interleaved-1f1b-overlap", "dualpipe"]
    swept = sweep(8, 16, COSTS, "overlap", [3, 2.9, 2.8, 2.4], names)
    assert swept.runs() == [("zbv", 3, 2.9), ("interleaved-1f1b-overlap ×4", 2.8, 2.4)]


def test_a_sweep_is_plain_data() -> None:
    data = sweep(4, 8, COSTS).as_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == ["over", "values_us", "makespan_us", "best", "skipped"]


def test_a_schedule_that_does_not_exist_at_these_sizes_is_left_out_with_the_reason() -> None:
    swept = sweep(3, 6, COSTS, values=[0])
    assert swept.skipped == compare(3, 6).equal_devices_skipped
    assert swept.skipped.keys() == {"dualpipe"}
    with pytest.raises(ScheduleError, match="dualpipe got 3 ranks"):
        sweep(3, 6, COSTS, names=["dualpipe"])


@pytest.mark.parametrize("names", [["1f1b", "dualpype"], [*GENERATORS, "dualpype"]])
def test_an_unknown_name_is_refused_rather_than_left_out(names: list[str]) -> None:
    with pytest.raises(ScheduleError, match="'dualpype' is no schedule"):
        sweep(4, 8, COSTS, values=[0], names=names)


@pytest.mark.parametrize("value", [1.9, 3.1, -1, float("nan")])
def test_an_overlap_that_is_none_is_refused_with_its_range(value: float) -> None:
    with pytest.raises(SimulatorError, match=r"F&B of .* µs; it lies between .* here 2 µs, and F \+ B, here 3 µs"):
        sweep(4, 8, COSTS, "overlap", [value])


def test_a_sweep_needs_something_to_sweep_over() -> None:
    with pytest.raises(SimulatorError, match="an F or a B of 0 µs, so a pair hides nothing"):
        sweep(4, 8, Costs(0, 2), "overlap")
    with pytest.raises(ScheduleError, match="give at least one schedule"):
        sweep(4, 8, names=[])
    with pytest.raises(SimulatorError, match="a sweep got no values"):
        sweep(4, 8, values=[])
    with pytest.raises(SimulatorError, match=r"latency_us got -1"):
        sweep(4, 8, values=[-1])
    with pytest.raises(SimulatorError, match="a sweep got 'bandwidth' to vary; it varies 'latency' or 'overlap'"):
        sweep(4, 8, over="bandwidth")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="a sweep got 0 ranks; it needs at least 1"):
        sweep(0, 8)


def test_a_schedule_that_the_costs_do_not_cover_is_left_out_of_a_sweep() -> None:
    result = sweep(4, 8, Costs(forward_us=1, backward_us=2), "latency", [0, 1])
    assert "1f1b" in result.makespan_us
    assert "zb1p" in result.skipped
    with pytest.raises(SimulatorError, match="how long 0I0 takes"):
        sweep(4, 8, Costs(forward_us=1, backward_us=2), "latency", [0], ["zb1p"])
