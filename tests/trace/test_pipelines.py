"""Pipelines out of traces: what ran is rebuilt from the ranges that name it, and timed as it ran."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Action, Costs, Schedule, Timeline, dualpipev, gpipe, one_f_one_b, simulate, zb1p
from counterflow.errors import TraceError
from counterflow.schedule import generate
from counterflow.simulator import bubble_phases
from counterflow.timeline import Span, write_chrome
from counterflow.trace import MeasuredPipeline, Trace, measured_pipeline, open_traces
from ranks import (
    START_NS,
    all_reduce,
    behind_one_another,
    from_start,
    gpu_events,
    named_ranges,
    shifted,
    spans_of,
    us,
    write,
)
from strategies import generated_schedules
from traces import annotation, kernel, launch

COSTS = Costs(30, 60, None, 25, 80, latency_us=4)


def pipeline(traces: list[Trace], schedule: Schedule | None = None) -> MeasuredPipeline:
    found = measured_pipeline(traces, schedule)
    assert found is not None
    return found


def profiled(folder: Path, schedule: Schedule, steps: list[Timeline], gpu: bool = False) -> list[Trace]:
    make = gpu_events if gpu else named_ranges
    return write(folder, [make(spans_of(rank, steps)) for rank in range(schedule.num_ranks)])


# --- what ran -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(generated_schedules(4, 9), st.booleans(), st.integers(1, 3))
def test_the_ranges_of_a_simulated_step_give_back_the_schedule_and_its_very_times(
    schedule: Schedule, gpu: bool, count: int
) -> None:
    step = simulate(schedule, COSTS)
    with TemporaryDirectory() as folder:
        found = pipeline(profiled(Path(folder), schedule, behind_one_another(step, count), gpu))
    assert (found.schedule, found.problem) == (schedule, None)
    # Where several generators give the same rows, the first of them names it.
    assert generate(found.schedule.name, schedule.num_ranks, schedule.num_microbatches) == schedule
    assert [from_start(one) for one in found.steps] == [from_start(step)] * count
    assert from_start(found.mean_step) == from_start(step)
    assert found.cut == 0


def test_the_bubble_and_its_phases_are_the_simulators(tmp_path: Path) -> None:
    schedule = dualpipev(4, 8)
    step = simulate(schedule, COSTS)
    found = pipeline(profiled(tmp_path, schedule, [step], gpu=True)).steps[0]
    assert found.bubble_ns().tolist() == step.bubble_ns().tolist()
    for ours, theirs in zip(bubble_phases(found), bubble_phases(step), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_a_timeline_that_counterflow_wrote_is_read_the_same_way(tmp_path: Path) -> None:
    schedule = zb1p(3, 6)
    step = simulate(schedule, COSTS)
    write_chrome(step, tmp_path / "step.json")
    found = pipeline(open_traces(tmp_path / "step.json"))
    assert found.schedule == schedule
    assert found.steps == (step,)


def test_one_process_with_all_ranks_is_dealt_out_by_the_schedule(tmp_path: Path) -> None:
    schedule = dualpipev(2, 4)
    step = simulate(schedule, COSTS)
    spans = [Span(0, s.name, s.start_ns, s.end_ns) for rank in range(2) for s in spans_of(rank, [step])]
    traces = write(tmp_path, [named_ranges(spans)])
    found = pipeline(traces, schedule)
    assert found.schedule == schedule
    assert from_start(found.steps[0]) == from_start(step)
    assert not found.warnings
    with pytest.raises(TraceError, match=r"has 0F0, which custom has not; give the schedule that ran"):
        measured_pipeline(traces, Schedule.from_rows([[Action.parse("5F0")]]))


def test_all_stages_in_one_trace_are_taken_for_one_rank_and_that_is_said(tmp_path: Path) -> None:
    rows = [Action.parse(text) for text in ("0F0", "1F0", "1B0", "0B0")]
    spans = [Span(0, str(action), 10 * i, 10 * i + 9) for i, action in enumerate(rows)]
    found = pipeline(write(tmp_path, [named_ranges(spans)]))
    assert found.schedule.num_ranks == 1
    assert "has all 2 stages and is taken for one rank" in found.warnings[0]


def test_a_missing_rank_is_said_and_the_others_are_measured(tmp_path: Path) -> None:
    step = simulate(one_f_one_b(3, 4), COSTS)
    found = pipeline(write(tmp_path, [named_ranges(spans_of(rank, [step])) for rank in (0, 2)]))
    assert found.problem is not None
    assert "waits for ranks without a trace cannot be named" in found.warnings[0]
    assert found.steps[0].busy_ns().tolist() == step.busy_ns()[[0, 2]].tolist()


def test_a_trace_without_named_actions_is_none(tmp_path: Path) -> None:
    assert measured_pipeline(write(tmp_path, [[annotation("forward_step", 1, 5)]])) is None


# --- steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "gpipe", "dualpipev", "zbv", "interleaved-1f1b"])
@pytest.mark.parametrize(("head", "tail"), [(1, 0), (5, 3), (0, 7), (11, 11)])
def test_steps_that_the_profile_cuts_are_left_out(tmp_path: Path, name: str, head: int, tail: int) -> None:
    schedule = generate(name, 2, 6)
    step = simulate(schedule, COSTS)
    steps = behind_one_another(step, 4)
    events = []
    for rank in range(2):
        spans = spans_of(rank, steps)
        events.append(named_ranges(spans[head : len(spans) - tail]))
    found = pipeline(write(tmp_path, events))
    assert found.schedule == schedule
    # Cut is the first step, the last, both or neither.
    assert len(found.steps) == 4 - (head > 0) - (tail > 0)
    assert all(from_start(one) == from_start(step) for one in found.steps)
    assert found.cut == sum(len(one) for one in events) - len(found.steps) * len(step)


def test_ranks_that_recorded_other_steps_meet_in_those_that_they_share(tmp_path: Path) -> None:
    schedule = one_f_one_b(2, 4)
    steps = behind_one_another(simulate(schedule, COSTS), 4)
    found = pipeline(write(tmp_path, [named_ranges(spans_of(0, steps)), named_ranges(spans_of(1, steps[2:]))]))
    assert len(found.steps) == 2
    assert all(from_start(one) == from_start(steps[0]) for one in found.steps)


def test_several_traces_of_a_rank_are_cycles_of_its_profile(tmp_path: Path) -> None:
    schedule = one_f_one_b(2, 4)
    steps = behind_one_another(simulate(schedule, COSTS), 5)
    ends = [int(step.end_ns.max()) + 1000 for step in steps]
    traces = []
    for cycle, (first, last) in enumerate(((0, 2), (3, 5))):
        events = []
        for rank, offset in enumerate((0, 10**9)):
            apart = [shifted(step, offset) for step in steps[first:last]]
            reduces = [all_reduce(end - 500 + offset, end + offset) for end in ends[first:last]]
            events.append(named_ranges(spans_of(rank, apart)) + reduces)
        traces += write(tmp_path / f"cycle{cycle}", events)
    found = pipeline(traces)
    assert (found.schedule, found.ranks, found.alignment.offsets_us) == (schedule, (0, 1), (0, 10**6))
    assert [from_start(one) for one in found.steps] == [from_start(steps[0])] * 4


def test_as_many_steps_on_each_rank_need_not_be_the_same_ones(tmp_path: Path) -> None:
    schedule = one_f_one_b(2, 4)
    steps = behind_one_another(simulate(schedule, COSTS), 4)
    found = pipeline(write(tmp_path, [named_ranges(spans_of(0, steps[:3])), named_ranges(spans_of(1, steps[1:]))]))
    assert [from_start(one) for one in found.steps] == [from_start(steps[0])] * 2


def test_ranks_that_take_turns_need_not_be_at_work_at_once(tmp_path: Path) -> None:
    schedule = one_f_one_b(2, 2).forward_only()
    spans = [Span(0, f"{rank}F{m}", 0, 9) for _ in range(3) for rank in range(2) for m in range(2)]
    turns = [span._replace(start_ns=1000 * i, end_ns=1000 * i + 900) for i, span in enumerate(spans)]
    found = pipeline(write(tmp_path, [named_ranges(turns)]), schedule)
    assert (found.schedule, len(found.steps)) == (schedule, 3)


def test_an_evaluation_between_steps_is_no_step(tmp_path: Path) -> None:
    schedule = one_f_one_b(2, 4)
    train, forward = simulate(schedule, COSTS), simulate(schedule.forward_only(), COSTS)
    steps = [train, shifted(forward, 10**6), shifted(train, 2 * 10**6)]
    found = pipeline(profiled(tmp_path, schedule, steps))
    assert (len(found.steps), found.cut) == (2, len(forward))
    assert found.schedule == schedule


def test_evaluation_alone_is_a_pipeline_of_forwards(tmp_path: Path) -> None:
    schedule = one_f_one_b(2, 4).forward_only()
    found = pipeline(profiled(tmp_path, schedule, behind_one_another(simulate(schedule, COSTS), 2)))
    assert found.schedule == schedule
    assert len(found.steps) == 2


def test_the_mean_step_has_the_means_of_starts_and_ends(tmp_path: Path) -> None:
    schedule = gpipe(2, 2)
    steps = [simulate(schedule, Costs(10, 20)), shifted(simulate(schedule, Costs(20, 40)), 10**6)]
    found = pipeline(profiled(tmp_path, schedule, steps))
    assert from_start(found.mean_step) == from_start(simulate(schedule, Costs(15, 30)))
    assert len(found.every_step) == 2 * len(steps[0])


# --- GPU work -------------------------------------------------------------------------------------------------


def test_a_message_between_ranks_is_no_part_of_the_action_that_launches_it(tmp_path: Path) -> None:
    """torch's GPipe receives inside its range: the kernel waits there for the other rank."""
    events = [
        annotation("Forward 0", 0, 9),
        launch(1, 1),
        launch(2, 2),
        kernel("ncclDevKernel_SendRecv(int)", 20, 10, 90, 1),
        kernel("gemm", 7, 100, 10, 2),
        annotation("Backward 0", 10, 9),
        launch(11, 3),
        kernel("gemm", 7, 120, 20, 3),
    ]
    found = pipeline(write(tmp_path, [events]))
    assert found.named_by == "torch's GPipe"
    assert [(s.name, s.duration_ns) for s in found.steps[0]] == [("0F0", 10_000), ("0B0", 20_000)]


