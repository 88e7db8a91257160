"""Costs: what follows from what, what they read from a timeline and a file, and what they refuse."""

import json
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Action, Costs, Schedule, Timeline, dualpipe, one_f_one_b, simulate
from counterflow.errors import SimulatorError, TimelineError
from counterflow.schedule import Transfer, generate
from counterflow.simulator import read_costs, write_costs
from counterflow.timeline import TWINS, Span
from strategies import costs_of, durations_us, runnable_schedules


def ns(costs: Costs, text: str) -> int:
    return costs.duration_ns(Action.parse(text))


# --- what follows from what ---------------------------------------------------------------------------------


def test_without_durations_an_f_is_the_unit() -> None:
    costs = Costs(latency_us=7)
    assert [ns(costs, text) for text in ("3F1", "3B1", "3I1", "3W1", "(3F1;4B0)OVERLAP_F_B")] == [
        1000,
        2000,
        1000,
        1000,
        3000,
    ]


@given(durations_us, durations_us, durations_us)
def test_a_backward_is_its_two_halves_whichever_is_left_out(forward: float, input_: float, weight: float) -> None:
    whole = round(input_ * 1000) + round(weight * 1000)
    expected = [round(forward * 1000), whole, round(input_ * 1000), round(weight * 1000), round(forward * 1000) + whole]
    for given_ones in (
        {"input_us": input_, "weight_us": weight},
        {"backward_us": whole / 1000, "weight_us": weight},
        {"backward_us": whole / 1000, "input_us": input_},
    ):
        costs = Costs(forward_us=forward, **given_ones)
        assert [ns(costs, text) for text in ("0F0", "0B0", "0I0", "0W0", "(0F1;5B0)OVERLAP_F_B")] == expected


def test_what_is_given_is_not_derived() -> None:
    costs = Costs(forward_us=1, backward_us=5, input_us=1, weight_us=1, overlapped_us=9)
    assert [ns(costs, text) for text in ("0B0", "(0F1;0B0)OVERLAP_F_B", "(0F1;0I0)OVERLAP_F_B")] == [5000, 9000, 9000]


def test_an_overlapped_action_without_gain_adds_up_its_two_stages() -> None:
    costs = Costs(forward_us=(1, 10), input_us=(100, 1000), weight_us=0)
    assert ns(costs, "(0F1;1I0)OVERLAP_F_B") == 1_001_000
    assert ns(costs, "(1F1;0B0)OVERLAP_F_B") == 110_000


def test_weights_larger_than_their_whole_leave_an_input_of_nothing() -> None:
    assert ns(Costs(forward_us=1, backward_us=2, weight_us=3), "0I0") == 0


def test_one_stage_may_leave_out_what_another_gives() -> None:
    costs = Costs(forward_us=1, backward_us=(3, None), input_us=(None, 1), weight_us=2)
    assert [ns(costs, text) for text in ("0B0", "0I0", "1B0", "1I0")] == [3000, 1000, 3000, 1000]


@pytest.mark.parametrize(
    ("transfer", "wire_ns"),
    [
        (Transfer("activation", 0, 0, 0, 1), 50),
        (Transfer("gradient", 1, 0, 1, 0), 50),
        (Transfer("activation", 1, 0, 1, 2), 150),
        (Transfer("gradient", 2, 0, 2, 1), 150),
    ],
)
def test_a_boundary_costs_the_same_both_ways(transfer: Transfer, wire_ns: int) -> None:
    assert Costs(bandwidth_gb_per_s=2, transfer_bytes=(100, 300, 0)).wire_ns(transfer) == wire_ns
    assert Costs(transfer_bytes=(100, 300, 0)).wire_ns(transfer) == 0


def test_uniform_means_that_no_stage_takes_longer() -> None:
    assert Costs(forward_us=(2, 2), backward_us=4, transfer_bytes=(1, 2)).uniform()
    assert not Costs(forward_us=(2, 3), backward_us=4).uniform()
    assert not Costs(forward_us=(2, None), backward_us=4).uniform()


# --- the model cut finer, and stages that weigh more --------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_model_cut_finer_does_the_same_work_and_stores_the_same(
    num_stages: int, pieces: int, data: st.DataObject
) -> None:
    costs = data.draw(costs_of(num_stages))
    cut = costs.cut(num_stages, num_stages * pieces)
    for name in ("forward_us", "backward_us", "input_us", "weight_us", "freed_at_input_bytes", "freed_at_weight_bytes"):
        whole, parts = (getattr(one, name) for one in (costs, cut))
        if isinstance(whole, tuple):
            assert [sum(parts[at : at + pieces]) for at in range(0, len(parts), pieces)] == pytest.approx(list(whole))
        else:
            assert parts * pieces == pytest.approx(whole)
    assert cut.uniform() == costs.uniform()


