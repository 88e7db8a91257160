"""The published comparison: its figures, where its formulas hold, and what is said where they do not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, compare, dualpipe, simulate
from counterflow.errors import ScheduleError, SimulatorError
from counterflow.schedule import GENERATORS, Schedule, generate
from counterflow.simulator import bubble_formula_ns
from counterflow.simulator.compare import FORMULAS


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
    rows = {row.name: row for row in compare(8, 20).schedules}
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
    assert [list(row) for row in data["schedules"]] == [
        [
            "name",
            "num_ranks",
            "num_stages",
            "makespan_us",
            "bubble_us",
            "bubble_formula",
            "bubble_formula_us",
            "formula_exact",
            "peak_activations",
            "parameters_per_rank",
        ]
    ] * len(GENERATORS)


# --- where the formulas hold --------------------------------------------------------------------------------

whole_ns = st.integers(0, 5_000)


def beyond_formula_ns(schedule: Schedule, forward: int, input_: int, weight: int, overlapped: int) -> int:
    """By how much the largest simulated bubble exceeds the formula; all durations in nanoseconds."""
    costs = Costs(
        forward_us=forward / 1000,
        backward_us=(input_ + weight) / 1000,
        input_us=input_ / 1000,
        weight_us=weight / 1000,
        overlapped_us=overlapped / 1000,
    )
    formula = bubble_formula_ns(schedule, costs)
    assert formula is not None
    return int(simulate(schedule, costs).bubble_ns().max()) - formula


@given(
    st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 20), whole_ns, whole_ns.map(lambda b: 2 * b)
)
def test_gpipe_and_1f1b_always_have_their_bubble(
    name: str, num_ranks: int, num_microbatches: int, forward: int, backward: int
) -> None:
    schedule = generate(name, num_ranks, num_microbatches)
    assert beyond_formula_ns(schedule, forward, backward // 2, backward // 2, 0) == 0


@given(st.integers(1, 8), st.integers(0, 12), whole_ns, whole_ns, st.data())
def test_zb1p_has_its_bubble_where_w_is_the_shortest_and_the_pipeline_fills(
    num_ranks: int, more: int, forward: int, input_: int, data: st.DataObject
) -> None:
    weight = data.draw(st.integers(0, min(forward, input_)))
    assert beyond_formula_ns(generate("zb1p", num_ranks, num_ranks + more), forward, input_, weight, 0) == 0


@given(st.integers(1, 8), st.integers(1, 20), whole_ns, whole_ns, whole_ns)
def test_zb1p_never_has_less(num_ranks: int, num_microbatches: int, forward: int, input_: int, weight: int) -> None:
    assert beyond_formula_ns(generate("zb1p", num_ranks, num_microbatches), forward, input_, weight, 0) >= 0


DUALPIPES = st.one_of(
    st.tuples(st.just("dualpipe"), st.sampled_from([4, 6, 8]), st.sampled_from([0, 2, 8])),
    st.tuples(st.just("dualpipev"), st.sampled_from([2, 3, 4]), st.sampled_from([0, 1, 6])),
).map(lambda size: generate(size[0], size[1], 2 * size[1] + size[2]))
"""Those with a bubble at all: at two stages formula and truth are both nothing."""


@given(DUALPIPES, st.integers(1, 5_000), st.data())
def test_dualpipe_has_its_bubble_where_i_is_f_and_w_is_no_longer(
    schedule: Schedule, forward: int, data: st.DataObject
) -> None:
    weight = data.draw(st.integers(0, forward))
    backward = forward + weight
    overlapped = data.draw(st.integers(backward, forward + backward))
    assert beyond_formula_ns(schedule, forward, forward, weight, overlapped) == 0


@given(DUALPIPES, st.integers(1, 5_000), st.integers(1, 5_000), st.data())
def test_dualpipe_has_a_larger_bubble_where_w_is_longer_than_f(
    schedule: Schedule, forward: int, more: int, data: st.DataObject
) -> None:
    weight = forward + more
    backward = forward + weight
    overlapped = data.draw(st.integers(0, forward + backward))
    assert beyond_formula_ns(schedule, forward, forward, weight, overlapped) > 0


@given(DUALPIPES, st.integers(2, 5_000), st.data())
def test_off_the_line_dualpipes_formula_is_never_exact(schedule: Schedule, forward: int, data: st.DataObject) -> None:
    weight = data.draw(st.integers(0, forward - 1))
    shorter, longer = data.draw(st.integers(0, forward - 1)), data.draw(st.integers(forward + 1, 3 * forward))
    assert beyond_formula_ns(schedule, forward, shorter, weight, forward + shorter + weight) > 0
    assert beyond_formula_ns(schedule, forward, longer, weight, forward + longer + weight) < 0


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_two_stages_have_no_bubble(name: str) -> None:
    (row,) = compare(2, 8, published(2.4), [name]).schedules
    assert (max(row.bubble_us), row.bubble_formula_us, row.formula_exact) == (0, 0, True)


@given(
    st.sampled_from(sorted(GENERATORS)),
    st.builds(Costs, *[st.integers(0, 3)] * 2, st.none(), *[st.integers(0, 3)] * 2, st.sampled_from([0, 0.1])),
)
def test_exact_means_that_formula_and_simulation_agree(name: str, costs: Costs) -> None:
    (row,) = compare(4, 9 if name != "dualpipe" else 10, costs, [name]).schedules
    assert row.formula_exact == (row.bubble_formula_us == max(row.bubble_us))


def test_no_formula_is_given_where_stages_differ_or_nothing_runs_backward() -> None:
    (row,) = compare(2, 4, Costs(forward_us=(1, 2), backward_us=2), ["1f1b"]).schedules
    assert (row.bubble_formula, row.bubble_formula_us, row.formula_exact) == ("(S-1)(F+B)", None, None)
    assert bubble_formula_ns(dualpipe(4, 8).forward_only(), Costs()) is None
    assert bubble_formula_ns(Schedule.from_rows(dualpipe(4, 8).rows), Costs()) is None


def test_every_generator_has_its_formula_told() -> None:
    assert FORMULAS.keys() == GENERATORS.keys()


# --- what is left out and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_stages", "num_microbatches", "skipped"),
    [
        (
            7,
            20,
            {
                "dualpipe": "dualpipe got 7 ranks; it needs an even number of at least 2: "
                "the nearest legal values are 6 and 8",
                "dualpipev": "dualpipev got 7 stages; it holds two on every rank and needs an even number: "
                "the nearest legal values are 6 and 8",
            },
        ),
        (
            1,
            4,
            {
                "dualpipe": "dualpipe got 1 ranks; it needs an even number of at least 2: the nearest legal value is 2",
                "dualpipev": "dualpipev got 1 stages; it holds two on every rank and needs an even number: "
                "the nearest legal value is 2",
            },
        ),
        (
            8,
            9,
            {
                "dualpipe": "dualpipe got 9 micro-batches on 8 ranks; it needs an even number of at least 16: "
                "the nearest legal value is 16",
            },
        ),
    ],
)
def test_schedules_that_do_not_exist_are_skipped_with_the_reason(
    num_stages: int, num_microbatches: int, skipped: dict[str, str]
) -> None:
    comparison = compare(num_stages, num_microbatches)
    assert comparison.skipped == skipped
    assert [row.name for row in comparison.schedules] == [name for name in GENERATORS if name not in skipped]


def test_without_legal_sizes_all_are_skipped() -> None:
    for size in ((0, 4), (-1, 4), (4, 0)):
        assert compare(*size).skipped.keys() == GENERATORS.keys()


def test_a_schedule_needs_only_the_costs_of_its_own_actions() -> None:
    (row,) = compare(4, 8, Costs(forward_us=1, backward_us=2), ["1f1b"]).schedules
    assert row.formula_exact
    with pytest.raises(SimulatorError, match="the costs do not say how long 3I0 takes"):
        compare(4, 8, Costs(forward_us=1, backward_us=2), ["zb1p"])


def test_an_unknown_name_is_refused_rather_than_skipped() -> None:
    with pytest.raises(ScheduleError, match="'dualpype' is no schedule"):
        compare(4, 8, names=["1f1b", "dualpype"])
