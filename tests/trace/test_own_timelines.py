"""Simulate, write, read, measure: the figures of the simulator come back to the nanosecond."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Costs, Schedule, Timeline, open_trace, simulate
from counterflow.schedule import GENERATORS, generate
from counterflow.timeline import COMPUTE, Span, read_chrome, write_chrome
from counterflow.trace import exposures
from strategies import costs_of, generated_schedules, random_schedules, timelines


@st.composite
def schedules_and_costs(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    schedule = draw(generated_schedules(most_ranks=4, most_microbatches=8) | random_schedules())
    return schedule, draw(costs_of(schedule.num_stages))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("own") / "timeline.json"


def instants(spans: list[Span], compute: bool) -> set[int]:
    return {t for s in spans if (s.lane == COMPUTE) is compute for t in range(s.start_ns, s.end_ns)}


def rebuilt(path: Path) -> list[tuple[int, int, int, str, bool]]:
    """What the reader of traces makes of a file, sorted."""
    found = open_trace(path)
    rows = [(device, s, e, found.names[name], kind == 3) for s, e, name, kind, device, *_ in found.work.tuples()]
    return sorted(rows)


def spelt(timeline: Timeline) -> list[tuple[int, int, int, str, bool]]:
    return sorted((s.rank, s.start_ns, s.end_ns, s.name, s.lane == COMPUTE) for s in timeline)


@given(schedules_and_costs())
@settings(max_examples=60)
def test_the_bubble_of_every_rank_comes_back(path: Path, case: tuple[Schedule, Costs]) -> None:
    timeline = simulate(*case)
    write_chrome(timeline, path)
    read = read_chrome(path)
    assert read == timeline
    assert read.bubble_ns().tolist() == timeline.bubble_ns().tolist()
    assert read.busy_ns("twins").tolist() == timeline.busy_ns("twins").tolist()
    assert rebuilt(path) == spelt(timeline)


@given(timelines())
@settings(max_examples=60)
def test_the_reader_of_traces_sees_the_same_times(path: Path, timeline: Timeline) -> None:
    write_chrome(timeline, path)
    # Bytes that are no text in any encoding come back as they can.
    assert [row[:3] + row[4:] for row in rebuilt(path)] == [row[:3] + row[4:] for row in spelt(timeline)]


def test_huge_epochs_lose_nothing(path: Path) -> None:
    for origin in (1_700_000_000_123_456_789, 2**61 + 1, -(2**61) + 1, -17):
        timeline = Timeline.from_spans([Span(0, "0F0", origin, origin + 1), Span(1, "0F0", origin + 3, origin + 2**41)])
        write_chrome(timeline, path)
        assert read_chrome(path) == timeline
        assert rebuilt(path) == spelt(timeline)
        assert open_trace(path).warnings == ()


@pytest.mark.parametrize("name", GENERATORS)
def test_trace_overlap_tells_what_the_simulator_knows(name: str, path: Path, out) -> None:
    costs = Costs(latency_us=0.3, bandwidth_gb_per_s=2, transfer_bytes=900, twins_us=0.7)
    timeline = simulate(generate(name, 4, 8), costs)
    write_chrome(timeline, path)
    spans = list(timeline)
    step_ns = max(s.end_ns for s in spans if s.lane == COMPUTE) - min(s.start_ns for s in spans)
    for gpu in json.loads(out("trace", "overlap", path, "--json"))["traces"]:
        own = [span for span in spans if span.rank == gpu["device"]]
        compute, twins = instants(own, compute=True), instants(own, compute=False)
        start, end = min(s.start_ns for s in spans), max(s.end_ns for s in spans)
        told = {key: round(gpu[key] * 1000) for key in gpu if key.endswith("_us")}
        assert told["window_us"] == end - start
        assert step_ns - told["compute_us"] == timeline.bubble_ns()[gpu["device"]]
        assert told["communication_us"] == len(twins)
        assert told["exposed_communication_us"] == len(twins - compute)
        assert told["idle_us"] == end - start - len(compute | twins)
        assert twins or told["idle_us"] == timeline.bubble_ns()[gpu["device"]]
        assert gpu["warnings"] == []


def test_a_timeline_cut_short_tells_what_stands_before_the_cut(path: Path) -> None:
    write_chrome(simulate(generate("1f1b", 2, 4), Costs()), path)
    text = path.read_text()
    path.write_text(text[: len(text) - 200])
    found = open_trace(path)
    assert "the file ends before its events do: figures are of what stands before the cut" in found.warnings
    assert [gpu.communication_us for gpu in exposures(found)] == [0, 0]
    assert len(found.work) == 14