def test_communication_at_the_ends_of_an_action_is_in_it_until_another_one_computes(tmp_path: Path) -> None:
    events = [
        annotation("0F0", 0, 9),
        *(launch(at, at) for at in (1, 2, 3)),
        kernel("void deep_ep::internode::dispatch<8>(int4*)", 27, 90, 10, 1),
        kernel("gemm", 7, 100, 10, 2),
        kernel("void deep_ep::internode::combine<8>(int4*)", 27, 110, 40, 3),
        annotation("0B0", 10, 9),
        launch(11, 11),
        kernel("gemm", 7, 130, 40, 11),
    ]
    spans = list(pipeline(write(tmp_path, [events])).steps[0])
    assert [(s.name, s.start_ns - spans[0].start_ns, s.duration_ns) for s in spans] == [
        ("0F0", 0, 40_000),
        ("0B0", 40_000, 40_000),
    ]


def test_an_action_that_launches_nothing_is_a_moment(tmp_path: Path) -> None:
    events = [
        *(annotation(text, 10 * i, 9) for i, text in enumerate(["0F0", "0I0", "0W0"])),
        launch(1, 1), launch(11, 2), kernel("gemm", 7, 100, 10, 1), kernel("gemm", 7, 120, 20, 2),
    ]  # fmt: skip
    spans = list(pipeline(write(tmp_path, [events])).steps[0])
    assert [(s.name, s.duration_ns) for s in spans] == [("0F0", 10_000), ("0I0", 20_000), ("0W0", 0)]


