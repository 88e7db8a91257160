"""Closed forms: where they equal the largest simulated bubble, on which side they are elsewhere, and what is said."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from counterflow import Costs, dualpipe, one_f_one_b, simulate, zb1p
from counterflow.errors import ScheduleError
from counterflow.schedule import GENERATORS, Schedule, generate
from counterflow.simulator import FORMULAS, Case, bubble_formula_ns

whole_ns = st.integers(0, 5_000)


def costs_ns(forward: int, input_: int, weight: int, overlapped: int, **more: Any) -> Costs:
    durations = (forward, input_ + weight, input_, weight, overlapped)
    return Costs(*(ns / 1000 for ns in durations), **more)


@st.composite
def uniform_costs(draw: st.DrawFn) -> Costs:
    """Around the lines on which something changes as often as off them."""
    forward = draw(whole_ns)
    input_ = draw(st.just(forward) | whole_ns)
    weight = draw(st.sampled_from([0, forward, input_, input_ // 2]) | whole_ns | st.integers(0, forward))
    backward = input_ + weight
    overlapped = draw(
        st.sampled_from([forward, backward, forward + backward])
        | st.integers(0, forward + backward + 2_000)
        | st.integers(max(forward, backward), forward + backward)
    )
    latency = draw(st.sampled_from([0, 0, 0, 0.001, 1.5]))
    wire = draw(st.sampled_from([{}, {}, {}, {"bandwidth_gb_per_s": 1, "transfer_bytes": 200}]))
    return costs_ns(forward, input_, weight, overlapped, latency_us=latency, **wire)


@st.composite
def schedules_with_a_formula(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(sorted(FORMULAS)))
    chunks = draw(st.integers(1, 4)) if name.startswith("interleaved") else None
    try:
        return generate(name, draw(st.integers(1, 6)), draw(st.integers(1, 16)), chunks)
    except ScheduleError:
        assume(False)
        raise


HOLDS = {
    "equal": lambda bubble, formula: bubble == formula,
    "larger": lambda bubble, formula: bubble > formula,
    "smaller": lambda bubble, formula: bubble < formula,
    "not smaller": lambda bubble, formula: bubble >= formula,
    "unknown": lambda bubble, formula: True,
}


@given(schedules_with_a_formula(), uniform_costs())
def test_what_is_claimed_of_a_formula_is_what_the_simulator_finds(schedule: Schedule, costs: Costs) -> None:
    case = Case.of(schedule, costs)
    formula = FORMULAS[schedule.name]
    bubble_ns = int(simulate(schedule, costs).bubble_ns().max())
    verdict = formula.judge(case)
    assert HOLDS[verdict.relation](bubble_ns, formula.value_ns(case)), verdict
    assert (verdict.relation == "equal") == (verdict.reason == "")


def relation(schedule: Schedule, costs: Costs) -> str:
    return FORMULAS[schedule.name].judge(Case.of(schedule, costs)).relation


# --- the claims are not empty: costs on which each is made --------------------------------------------------


@given(
    st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 20), whole_ns, whole_ns.map(lambda b: 2 * b)
)
def test_gpipe_and_1f1b_always_have_their_bubble(
    name: str, num_ranks: int, num_microbatches: int, forward: int, backward: int
) -> None:
    schedule = generate(name, num_ranks, num_microbatches)
    assert relation(schedule, costs_ns(forward, backward // 2, backward // 2, 0)) == "equal"


@given(st.integers(2, 8), st.integers(0, 12), whole_ns, whole_ns, whole_ns)
def test_zb1p_has_its_bubble_just_where_w_is_the_shortest(
    num_ranks: int, more: int, forward: int, input_: int, weight: int
) -> None:
    claimed = relation(zb1p(num_ranks, num_ranks + more), costs_ns(forward, input_, weight, 0))
    assert claimed == ("equal" if weight <= min(forward, input_) else "larger")


@pytest.mark.parametrize("schedule", [generate("dualpipe", 6, 14), generate("dualpipev", 3, 8)], ids=str)
@pytest.mark.parametrize(
    ("forward", "input_", "weight", "overlapped", "claimed"),
    [
        (10, 10, 10, 24, "equal"),
        (10, 10, 4, 14, "equal"),
        (10, 10, 11, 31, "larger"),
        (10, 10, 4, 13, "larger"),  # F&B < B
        (10, 10, 4, 25, "not smaller"),  # F&B > F + B
        (10, 9, 4, 20, "larger"),
        (10, 11, 4, 20, "smaller"),
        (10, 11, 11, 32, "smaller"),
        (10, 11, 12, 30, "unknown"),
    ],
)
def test_dualpipe_has_its_bubble_on_a_line(
    schedule: Schedule, forward: int, input_: int, weight: int, overlapped: int, claimed: str
) -> None:
    assert relation(schedule, costs_ns(forward, input_, weight, overlapped)) == claimed


DUALPIPES = st.sampled_from([("dualpipe", 4, 8), ("dualpipe", 6, 14), ("dualpipev", 2, 4), ("dualpipev", 4, 9)])


@given(DUALPIPES.map(lambda size: generate(*size)), uniform_costs())
def test_before_its_last_step_the_derivation_is_a_bound_and_exact_for_more_costs(
    schedule: Schedule, costs: Costs
) -> None:
    case = Case.of(schedule, costs)
    chain_ns = (case.num_stages // 2 - 1) * (case.fb + case.f - 2 * case.w)
    bubble_ns = int(simulate(schedule, costs).bubble_ns().max())
    assert bubble_ns >= chain_ns
    verdict = FORMULAS[schedule.name].judge(case)
    if verdict.relation == "larger" and "it is exact" in verdict.reason:
        assert bubble_ns == chain_ns


def test_where_b_w_is_shorter_than_f_the_reason_names_the_form_that_is_exact() -> None:
    judged = FORMULAS["dualpipe"].judge(Case.of(dualpipe(6, 14), costs_ns(10, 9, 4, 20)))
    assert judged.reason == (
        "B-W is shorter than F, and the formula takes them as equally long; without that step of its derivation, "
        "(S/2-1)(F&B+F-2W), it is exact"
    )


@pytest.mark.parametrize("schedule", [generate("dualpipe", 2, 8), generate("dualpipev", 1, 3)], ids=str)
def test_two_stages_have_no_bubble_whatever_they_cost(schedule: Schedule) -> None:
    assert relation(schedule, costs_ns(3, 1, 7, 2)) == "equal"


def test_interleaving_has_its_bubble_while_the_micro_batches_fill_the_pipeline() -> None:
    costs = Costs(1, 2, None, 1, 2.4)
    for name in ("interleaved-1f1b", "interleaved-1f1b-overlap"):
        assert relation(generate(name, 4, 8, 3), costs) == "equal"
        assert relation(generate(name, 4, 3, 3), costs) == "larger"
        assert relation(generate(name, 4, 3, 1), costs) == "equal"


def test_the_zero_of_zero_bubble_leaves_out_the_ramp() -> None:
    zb2p = generate("zb2p", 4, 12)
    assert bubble_formula_ns(zb2p, Costs()) == 0
    assert int(simulate(zb2p, Costs()).bubble_ns().max()) == 3_000
    assert relation(zb2p, Costs()) == "larger"
    assert relation(zb2p, Costs(forward_us=1, input_us=2, weight_us=1)) == "equal"


# --- what breaks all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [{"latency_us": 0.1}, {"bandwidth_gb_per_s": 1, "transfer_bytes": 100}], ids=str)
def test_transfers_that_take_time_only_add(wire: dict[str, Any]) -> None:
    judged = FORMULAS["1f1b"].judge(Case.of(one_f_one_b(4, 8), Costs(**wire)))
    assert judged == ("not smaller", "transfers take time here, which the formula does not count")
    assert relation(one_f_one_b(1, 8), Costs(**wire)) == "equal"
    judged = FORMULAS["zb1p"].judge(Case.of(zb1p(4, 8), Costs(1, 3, 1, 2, **wire)))
    assert judged.reason.startswith("transfers take time here, which the formula does not count; and W is longer than")


def test_a_sum_over_twins_is_in_no_formula() -> None:
    assert relation(dualpipe(4, 8), Costs(twins_us=1)) == "unknown"
    assert relation(one_f_one_b(4, 8), Costs(twins_us=1)) == "equal"


def test_a_whole_that_is_not_its_halves_is_left_open() -> None:
    assert relation(zb1p(4, 8), Costs(forward_us=1, backward_us=5, input_us=1, weight_us=1)) == "unknown"


def test_no_formula_is_given_where_stages_differ_or_nothing_runs_backward() -> None:
    assert bubble_formula_ns(one_f_one_b(2, 4), Costs(forward_us=(1, 2), backward_us=2)) is None
    assert bubble_formula_ns(dualpipe(4, 8).forward_only(), Costs()) is None
    assert bubble_formula_ns(Schedule.from_rows(dualpipe(4, 8).rows), Costs()) is None


def test_a_formula_is_of_a_generator_and_says_where_it_comes_from() -> None:
    assert FORMULAS.keys() <= GENERATORS.keys()
    assert all(formula.text and formula.source for formula in FORMULAS.values())