def test_a_cut_leaves_what_is_not_given_to_follow_and_the_wire_as_it_is() -> None:
    costs = Costs(1, (2, 4), latency_us=0.5, bandwidth_gb_per_s=2, transfer_bytes=(100, 0), twins_us=3)
    assert costs.cut(2, 4) == Costs(
        0.5,
        (1, 1, 2, 2),
        latency_us=0.5,
        bandwidth_gb_per_s=2,
        transfer_bytes=(100, 100, 0, 0),
        twins_us=1.5,
    )


def test_a_longer_first_or_last_stage_takes_longer_in_all_it_computes() -> None:
    costs = Costs(forward_us=1, backward_us=2, weight_us=1, overlapped_us=2.5, twins_us=3, freed_at_input_bytes=8)
    weighed = costs.cut(3, 3, first=2, last=1.5)
    assert weighed == Costs(
        forward_us=(2, 1, 1.5),
        backward_us=(4, 2, 3),
        weight_us=(2, 1, 1.5),
        overlapped_us=(5, 2.5, 3.75),
        twins_us=3,
        freed_at_input_bytes=8,
    )
    assert ns(weighed, "0I0") == 2_000


def test_the_surplus_of_an_end_is_not_cut() -> None:
    assert Costs(forward_us=(4, 4), backward_us=8).cut(2, 4, first=1.5, last=3).forward_us == (4, 2, 2, 10)
    assert Costs(forward_us=4, backward_us=8).cut(1, 2, first=2, last=3).forward_us == (6, 10)
    assert Costs(forward_us=4, backward_us=8).cut(1, 1, first=2, last=3).forward_us == (16,)


def test_without_a_cut_or_a_weight_costs_stay_what_they_are() -> None:
    costs = Costs(forward_us=(1, 2), backward_us=3)
    assert costs.cut(2, 2) is costs