# --- torch's ranges -------------------------------------------------------------------------------------------


def test_torch_s_runtime_is_read_by_its_own_names_and_its_waits_are_taken_off(tmp_path: Path) -> None:
    def received(start: int, end: int) -> dict:
        return annotation("gloo:recv", start, end - start)

    first = [annotation("PP:0UNSHARD", 0, 1), annotation("PP:0F0", 1, 10), annotation("PP:0SEND_F0", 11, 1)]
    first += [annotation("PP:0RECV_B0", 12, 1), received(12, 40), annotation("PP:0B0", 13, 50)]
    second = [annotation("PP:1RECV_F0", 0, 1), received(0, 15), annotation("PP:1F0", 1, 24)]
    second += [annotation("PP:1B0", 25, 13), annotation("PP:1SEND_B0", 38, 1)]
    found = pipeline(write(tmp_path, [first, second]))
    assert (found.named_by, found.schedule) == ("torch's pipeline runtime", one_f_one_b(2, 1))
    assert [(s.name, s.duration_ns) for s in found.steps[0]] == [
        ("0F0", 10_000), ("0B0", 23_000), ("1F0", 10_000), ("1B0", 13_000),
    ]  # fmt: skip
    assert "begin with the wait" in found.warnings[0]


# --- one clock ------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(st.integers(-(10**12), 10**12), min_size=3, max_size=3))
def test_clocks_that_differ_are_put_together_by_shared_collectives(offsets: list[int]) -> None:
    schedule = one_f_one_b(3, 6)
    steps = behind_one_another(simulate(schedule, COSTS), 3)
    events = []
    for rank, offset in enumerate(offsets):
        ends = [int(step.end_ns.max()) + 1000 for step in steps]
        apart = [s._replace(start_ns=s.start_ns + offset, end_ns=s.end_ns + offset) for s in spans_of(rank, steps)]
        events.append(named_ranges(apart) + [all_reduce(end - 500 + offset, end + offset) for end in ends])
    with TemporaryDirectory() as folder:
        found = pipeline(write(Path(folder), events))
    assert found.alignment.basis == "collectives"
    assert [from_start(one) for one in found.steps] == [from_start(steps[0])] * 3


