"""Chrome traces: out and in without loss, every slice where viewers show it, and only in what we wrote."""

import json
import tempfile
from collections import defaultdict
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from counterflow import Costs, Timeline, dualpipe, simulate
from counterflow.errors import TimelineError
from counterflow.timeline import Span, from_chrome, read_chrome, to_chrome, write_chrome
from strategies import timelines

ODD_NAMES = [
    '"quoted"',
    "back\\slash",
    "<script>alert(1)</script>",
    "naïve ⏱ 流水线",
    "line\nbreak",
    "\0",
    "\ud800",
    "",
]


@given(timelines())
@example(Timeline.from_spans(Span(rank, name, 0, 1, lane=name) for rank, name in enumerate(ODD_NAMES)))
@example(Timeline.from_spans([]))
def test_a_trace_brings_its_timeline_back(timeline: Timeline) -> None:
    assert from_chrome(json.loads(json.dumps(to_chrome(timeline)))) == timeline


@given(timelines())
def test_a_file_brings_its_timeline_back(timeline: Timeline) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        write_chrome(timeline, path)
        assert read_chrome(path) == timeline


LONGEST_NS = 2**42 * 1000


@given(
    st.integers(0, LONGEST_NS), st.integers(0, LONGEST_NS), st.sampled_from([0, -(2**61), 1_700_000_000_000_000_000])
)
@example(LONGEST_NS, LONGEST_NS - 1, 1_700_000_000_000_000_001)
def test_not_a_nanosecond_is_lost_over_fifty_days(one: int, other: int, origin: int) -> None:
    start, end = sorted((one, other))
    timeline = Timeline.from_spans([Span(0, "first", origin, origin), Span(0, "a", origin + start, origin + end)])
    assert from_chrome(json.loads(json.dumps(to_chrome(timeline)))) == timeline


def test_what_would_lose_nanoseconds_is_not_written() -> None:
    timeline = Timeline.from_spans([Span(0, "a", 0, LONGEST_NS + 1)])
    with pytest.raises(TimelineError) as caught:
        to_chrome(timeline)
    assert str(caught.value) == (
        f"the timeline is {LONGEST_NS + 1} ns long; a Chrome trace keeps nanoseconds up to {LONGEST_NS} ns (50 days): "
        "split it"
    )


def test_ranks_are_processes_and_lanes_their_threads() -> None:
    timeline = Timeline.from_spans(
        [Span(0, "0F0", 1500, 2750), Span(1, "1F0", 2750, 4000), Span(1, "send", 2000, 3000, "communication")]
    )
    trace = to_chrome(timeline)
    assert (trace["format"], trace["displayTimeUnit"], trace["baseTimeNanoseconds"]) == (1, "ms", 1500)
    named = {
        (event["name"], event["pid"], event.get("tid")): event["args"]
        for event in trace["traceEvents"]
        if event["ph"] == "M"
    }
    assert named["process_name", 1, None] == {"name": "rank 1"}
    assert named["process_sort_index", 1, None] == {"sort_index": 1}
    assert named["thread_name", 1, 0] == {"name": "communication"}
    assert named["thread_name", 1, 1] == {"name": "compute"}
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(one["name"], one["pid"], one["tid"], one["ts"], one["dur"]) for one in slices] == [
        ("0F0", 0, 1, 0.0, 1.25),
        ("send", 1, 0, 0.5, 1.0),
        ("1F0", 1, 1, 1.25, 1.25),
    ]
    assert slices[1]["cat"] == "kernel"
    assert slices[1]["args"] == {"device": 1, "stream": 0, "counterflow_lane": "communication"}


def exact_ns(microseconds: float) -> int:
    return int(Decimal(repr(microseconds)) * 1000)


