"""The verb compare: two tables, what is said beneath them, sweeps, and plain data."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from counterflow import Costs, compare
from counterflow.schedule import GENERATORS
from counterflow.simulator import sweep, write_costs

Run = Callable[..., str]
COSTS = Costs(forward_us=1, backward_us=2, weight_us=1, overlapped_us=2.4)
SIZES = ["--ranks", "8", "--microbatches", "16", "--overlapped-us", "2.4"]


@pytest.fixture
def out(out: Run) -> Run:
    return partial(out, "compare")


@pytest.fixture
def refusal(refusal: Run) -> Run:
    return partial(refusal, "compare")


def table(printed: str, heading: str) -> dict[str, list[str]]:
    """The cells of the table below a line, by the name of the row."""
    lines = printed.split(heading, 1)[1].split("\n\n")[1].splitlines()[1:]
    cells = [re.split(r"\s{2,}", line) for line in lines]
    return {name: rest for name, *rest in cells}


# --- plain data ---------------------------------------------------------------------------------------------


def test_as_json_it_is_the_comparison_with_the_keys_that_others_rely_on(out: Run) -> None:
    data = json.loads(out(*SIZES, "--json"))
    assert data == compare(8, 16, COSTS).as_dict()
    assert [row["name"] for row in data["schedules"]] == list(GENERATORS)
    row = next(row for row in data["schedules"] if row["name"] == "dualpipe")
    assert (row["num_ranks"], row["makespan_us"], row["bubble_formula_us"], row["formula_exact"]) == (8, 48, 4.2, True)
    assert (row["peak_activations"], row["parameters_per_rank"]) == ([9] * 8, 2)
    assert {row["num_ranks"] for row in data["equal_devices"]} == {8}


def test_costs_come_from_a_file_and_the_ends_may_weigh_more(out: Run, tmp_path: Path) -> None:
    costs = Costs(forward_us=(1, 3), backward_us=(2, 6), weight_us=1)
    write_costs(costs, tmp_path / "costs.json")
    given = ["--ranks", "2", "--microbatches", "4", "--costs", tmp_path / "costs.json"]
    weights = ["--first-stage-weight", "1.5", "--last-stage-weight", "2"]
    weighed = compare(2, 4, costs, first_stage_weight=1.5, last_stage_weight=2)
    assert json.loads(out(*given, *weights, "--json")) == weighed.as_dict()


# --- tables -------------------------------------------------------------------------------------------------


def test_two_tables_fit_a_terminal(out: Run) -> None:
    printed = out(*SIZES)
    assert max(map(len, printed.splitlines())) <= 120
    stages = table(printed, "The published comparison, 8 stages for each:")
    assert stages["1f1b"] == ["8", "69", "21", "(S-1)(F+B)", "21", "yes", "1 to 8", "1 stage", "1.597"]
    assert stages["dualpipev"][:3] == ["4", "86.4", "3 to 4.2"]
    devices = table(printed, "The same model on 8 devices for each:")
    assert devices["dualpipe"] == ["2", "2", "9", "9", "48", "3 to 4.2", "1.111", "1.026"]
    assert devices["interleaved-1f1b-overlap ×4"][:2] == ["4 of 1/4", "1"]
    assert devices["interleaved-1f1b-overlap ×4"][4] == "47.4"


def test_beneath_them_it_says_what_the_tables_alone_would_hide(out: Run) -> None:
    printed = out(*SIZES)
    assert "for the rank with the largest bubble" in printed
    assert re.search(r"\nOn half as many devices, two stages on each: .*dualpipev\.\n", printed)
    assert "zb2p, zbv: it leaves out the first (R-1)F of the step" in printed
    assert "The shortest step: interleaved-1f1b-overlap ×4, 47.4 µs.\n" in printed
    assert "no schedule beats with these costs on so many devices" in printed


def test_where_the_shortest_step_costs_twice_the_parameters_it_names_another(out: Run) -> None:
    printed = out("--ranks", "8", "--microbatches", "20", "--overlapped-us", "2.4")
    assert "The shortest step: dualpipe, 57.6 µs.\n" in printed
    assert "Of those that hold every parameter once: interleaved-1f1b-overlap ×4, 57.9 µs.\n" in printed


def test_it_names_the_shortest_step_within_the_memory_of_1f1b(out: Run) -> None:
    assert "\nOf those within 1f1b's memory, 8 activations: zbv, 51.5 µs.\n" in out(*SIZES)


def test_a_formula_that_is_not_exact_is_followed_by_the_reason(out: Run) -> None:
    printed = out("--ranks", "8", "--microbatches", "20", "--backward-us", "3", "--weight-us", "1")
    assert table(printed, "8 stages for each:")["dualpipe"][5] == "no"
    assert "\ndualpipe, dualpipev: B-W is longer than F, and the formula takes them as equally long.\n" in printed


def test_where_stages_differ_no_formula_has_a_value(out: Run) -> None:
    printed = out("--ranks", "2", "--microbatches", "4", "--last-stage-weight", "2")
    assert table(printed, "2 stages for each:")["1f1b"][3:6] == ["(S-1)(F+B)", "-", "-"]
    assert "\nAll: closed forms are for stages that all take equally long, and these differ.\n" in printed


def test_it_says_which_schedules_do_not_exist_at_these_sizes(out: Run) -> None:
    printed = out("--ranks", "5", "--microbatches", "20")
    assert "\nLeft out: dualpipe got 5 ranks; it needs an even number" in printed
    assert re.search(r"\nLeft out: .*zbv.*, dualpipev got 5 stages; it holds 2 on every rank", printed)


def test_steps_of_nothing_have_no_distance(out: Run) -> None:
    printed = out("--ranks", "2", "--microbatches", "4", "--forward-us", "0")
    assert table(printed, "2 devices for each:")["1f1b"][-2:] == ["-", "-"]


# --- sweeps -------------------------------------------------------------------------------------------------


def test_a_sweep_shows_every_schedule_and_marks_the_best(out: Run) -> None:
    printed = out(*SIZES, "--sweep", "latency")
    assert printed.startswith("Step in µs on 8 devices, 16 micro-batches, by the latency of a transfer in µs:\n")
    assert max(map(len, printed.splitlines())) <= 120
    rows = table(printed, "Step in µs")
    assert rows["dualpipe"][:3] == ["48", "49.15*", "50.3*"]
    assert rows["interleaved-1f1b-overlap ×4"][:2] == ["47.4*", "52.4"]
    assert "* The shortest step: interleaved-1f1b-overlap ×4 at 0 µs, dualpipe from 0.05 to" in printed


def test_a_sweep_as_json_is_plain_data(out: Run) -> None:
    data = json.loads(out(*SIZES, "--sweep", "overlap", "--json"))
    assert data == {**sweep(8, 16, COSTS, "overlap").as_dict(), "plot": None}


def test_a_sweep_is_plotted_with_a_line_for_each_schedule(out: Run, tmp_path: Path) -> None:
    file = tmp_path / "latency.svg"
    assert f"wrote {file}\n" in out(*SIZES, "--sweep", "latency", "-o", file)
    picture = file.read_text(encoding="utf-8")
    assert picture.startswith("<svg ")
    assert all(name in picture for name in sweep(8, 16, COSTS, values=[0]).makespan_us)
    assert json.loads(out(*SIZES, "--sweep", "latency", "-o", file, "--json"))["plot"] == str(file)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--ranks 0 --microbatches 4", "gpipe got 0 ranks; it needs at least 1"),
        ("--ranks 0 --microbatches 4 --sweep overlap", "a sweep got 0 ranks; it needs at least 1"),
        ("--ranks 2 --microbatches 4 -o a.svg", "compare got -o a.svg and nothing to plot; give --sweep latency or"),
        ("--ranks 2 --microbatches 4 --sweep latency -o a.gif", "a.gif ends in '.gif'; a sweep is plotted as .svg"),
        ("--ranks 2 --microbatches 4 --sweep bandwidth", "Invalid value for '--sweep'"),
        ("--ranks 2 --microbatches 4 --first-stage-weight 0.5", "the weight of the first stage got 0.5; it needs a"),
        ("--ranks 2 --microbatches 4 --last-stage-weight nan", "the weight of the last stage got nan; it needs a"),
    ],
)
def test_bad_input_is_one_sentence(refusal: Run, arguments: str, sentence: str) -> None:
    assert refusal(*arguments.split()).startswith(sentence)
