"""Loops over integers do what the slow and obvious references do, compiled and as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Costs, Schedule, loops, simulate
from counterflow.errors import ScheduleError
from counterflow.schedule import generate, lower
from counterflow.schedule import reference as slow_schedule
from counterflow.simulator import critical_path
from counterflow.simulator import reference as slow_simulator
from strategies import any_schedules, costs_of, random_runnable, runnable_schedules


@st.composite
def schedules_with_costs(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    schedule = draw(runnable_schedules)
    return schedule, draw(costs_of(schedule.num_stages))


@settings(max_examples=200)
@given(runnable_schedules)
def test_the_programs_are_those_of_the_rules_in_words(schedule: Schedule) -> None:
    assert list(lower(schedule).programs) == list(slow_schedule.lower(schedule).programs)


@given(any_schedules())
def test_what_is_not_whole_is_refused_by_both_in_the_same_words(schedule: Schedule) -> None:
    sentences = []
    for judge in (lower, slow_schedule.lower):
        try:
            judge(schedule)
        except ScheduleError as error:
            sentences.append((str(error), getattr(error, "__notes__", [])))
    assert len(sentences) != 1
    assert len(set(map(repr, sentences))) <= 1


@settings(max_examples=200)
@given(schedules_with_costs())
def test_simulated_time_is_that_of_one_instruction_after_the_other(case: tuple[Schedule, Costs]) -> None:
    assert simulate(*case) == slow_simulator.simulate(*case)


def test_compiled_loops_do_what_they_do_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [generate(*size) for size in (("dualpipe", 4, 10), ("dualpipev", 3, 7), ("zb1p", 4, 6), ("gpipe", 1, 2))]
    cases += [random_runnable(seed, 4, 4, 4) for seed in range(20)]
    costs = Costs(1.5, 2.25, None, 0.75, 3, latency_us=0.125, bandwidth_gb_per_s=1, transfer_bytes=100)

    def outcomes() -> list[object]:
        return [(list(lower(one).programs), list(simulate(one, costs)), critical_path(one, costs)) for one in cases]

    uncompiled = outcomes()
    monkeypatch.setattr(loops, "COMPILED_FROM", 0)
    assert outcomes() == uncompiled


SIMULATE = """
from counterflow import Costs, dualpipe, loops, simulate
loops.COMPILED_FROM = 0
print(simulate(dualpipe(2, 4), Costs()).makespan_ns)
"""


def test_loops_are_compiled_where_no_cache_can_be_written(tmp_path: Path) -> None:
    nowhere = tmp_path / "a file, not a folder"
    nowhere.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", SIMULATE],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"NUMBA_CACHE_DIR": str(nowhere), "PATH": ""},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "12000\n", "")