@pytest.mark.parametrize(
    ("num_stages", "into", "ends", "sentence"),
    [
        (2, 3, {}, "costs of 2 stages got 3 stages to be cut into; give a multiple of their number"),
        (2, 1, {}, "costs of 2 stages got 1 stages to be cut into"),
        (0, 0, {}, "costs of 0 stages got 0 stages"),
        (4, 8, {}, "forward_us names 2 stages and the model has 4; give one number for each stage"),
        (
            2,
            2,
            {"first": 0.9},
            "the weight of the first stage got 0.9; it needs a number from 1, as long as",
        ),
        (2, 2, {"last": float("nan")}, "the weight of the last stage got nan"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(
    num_stages: int, into: int, ends: dict[str, float], sentence: str
) -> None:
    with pytest.raises(SimulatorError) as refused:
        Costs(forward_us=(1, 2), backward_us=3).cut(num_stages, into, **ends)
    assert str(refused.value).startswith(sentence)


def test_whole_nanoseconds_are_not_rounded() -> None:
    assert Costs(forward_us=57.3, backward_us=(0.001, 2)).whole()
    assert not Costs(forward_us=57.3, backward_us=2).cut(1, 8).whole()


def test_twins_cost_nothing_unless_it_is_said() -> None:
    assert (Costs().twins_ns(3), Costs(twins_us=0.25).twins_ns(3), Costs(twins_us=(1, 2)).twins_ns(1)) == (0, 250, 2000)


# --- measured -----------------------------------------------------------------------------------------------


@st.composite
def schedules_with_stated_costs(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    """F&B by stage of its forward: what a timeline can tell."""
    schedule = draw(runnable_schedules)
    costs = draw(costs_of(schedule.num_stages).filter(lambda costs: costs.overlapped_us is not None))
    return schedule, costs


@given(schedules_with_stated_costs())
def test_costs_read_from_a_simulated_timeline_give_its_durations_back(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    read = Costs.from_timeline(simulate(schedule, costs))
    for action in (action for row in schedule.rows for action in row):
        assert read.duration_ns(action) == costs.duration_ns(action)


@given(schedules_with_stated_costs())
def test_a_schedule_simulated_with_what_its_timeline_cost_gives_that_timeline(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    timeline = simulate(schedule, costs)
    wire = {name: getattr(costs, name) for name in ("latency_us", "bandwidth_gb_per_s", "transfer_bytes")}
    assert simulate(schedule, Costs.from_timeline(timeline, **wire)) == timeline


def test_measured_costs_are_medians_for_each_kind_and_stage_on_the_compute_lane() -> None:
    spans = [
        *(Span(0, f"0F{m}", 100 * m, 100 * m + duration) for m, duration in enumerate([10, 90, 20])),
        Span(0, "2B0", 1000, 1007),
        Span(0, "1F0", 1000, 1005, lane="communication"),
        Span(0, "warm-up", 0, 999),
    ]
    costs = Costs.from_timeline(Timeline.from_spans(spans), latency_us=3)
    assert costs == Costs(forward_us=(0.02, None, None), backward_us=(None, None, 0.007), latency_us=3)


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b-overlap", "zbv", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("latency_us", [0, 0.25, 3])
def test_the_latency_is_what_an_action_waits_behind_the_end_of_what_it_needs(name: str, latency_us: float) -> None:
    schedule = generate(name, 4, 8)
    timeline = simulate(schedule, Costs(latency_us=latency_us))
    assert Costs.from_timeline(timeline).latency_us == latency_us
    later = [span._replace(start_ns=span.start_ns + 10**6, end_ns=span.end_ns + 10**6) for span in timeline]
    assert Costs.from_timeline(Timeline.from_spans([*timeline, *later])) == Costs.from_timeline(timeline)


def test_a_stated_bandwidth_takes_the_place_of_a_latency_that_has_the_wire_in_it() -> None:
    costs = Costs(bandwidth_gb_per_s=1, transfer_bytes=500)
    timeline = simulate(one_f_one_b(4, 8), costs)
    assert Costs.from_timeline(timeline).latency_us == 0.5
    assert Costs.from_timeline(timeline, bandwidth_gb_per_s=1, transfer_bytes=500).latency_us == 0


def test_a_sum_over_twins_takes_as_long_as_for_the_last_to_come() -> None:
    def step(origin_ns: int, sum_ns: int) -> list[Span]:
        actions = [Span(rank, f"0F{rank}", origin_ns, origin_ns + 5) for rank in (0, 1)]
        sums = [Span(0, "twins of stage 0", origin_ns + 5, origin_ns + 70, TWINS)]  # waits for its twin
        return [*actions, *sums, Span(1, "twins of stage 0", origin_ns + 70 - sum_ns, origin_ns + 70, TWINS)]

    spans = [span for index, sum_ns in enumerate((10, 30, 20)) for span in step(1000 * index, sum_ns)]
    assert Costs.from_timeline(Timeline.from_spans(spans)).twins_us == (0.02,)


def test_a_timeline_without_actions_has_no_costs() -> None:
    for spans in ([], [Span(0, "attention", 0, 5)], [Span(0, "0F0", 0, 5, lane="stream 7")]):
        with pytest.raises(SimulatorError) as caught:
            Costs.from_timeline(Timeline.from_spans(spans))
        assert str(caught.value) == (
            "the timeline has no span named as an action (such as 3F12), so no costs can be read from it; "
            "take one that counterflow simulated or its executor measured"
        )


def test_costs_measured_on_one_schedule_serve_another() -> None:
    costs = Costs(forward_us=(1, 2, 3, 4), backward_us=(2, 4, 6, 8), weight_us=1)
    measured = Costs.from_timeline(simulate(one_f_one_b(4, 8), costs))
    assert simulate(one_f_one_b(4, 20), measured) == simulate(one_f_one_b(4, 20), costs)
    with pytest.raises(SimulatorError, match=r"the costs do not say how long 3I\d takes; give input_us for stage 3"):
        simulate(dualpipe(4, 8), measured)


# --- the file -----------------------------------------------------------------------------------------------


@given(st.integers(1, 4).flatmap(costs_of))
def test_costs_come_back_from_their_file(costs: Costs) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "costs.json"
        write_costs(costs, path)
        assert read_costs(path) == costs
        assert json.loads(path.read_text(encoding="utf-8"))["format"] == 1


def test_a_file_may_leave_out_what_costs_may(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"format": 1}', encoding="utf-8")
    assert read_costs(path) == Costs()
    path.write_text('{"format": 1, "forward_us": [1, 2], "input_us": 1, "weight_us": 1}', encoding="utf-8")
    assert read_costs(path) == Costs(forward_us=(1, 2), input_us=1, weight_us=1)


def test_costs_are_frozen_and_hashable() -> None:
    assert len({Costs(forward_us=[1, 2]), Costs(forward_us=(1, 2)), Costs(forward_us=(1.0, 2.0))}) == 1


# --- what is refused ----------------------------------------------------------------------------------------

NUMBER = "it needs a number from 0 to 1e+18, or a list with one for each stage"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"forward_us": -1}, f"forward_us got -1; {NUMBER}"),
        ({"forward_us": float("nan")}, f"forward_us got nan; {NUMBER}"),
        ({"forward_us": float("inf")}, f"forward_us got inf; {NUMBER}"),
        ({"forward_us": 2e18}, f"forward_us got 2e+18; {NUMBER}"),
        ({"forward_us": True}, f"forward_us got True; {NUMBER}"),
        ({"forward_us": "1"}, f"forward_us got '1'; {NUMBER}"),
        ({"forward_us": [1, "2"]}, f"forward_us got '2'; {NUMBER}"),
        ({"forward_us": [[1]]}, f"forward_us got [1]; {NUMBER}"),
        ({"forward_us": {}}, f"forward_us got {{}}; {NUMBER}"),
        ({"transfer_bytes": -5}, f"transfer_bytes got -5; {NUMBER}"),
        ({"latency_us": None}, "latency_us got None; give 0 for a wire without latency"),
        ({"latency_us": [1]}, "latency_us got a list; it needs one number, which all channels share"),
        ({"bandwidth_gb_per_s": [1]}, "bandwidth_gb_per_s got a list; it needs one number, which all channels share"),
        (
            {"bandwidth_gb_per_s": 0},
            "costs got a bandwidth of 0 GB/s; give at least 1e-09, or none for no limit",
        ),
        (
            {"bandwidth_gb_per_s": 5e-324},
            "costs got a bandwidth of 5e-324 GB/s; give at least 1e-09, or none for no limit",
        ),
        (
            {"forward_us": [1, 2], "weight_us": [1, 2, 3]},
            "costs got lists of 2 and 3 stages; give every list one number for each stage",
        ),
    ],
)
def test_costs_that_are_none_are_refused(wrong: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(SimulatorError) as caught:
        Costs(**wrong)
    assert str(caught.value) == message
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"format": 1, **wrong}), encoding="utf-8")
    with pytest.raises(SimulatorError) as caught:
        read_costs(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        pytest.param('{"format": 1, "forward_us": ' + "1" * 5000 + "}", id="5000 digits"),
        pytest.param('{"format": 1, "forward_us": ' + "[" * 50_000 + "]" * 50_000 + "}", id="nested deeply"),
    ],
)
def test_a_file_that_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SimulatorError, match=r"costs.json cannot be read as costs \(.+\); give one as "):
        read_costs(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", '{} is no costs.json: it needs an object with "format": 1'),
        ("[]", '{} is no costs.json: it needs an object with "format": 1'),
        ("{}", '{} is no costs.json: it needs an object with "format": 1'),
        ('{"format": 2}', '{} is no costs.json: it needs an object with "format": 1'),
        ('{"format": [1]}', '{} is no costs.json: it needs an object with "format": 1'),
        (
            '{"format": 1, "foward_us": 1}',
            "{} has a field 'foward_us'; costs have " + ", ".join(field.name for field in fields(Costs)),
        ),
        ('{"format": 1, "forward_us": 1e999}', f"{{}}: forward_us got inf; {NUMBER}"),
        ('{"format": 1, "forward_us": NaN}', f"{{}}: forward_us got nan; {NUMBER}"),
    ],
)
def test_a_file_of_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SimulatorError) as caught:
        read_costs(path)
    assert str(caught.value) == message.format(path)


def test_numbers_that_no_float_holds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"format": 1, "forward_us": 1' + "0" * 400 + "}", encoding="utf-8")
    with pytest.raises(SimulatorError, match=rf"forward_us got 10+\.\.\.0+; {NUMBER.replace('+', '.')}$"):
        read_costs(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("missing.json", "nul\0.json"):
        with pytest.raises(SimulatorError, match="cannot be read as costs"):
            read_costs(tmp_path / name)


@given(
    st.sampled_from([field.name for field in fields(Costs)]),
    st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4),
)
def test_no_value_of_a_field_breaks_what_is_done_with_costs(name: str, value: object) -> None:
    data = {"forward_us": 1, "backward_us": 2, "weight_us": 1, "bandwidth_gb_per_s": 1, name: value}
    try:
        costs = Costs(**data)
        simulate(dualpipe(2, 4), costs)
    except (SimulatorError, TimelineError):
        return
    assert Costs(**asdict(costs)) == costs