@settings(max_examples=20)
@given(st.integers(-(10**9), 10**9))
def test_without_collectives_nothing_is_used_before_it_is_made(offset: int) -> None:
    schedule = one_f_one_b(2, 6)
    step = simulate(schedule, COSTS)
    second = [s._replace(start_ns=s.start_ns + offset, end_ns=s.end_ns + offset) for s in spans_of(1, [step])]
    with TemporaryDirectory() as folder:
        found = pipeline(write(Path(folder), [named_ranges(spans_of(0, [step])), named_ranges(second)]))
    start = {s.name: s.start_ns for s in found.steps[0]}
    end = {s.name: s.end_ns for s in found.steps[0]}
    for microbatch in range(6):
        assert end[f"0F{microbatch}"] <= start[f"1F{microbatch}"]
        assert end[f"1B{microbatch}"] <= start[f"0B{microbatch}"]
    assert (found.alignment.basis, found.alignment.shared) == ("actions", 0)
    # Each way a message has the latency as its room.
    assert found.alignment.error_us == 4
    assert abs(found.alignment.offsets_us[1] - offset / 1000) <= 4


def test_the_schedule_that_is_given_has_to_be_what_ran(tmp_path: Path) -> None:
    traces = profiled(tmp_path, one_f_one_b(2, 4), [simulate(one_f_one_b(2, 4), COSTS)])
    assert pipeline(traces, one_f_one_b(2, 4)).problem is None
    with pytest.raises(TraceError, match=r"rank 0, step 2: the traces have 0B0 where gpipe has 0F2; give the schedule"):
        measured_pipeline(traces, gpipe(2, 4))
    with pytest.raises(TraceError, match=r"rank 2, step 0: the traces have nothing where"):
        measured_pipeline(traces, Schedule.from_rows([*one_f_one_b(2, 4).rows, [Action.parse("2F0")]]))


# --- refusals -------------------------------------------------------------------------------------------------


def test_two_pipelines_at_once_are_refused(tmp_path: Path) -> None:
    spans = spans_of(0, [simulate(one_f_one_b(2, 2), COSTS)])
    traces = write(tmp_path, [named_ranges(spans), named_ranges(spans)])
    with pytest.raises(
        TraceError, match=r"rank000.json and .*rank001.json both have 0F0; in one pipeline every action"
    ):
        measured_pipeline(traces)


def test_less_than_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"holds no whole step: of 2 actions .*; profile at least one step"):
        measured_pipeline(write(tmp_path, [[annotation("0B0", 0, 5), annotation("0B1", 5, 5)]]))


def test_a_trace_without_names_among_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"rank001.json names no actions and .*rank000.json does; give one kind"):
        measured_pipeline(write(tmp_path, [[annotation("0F0", 0, 5)], [annotation("x", 0, 5)]]))


def test_gpu_work_that_nothing_launched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no launch record tells which GPU work is theirs; profile with"):
        measured_pipeline(write(tmp_path, [[annotation("0F0", 0, 5), kernel("gemm", 7, 3, 5)]]))


def test_actions_with_absurd_numbers_are_a_problem_and_no_catastrophe(tmp_path: Path) -> None:
    found = pipeline(write(tmp_path, [[annotation("999999F999999", 0, 5)]]))
    assert found.problem is not None


def test_times_are_those_of_the_trace(tmp_path: Path) -> None:
    found = pipeline(write(tmp_path, [[annotation("0F0", us(START_NS), 5)]]))
    assert np.diff([found.steps[0].start_ns[0], found.steps[0].end_ns[0]]).tolist() == [5_000]
