"""Pipelines whose actions nobody named: the bubble lies between the two bounds, and they say what they rest on."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Costs, Schedule, one_f_one_b, open_trace, simulate
from counterflow.errors import TraceError
from counterflow.trace import ASSUMPTIONS, bubble_bounds, measured_pipeline
from ranks import behind_one_another, gpu_events, spans_of, us, write
from strategies import generated_schedules
from traces import annotation, kernel, launch, real_trace


@settings(max_examples=20)
@given(generated_schedules(4, 8), st.integers(0, 5_000), st.integers(0, 9))
def test_the_bubble_lies_between_the_bounds(schedule: Schedule, gap_ns: int, latency_us: int) -> None:
    """Inside each action the GPU stands still for a moment; before each one it receives."""
    step = simulate(schedule, Costs(30, 60, None, 25, 80, latency_us=latency_us))
    ranks = range(schedule.num_ranks)
    with TemporaryDirectory() as folder:
        events = [gpu_events(spans_of(rank, [step]), named=False, gap_ns=gap_ns) for rank in ranks]
        traces = write(Path(folder), events)
        assert measured_pipeline(traces) is None
        bounds, _ = bubble_bounds(traces)
    assert [one.rank for one in bounds] == list(ranks)
    for one, bubble_ns in zip(bounds, step.bubble_ns().tolist(), strict=True):
        assert one.least_us <= bubble_ns / 1000 <= one.most_us
        assert one.window_us == pytest.approx(one.compute_us + one.most_us)
        assert 0 <= one.moving_us <= one.least_us


def test_without_gaps_in_actions_and_with_a_receive_before_each_the_bounds_differ_by_the_ends_alone(
    tmp_path: Path,
) -> None:
    step = simulate(one_f_one_b(3, 5), Costs(30, 60, latency_us=2))
    bounds, _ = bubble_bounds(
        write(tmp_path, [gpu_events(spans_of(rank, [step]), named=False, gap_ns=0) for rank in range(3)])
    )
    for rank, one in enumerate(bounds):
        spans = spans_of(rank, [step])
        ends_ns = step.makespan_ns - (spans[-1].end_ns - spans[0].start_ns)
        assert one.most_us * 1000 == step.bubble_ns()[rank]
        assert one.uncertainty_us * 1000 == pytest.approx(ends_ns)


def test_the_profiler_s_steps_are_told_apart_and_share_a_window(tmp_path: Path) -> None:
    def step(number: int, start: int) -> list:
        return [
            annotation(f"ProfilerStep#{number}", 10 * number, 9),
            launch(10 * number + 1, number),
            kernel("gemm", 7, start, 20, number),
        ]

    bounds, _ = bubble_bounds(
        write(tmp_path, [step(4, 100) + step(5, 200), step(4, 110) + step(5, 230)], deviceProperties=[])
    )
    assert [(one.step, one.rank, one.window_us, one.most_us) for one in bounds] == [
        ("ProfilerStep#4", 0, 30, 10),
        ("ProfilerStep#4", 1, 30, 10),
        ("ProfilerStep#5", 0, 50, 30),
        ("ProfilerStep#5", 1, 50, 30),
    ]


def test_of_a_receive_no_more_can_have_moved_data_than_the_shortest_took(tmp_path: Path) -> None:
    receive = "ncclDevKernel_SendRecv(int)"
    events = [
        kernel("gemm", 7, 0, 10), kernel(receive, 20, 10, 3), kernel("gemm", 7, 13, 10), kernel(receive, 20, 23, 40),
        kernel("gemm", 7, 63, 10),
    ]  # fmt: skip
    bounds, _ = bubble_bounds(write(tmp_path, [events]))
    assert (bounds[0].least_us, bounds[0].moving_us, bounds[0].num_messages) == (43, 6, 2)


def test_other_communication_beside_a_receive_is_not_surely_bubble(tmp_path: Path) -> None:
    events = [
        kernel("gemm", 7, 0, 10),
        kernel("ncclDevKernel_SendRecv(int)", 20, 10, 10),
        kernel("ncclDevKernel_AllReduce(int)", 21, 15, 10),
        kernel("gemm", 7, 30, 10),
    ]
    bounds, _ = bubble_bounds(write(tmp_path, [events]))
    assert (bounds[0].least_us, bounds[0].most_us) == (5, 20)


def test_a_gap_that_no_message_ends_is_not_surely_bubble(tmp_path: Path) -> None:
    receive = "ncclDevKernel_SendRecv(int)"
    events = [
        kernel("gemm", 7, 0, 10), kernel(receive, 20, 5, 20), kernel("gemm", 7, 12, 5), kernel("gemm", 7, 26, 10),
    ]  # fmt: skip
    bounds, _ = bubble_bounds(write(tmp_path, [events]))
    assert (bounds[0].least_us, bounds[0].most_us) == (8, 11)


def test_what_is_sent_behind_the_last_action_is_in_the_least_and_the_assumptions_say_so(tmp_path: Path) -> None:
    sums = "ncclDevKernel_SendRecv(int)"
    events = [kernel("gemm", 7, 0, 10), kernel(sums, 20, 10, 6), kernel("add", 7, 16, 1)]  # the gradients of twins
    bounds, _ = bubble_bounds(write(tmp_path, [events]))
    assert (bounds[0].least_us, bounds[0].most_us) == (6, 6)
    assert any("twins" in assumption for assumption in ASSUMPTIONS)


def test_the_published_profile_has_no_message_and_little_else_than_computing() -> None:
    bounds, _ = bubble_bounds([open_trace(real_trace("deepseek_train.json.gz"))])
    assert [(one.window_us, one.compute_us, one.least_us, one.num_messages) for one in bounds] == [
        (129_012, 124_310, 0, 0)
    ]


def test_a_trace_of_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"names no actions and has no compute kernels, .*; profile with"):
        bubble_bounds(write(tmp_path, [[annotation("forward", us(0), 5)]]))


def test_several_steps_without_a_profiler_s_name_are_one_window(tmp_path: Path) -> None:
    steps = behind_one_another(simulate(one_f_one_b(3, 5), Costs(30, 60)), 2)
    bounds, _ = bubble_bounds(write(tmp_path, [gpu_events(spans_of(rank, steps), named=False) for rank in range(3)]))
    assert {one.step for one in bounds} == {""}
