"""Sums of gradients over twins: the executor names the work on them, and traces give their costs."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from counterflow import Costs, Timeline, dualpipe, simulate
from counterflow.timeline import TWINS, TWINS_OF, Span
from counterflow.trace import Trace, measured_pipeline, open_trace, trace_costs
from ranks import START_NS, behind_one_another, gpu_events, named_ranges, shifted, spans_of, us, write
from runtime.cases import ordinary_case
from traces import Data, annotation, kernel, launch

COSTS = Costs(30, 60, None, 25, 80, latency_us=4, twins_us=7)
SCHEDULE = dualpipe(4, 8)
UNKNOWN = "the sum of gradients over twins, which no range in a trace of one rank names"


def sums_of(rank: int, step: Timeline) -> list[Span]:
    return sorted(span for span in step if span.rank == rank and span.lane == TWINS)


def in_two(span: Span) -> list[Span]:
    """As the executor names it: what it does before it waits for the other twin, and what it does after that."""
    return [span._replace(end_ns=span.start_ns + 500), span._replace(start_ns=span.end_ns - 900)]


def on_cpu(rank: int, steps: list[Timeline]) -> list[Data]:
    return named_ranges([half for step in steps for span in sums_of(rank, step) for half in in_two(span)])


def on_gpu(rank: int, steps: list[Timeline]) -> list[Data]:
    """The CPU is through before the GPU starts; a step's sums stand behind the ranges of its actions."""
    events = []
    actions = [len(spans_of(rank, steps[: count + 1])) for count in range(len(steps))]
    for count, step in zip(actions, steps, strict=True):
        for number, half in enumerate([half for span in sums_of(rank, step) for half in in_two(span)]):
            at = us(1000 * (9 * count + 4) + 60 * number)
            own = 10_000 + 100 * count + number
            events += [annotation(half.name, at, us(50)), launch(at + us(10), own, dur=us(5))]
            events.append(kernel("add", 7, us(START_NS + half.start_ns), us(half.duration_ns), own))
    return events


def traces(folder: Path, steps: list[Timeline], gpu: bool) -> list[Trace]:
    make, sums = (gpu_events, on_gpu) if gpu else (named_ranges, on_cpu)
    ranks = range(SCHEDULE.num_ranks)
    return write(folder, [make(spans_of(rank, steps)) + sums(rank, steps) for rank in ranks])


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_their_costs_are_those_that_the_traces_were_made_with(tmp_path: Path, gpu: bool) -> None:
    steps = behind_one_another(simulate(SCHEDULE, COSTS), 3)
    found = trace_costs(traces(tmp_path, steps, gpu))
    assert {stage: found.costs.twins_ns(stage) for stage in SCHEDULE.twins} == dict.fromkeys(SCHEDULE.twins, 7_000)
    assert UNKNOWN not in found.not_told
    assert simulate(SCHEDULE, found.costs).makespan_ns == steps[0].makespan_ns


def test_a_rank_that_waits_for_its_twin_does_not_make_the_sum_longer(tmp_path: Path) -> None:
    step = simulate(SCHEDULE, COSTS)
    early = [
        span._replace(start_ns=span.start_ns - 300) if (span.rank, span.lane) == (0, TWINS) else span for span in step
    ]
    found = trace_costs(traces(tmp_path, [Timeline.from_spans(early)], gpu=False))
    assert found.costs.twins_ns(0) == 7_000


def test_sums_of_a_step_that_was_not_recorded_whole_do_not_count(tmp_path: Path) -> None:
    step = simulate(SCHEDULE, COSTS)
    cut = Timeline.from_spans(s for s in step if s.lane == TWINS)
    found = measured_pipeline(write(tmp_path, [
        on_cpu(rank, [shifted(cut, -10_000_000)]) + named_ranges(spans_of(rank, [step])) + on_cpu(rank, [step])
        for rank in range(SCHEDULE.num_ranks)
    ]))  # fmt: skip
    assert found is not None
    assert len(found.sums) == sum(map(len, SCHEDULE.twins.values()))


def test_without_ranges_of_sums_it_is_said_that_they_are_not_known(tmp_path: Path) -> None:
    steps = [simulate(SCHEDULE, COSTS)]
    found = trace_costs(write(tmp_path, [named_ranges(spans_of(rank, steps)) for rank in range(SCHEDULE.num_ranks)]))
    assert UNKNOWN in found.not_told


# --- the executor ---------------------------------------------------------------------------------------------


def test_the_executor_names_the_work_on_sums_and_no_range_holds_another_ranks(tmp_path: Path) -> None:
    case = ordinary_case("dualpipe", 2, 4)
    pipeline = case.in_process()
    data = case.steps[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recording:
        pipeline.step(data.inputs, data.targets)
    recording.export_chrome_trace(str(tmp_path / "trace.json"))
    found = open_trace(tmp_path / "trace.json")
    columns = found.annotations
    times = zip(columns.start_ns.tolist(), columns.end_ns.tolist(), columns.name.tolist(), strict=True)
    ranges = [(start, end, found.names[name]) for start, end, name in times]
    sums = [one for one in ranges if one[2].startswith("twins")]
    assert {name for *_, name in sums} == {TWINS_OF.format(stage) for stage in case.schedule.twins}
    # Both ranks work on both sums, each of which waits for the other's gradients at least twice.
    assert len(sums) >= 2 * 2 * 3
    actions = [one for one in ranges if one[2][0] in "(0123456789"]
    assert all(one[1] <= two[0] for one, two in pairwise(sorted(sums + actions)))