def by_thread(trace: dict) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Start and end of the slices of each process and thread, in the order of the file."""
    threads = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            start = exact_ns(event["ts"])
            threads[event["pid"], event["tid"]].append((start, start + exact_ns(event["dur"])))
    return threads


@given(timelines())
def test_no_slice_overlaps_another_one_of_its_thread(timeline: Timeline) -> None:
    for slices in by_thread(to_chrome(timeline)).values():
        assert all(one[1] <= two[0] for one, two in pairwise(slices))


@given(timelines())
def test_every_thread_with_slices_has_the_name_of_their_lane_and_a_place(timeline: Timeline) -> None:
    trace = to_chrome(timeline)
    told = {
        (event["name"], event["pid"], event["tid"]): event["args"] for event in trace["traceEvents"] if "tid" in event
    }
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            thread = (event["pid"], event["tid"])
            assert told["thread_name", *thread] == {"name": event["args"]["counterflow_lane"]}
            assert told["thread_sort_index", *thread] == {"sort_index": event["tid"]}


def test_what_runs_at_once_stands_on_threads_below_each_other() -> None:
    #             0    5    10   15
    timeline = Timeline.from_spans(
        [
            Span(0, "a", 0, 10),  # ---------
            Span(0, "b", 5, 6),   #      -
            Span(0, "c", 6, 15),  #       ---------
            Span(0, "d", 10, 12),
            Span(0, "e", 7, 7),
            Span(0, "sum", 0, 5, "twins"),
        ]
    )  # fmt: skip
    threads = {event["name"]: event["tid"] for event in to_chrome(timeline)["traceEvents"] if event["ph"] == "X"}
    assert threads == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 2, "sum": 3}


def test_other_events_are_passed_over() -> None:
    timeline = simulate(dualpipe(2, 4), Costs())
    trace = to_chrome(timeline)
    trace["traceEvents"] += [
        {"ph": "i", "name": "marker", "ts": 3},
        {"ph": "M", "name": "process_labels"},
        {"ph": None},
    ]
    assert from_chrome(trace) == timeline


# --- what is refused ----------------------------------------------------------------------------------------

LANE = {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "compute"}}
EVENT = {"ph": "X", "name": "0F0", "pid": 0, "tid": 0, "ts": 0, "dur": 1}
NO_TRACE = 'this is no Chrome trace: it needs an object with a list "traceEvents"'


def trace_of(*events: object, **fields: object) -> dict[str, object]:
    return {"traceEvents": [LANE, *events], **fields}


def no_event(reason: str) -> str:
    return (
        f"event 1 of the trace is not one that counterflow writes ({reason}); "
        'an "X" event has name, pid, tid, ts and dur, and its thread a name'
    )


BEYOND = (
    "span '0F0' lies beyond rank 65535 or more than 146 years from its origin; correct its rank and times (nanoseconds)"
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, NO_TRACE),
        ([EVENT], NO_TRACE),
        ({}, NO_TRACE),
        ({"traceEvents": None}, NO_TRACE),
        ({"traceEvents": {"0": EVENT}}, NO_TRACE),
        (trace_of(format=2), "the trace has format 2; this version reads format 1"),
        (trace_of(format=[[[[[[[[]]]]]]]]), "the trace has format [[[[[[[...]]]]]]]; this version reads format 1"),
        (
            trace_of(EVENT, baseTimeNanoseconds=1.5),
            "the trace has baseTimeNanoseconds 1.5; it needs a whole number",
        ),
        (
            trace_of(EVENT, baseTimeNanoseconds=None),
            "the trace has baseTimeNanoseconds None; it needs a whole number",
        ),
        (
            trace_of(EVENT, baseTimeNanoseconds=float("nan")),
            "the trace has baseTimeNanoseconds nan; it needs a whole number",
        ),
        (trace_of(EVENT, baseTimeNanoseconds=10**30), BEYOND),
        (trace_of(None), no_event("TypeError: 'NoneType' object is not subscriptable")),
        (trace_of([]), no_event("TypeError: list indices must be integers or slices, not str")),
        (trace_of({}), no_event("KeyError: 'ph'")),
        (trace_of({"ph": "X"}), no_event("KeyError: 'ts'")),
        (trace_of({"ph": "M"}), no_event("KeyError: 'name'")),
        (trace_of({**LANE, "args": None}), no_event("TypeError: 'NoneType' object is not subscriptable")),
        (trace_of({**LANE, "args": {"name": 3}}), no_event("TypeError: a name is text, not int")),
        (trace_of({**LANE, "pid": []}), no_event("TypeError: unhashable type: 'list'")),
        (trace_of({**EVENT, "name": None}), no_event("TypeError: a name is text, not NoneType")),
        (trace_of({**EVENT, "tid": 7}), no_event("KeyError: (0, 7)")),
        (trace_of({**EVENT, "pid": 1}), no_event("KeyError: (1, 0)")),
        (trace_of({**EVENT, "pid": {}}), no_event("TypeError: unhashable type: 'dict'")),
        (trace_of({**EVENT, "pid": 0.0}), no_event("TypeError: 'float' object cannot be interpreted as an integer")),
        (trace_of({**EVENT, "ts": "3"}), no_event("TypeError: a time is a number, not str")),
        (trace_of({**EVENT, "ts": [1]}), no_event("TypeError: a time is a number, not list")),
        (trace_of({**EVENT, "ts": float("nan")}), no_event("ValueError: cannot convert float NaN to integer")),
        (
            trace_of({**EVENT, "dur": float("inf")}),
            no_event("OverflowError: cannot convert float infinity to integer"),
        ),
        (trace_of({**EVENT, "ts": 1e300}), BEYOND),
        (trace_of({**EVENT, "ts": 10**4000, "dur": -(10**4000)}), BEYOND),
        (
            trace_of({**EVENT, "dur": -1}),
            "span '0F0' of rank 0 runs from 0 to -1000 ns; "
            "a span needs a rank from 0 and an end that is not before its start",
        ),
        (trace_of({**LANE, "pid": 10**12}, {**EVENT, "pid": 10**12}), BEYOND),
    ],
)
def test_a_trace_that_is_not_ours_is_refused(data: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(TimelineError) as caught:
        from_chrome(data)
    assert str(caught.value) == message
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TimelineError) as caught:
        read_chrome(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"0F0,0B0",
        pytest.param(b"[" * 100_000, id="nested deeply"),
        pytest.param(b'{"traceEvents": [' + b"1" * 5000 + b"]}", id="5000 digits"),
    ],
)
def test_a_file_that_is_not_json_is_refused(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(contents)
    with pytest.raises(TimelineError, match=r"trace.json cannot be read as a Chrome trace: "):
        read_chrome(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("missing.json", "nul\0.json"):
        with pytest.raises(TimelineError, match="cannot be read as a Chrome trace"):
            read_chrome(tmp_path / name)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4
)


@given(st.sampled_from([*EVENT, "args"]), values, st.booleans())
def test_no_value_of_a_field_breaks_the_reader(name: str, value: object, in_lane: bool) -> None:
    lane, event = ({**LANE, name: value}, EVENT) if in_lane else (LANE, {**EVENT, name: value})
    try:
        timeline = from_chrome({"traceEvents": [lane, event], "baseTimeNanoseconds": 5})
    except TimelineError:
        return
    timeline.bubble_ns()
    assert from_chrome(to_chrome(timeline)) == timeline
