"""Schedules side by side: the published figures, the same devices, memory in one unit, bounds, what is left out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, compare, dualpipe, simulate
from counterflow.cli.output import counted
from counterflow.errors import ScheduleError, SimulatorError
from counterflow.schedule import GENERATORS, STAGES_PER_RANK, generate
from strategies import costs_of


def published(overlapped_us: float) -> Costs:
    return Costs(forward_us=1, backward_us=2, weight_us=1, overlapped_us=overlapped_us)


# --- the published table: 8 stages, 20 micro-batches --------------------------------------------------------


@pytest.mark.parametrize(
    ("overlapped_us", "largest_bubbles", "smallest_dualpipe_bubble"),
    [
        (3, {"1f1b": 21, "zb1p": 7, "dualpipe": 6, "dualpipev": 6}, 6),
        (2.4, {"1f1b": 21, "zb1p": 7, "dualpipe": 4.2, "dualpipev": 4.2}, 3),
        (2, {"1f1b": 21, "zb1p": 7, "dualpipe": 3, "dualpipev": 3}, 1),
    ],
)
def test_bubbles(overlapped_us: float, largest_bubbles: dict[str, float], smallest_dualpipe_bubble: float) -> None:
    rows = {row.name: row for row in compare(8, 20, published(overlapped_us), largest_bubbles).schedules}
    for name, bubble_us in largest_bubbles.items():
        assert max(rows[name].bubble_us) == rows[name].bubble_formula_us == bubble_us
        assert rows[name].formula_exact
    for name in ("1f1b", "zb1p"):
        assert set(rows[name].bubble_us) == {largest_bubbles[name]}
    for name in ("dualpipe", "dualpipev"):
        assert min(rows[name].bubble_us) == smallest_dualpipe_bubble


def test_activations_parameters_and_devices() -> None:
    names = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")
    rows = {row.name: row for row in compare(8, 20, names=names).schedules}
    assert {name: (row.peak_activations, row.parameters_per_rank, row.num_ranks) for name, row in rows.items()} == {
        "gpipe": ([20] * 8, 1, 8),
        "1f1b": ([8, 7, 6, 5, 4, 3, 2, 1], 1, 8),
        "zb1p": ([8] * 8, 1, 8),
        "dualpipe": ([9] * 8, 2, 8),
        "dualpipev": ([9] * 4, 2, 4),
    }
    assert {row.num_stages for row in rows.values()} == {8}


def test_a_row_tells_what_its_simulation_gives() -> None:
    costs = published(2.4)
    (row,) = compare(8, 20, costs, ["dualpipe"]).schedules
    timeline = simulate(dualpipe(8, 20), costs)
    assert row.makespan_us == timeline.makespan_ns / 1000 == 57.6
    assert row.bubble_us == (timeline.bubble_ns() / 1000).tolist()


def test_the_comparison_is_plain_data_with_stable_keys() -> None:
    data = compare(4, 8).as_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == ["schedules", "skipped", "equal_devices", "equal_devices_skipped"]
    keys = [
        "name",
        "num_ranks",
        "num_stages",
        "makespan_us",
        "bubble_us",
        "bubble_formula",
        "bubble_formula_us",
        "formula_exact",
        "formula_reason",
        "peak_activations",
        "parameters_per_rank",
        "activation_shares",
        "parameter_shares",
        "bound_us",
        "own_bound_us",
    ]
    assert [list(row) for row in data["schedules"]] == [keys] * len(GENERATORS)
    assert [list(row) for row in data["equal_devices"]] == [keys] * (len(GENERATORS) + 2)


# --- what is said of the formulas ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_two_stages_have_no_bubble(name: str) -> None:
    (row,) = compare(2, 8, published(2.4), [name]).schedules
    assert (max(row.bubble_us), row.bubble_formula_us, row.formula_exact) == (0, 0, True)


@given(
    st.sampled_from(sorted(GENERATORS)),
    st.builds(Costs, *[st.integers(0, 3)] * 2, st.none(), *[st.integers(0, 3)] * 2, st.sampled_from([0, 0.1])),
)
def test_exact_means_that_formula_and_simulation_agree_and_else_a_reason_is_given(name: str, costs: Costs) -> None:
    comparison = compare(4, 12, costs, [name])
    for row in comparison.schedules + comparison.equal_devices:
        if row.bubble_formula_us is None:
            assert row.formula_exact is None
        else:
            assert row.formula_exact == (row.bubble_formula_us == max(row.bubble_us))
        assert (row.formula_reason is None) == (row.formula_exact is True)
        assert row.formula_reason != ""


def test_rounding_to_nanoseconds_does_not_make_a_formula_inexact() -> None:
    costs = Costs(forward_us=1.001, backward_us=2.002, weight_us=1.001, overlapped_us=2.5)
    rows = {row.label: row for row in compare(4, 8, costs).equal_devices}
    assert rows["dualpipev"].bubble_formula_us != max(rows["dualpipev"].bubble_us)
    assert rows["dualpipev"].formula_exact


def test_no_formula_is_given_where_stages_differ() -> None:
    (row,) = compare(2, 4, Costs(forward_us=(1, 2), backward_us=2), ["1f1b"]).schedules
    assert (row.bubble_formula, row.bubble_formula_us, row.formula_exact) == ("(S-1)(F+B)", None, None)
    assert row.formula_reason == "closed forms are for stages that all take equally long, and these differ"


# --- equal devices ------------------------------------------------------------------------------------------

LABELS = ["interleaved-1f1b ×4", "interleaved-1f1b-overlap ×4", "zbv", "dualpipe", "dualpipev"]


@pytest.mark.parametrize(
    ("overlapped_us", "steps_us"), [(2.4, [53.25, 47.4, 51.5, 48.0, 48.4]), (3, [53.25, 53.25, 51.5, 54, 55])]
)
def test_on_equal_devices_overlap_justifies_dualpipe_and_the_bubble_alone_does_not(
    overlapped_us: float, steps_us: list[float]
) -> None:
    rows = {row.label: row.makespan_us for row in compare(8, 16, published(overlapped_us)).equal_devices}
    assert [rows[label] for label in LABELS] == steps_us


def test_on_equal_devices_every_rank_computes_the_same_model() -> None:
    rows = compare(4, 8, published(3)).equal_devices
    assert {row.num_ranks for row in rows} == {4}
    for row in rows:
        busy_us = {round(row.makespan_us - bubble_us, 3) for bubble_us in row.bubble_us}
        assert busy_us == {8 * 3}, row.label


def test_a_row_of_equal_devices_is_its_schedule_with_the_model_cut_finer() -> None:
    costs = Costs(forward_us=(1, 2, 3, 4), backward_us=3, weight_us=1, overlapped_us=(3, 4, 5, 6), latency_us=0.1)
    ends = {"first_stage_weight": 1.25, "last_stage_weight": 2.0}
    rows = {row.label: row for row in compare(4, 8, costs, **ends).equal_devices}
    for label, schedule in (
        ("1f1b", generate("1f1b", 4, 8)),
        ("dualpipe", generate("dualpipe", 4, 8)),
        ("dualpipev", generate("dualpipev", 4, 8)),
        ("interleaved-1f1b ×4", generate("interleaved-1f1b", 4, 8, 4)),
    ):
        timeline = simulate(schedule, costs.cut(4, schedule.num_stages, 1.25, 2.0))
        assert rows[label].makespan_us == timeline.makespan_ns / 1000
        assert rows[label].bubble_us == (timeline.bubble_ns() / 1000).tolist()


def test_shares_count_memory_in_one_unit_for_all() -> None:
    rows = {row.label: row for row in compare(8, 20).equal_devices}
    raw = {name: (max(row.peak_activations), row.parameters_per_rank) for name, row in rows.items()}
    shares = {name: (max(row.activation_shares), row.parameter_shares) for name, row in rows.items()}
    assert (raw["1f1b"], shares["1f1b"]) == ((8, 1), (8, 1))
    assert (raw["zbv"], shares["zbv"]) == ((16, 2), (8, 1))
    assert (raw["dualpipe"], shares["dualpipe"]) == ((9, 2), (9, 2))
    assert (raw["dualpipev"], shares["dualpipev"]) == ((17, 2), (8.5, 1))
    assert raw["interleaved-1f1b ×4"][1] == 4
    assert shares["interleaved-1f1b ×4"][1] == 1


# --- the bounds ---------------------------------------------------------------------------------------------


def test_on_equal_devices_one_bound_is_for_all() -> None:
    assert {row.bound_us for row in compare(8, 20, published(2.4)).equal_devices} == {52.8}


@given(st.data(), st.sampled_from([2, 4]), st.sampled_from([1.0, 1.5]), st.sampled_from([1.0, 3.0]))
def test_no_row_beats_its_bounds(data: st.DataObject, num_stages: int, first: float, last: float) -> None:
    costs = data.draw(costs_of(num_stages))
    comparison = compare(num_stages, 8, costs, first_stage_weight=first, last_stage_weight=last)
    for row in comparison.schedules + comparison.equal_devices:
        assert row.bound_us <= row.own_bound_us <= row.makespan_us


# --- longer first and last stages ---------------------------------------------------------------------------


def test_a_longer_first_or_last_stage_lengthens_every_step() -> None:
    plain = compare(4, 8)
    for ends in ({"first_stage_weight": 1.5}, {"last_stage_weight": 1.5}):
        longer = compare(4, 8, **ends)
        for rows, others in ((plain.schedules, longer.schedules), (plain.equal_devices, longer.equal_devices)):
            assert all(one.makespan_us < other.makespan_us for one, other in zip(rows, others, strict=True))


# --- what is left out and what is refused -------------------------------------------------------------------

EVEN = "dualpipe got {}; it needs an even number of at least 2: the nearest legal {}"
FOLDED = "{} got {} stages; it holds 2 on every rank and needs a multiple of 2: the nearest legal {}"


@pytest.mark.parametrize(("num_stages", "nearest"), [(7, "values are 6 and 8"), (1, "value is 2")])
def test_schedules_that_do_not_exist_are_skipped_with_the_reason(num_stages: int, nearest: str) -> None:
    comparison = compare(num_stages, 21)
    dualpipe_only = {"dualpipe": EVEN.format(counted(num_stages, "rank"), nearest)}
    folded = {name: FOLDED.format(name, num_stages, nearest) for name in GENERATORS if STAGES_PER_RANK[name] == 2}
    assert comparison.skipped == dualpipe_only | folded
    assert [row.name for row in comparison.schedules] == [name for name in GENERATORS if name not in comparison.skipped]
    assert comparison.equal_devices_skipped == dualpipe_only


def test_one_may_exist_on_as_many_stages_and_not_on_as_many_devices() -> None:
    comparison = compare(8, 9, names=["dualpipev"])
    assert comparison.skipped == {}
    assert comparison.equal_devices_skipped == {
        "dualpipev": "dualpipev got 9 micro-batches on 8 ranks; it needs at least 16: the nearest legal value is 16"
    }


def test_without_legal_sizes_all_are_skipped() -> None:
    for size in ((0, 4), (-1, 4), (4, 0)):
        comparison = compare(*size)
        assert comparison.skipped.keys() == comparison.equal_devices_skipped.keys() == GENERATORS.keys()


def test_a_schedule_needs_only_the_costs_of_its_own_actions() -> None:
    (row,) = compare(4, 8, Costs(forward_us=1, backward_us=2), ["1f1b"]).schedules
    assert row.formula_exact
    with pytest.raises(SimulatorError, match=r"the costs do not say how long \dI0 takes"):
        compare(4, 8, Costs(forward_us=1, backward_us=2), ["zb1p"])


def test_an_unknown_name_is_refused_rather_than_skipped() -> None:
    with pytest.raises(ScheduleError, match="'dualpype' is no schedule"):
        compare(4, 8, names=["1f1b", "dualpype"])


def test_a_schedule_that_the_costs_do_not_cover_is_left_out_with_the_reason() -> None:
    # What a run of 1F1B can tell: nothing about I and W.
    comparison = compare(4, 8, Costs(forward_us=1, backward_us=2))
    assert {"gpipe", "1f1b", "interleaved-1f1b"} <= {row.name for row in comparison.schedules}
    reason = "the costs do not say how long 0I0 takes; give input_us for stage 0"
    assert comparison.skipped["zb1p"] == comparison.equal_devices_skipped["zb1p"] == reason
    with pytest.raises(SimulatorError, match="how long 0I0 takes"):
        compare(4, 8, Costs(forward_us=1, backward_us=2), ["zb1p"])
