"""Costs out of traces: those that the traces were made with, and the sentences on what they do not tell."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Costs, Schedule, one_f_one_b, open_trace, simulate
from counterflow.errors import TraceError
from counterflow.schedule import Kind
from counterflow.trace import trace_costs
from ranks import behind_one_another, gpu_events, named_ranges, spans_of, us, write
from strategies import generated_schedules
from traces import Data, annotation, kernel, launch, real_trace


@settings(max_examples=20)
@given(generated_schedules(4, 8), st.booleans(), st.lists(st.integers(1, 90), min_size=8, max_size=8))
def test_traces_tell_the_costs_that_they_were_made_with(schedule: Schedule, gpu: bool, durations: list[int]) -> None:
    stages = schedule.num_stages
    per_stage = tuple((durations * 2)[:stages])
    costs = Costs(per_stage, tuple(2 * us + 1 for us in per_stage), None, per_stage, 100, latency_us=3)
    steps = behind_one_another(simulate(schedule, costs), 2)
    make = gpu_events if gpu else named_ranges
    with TemporaryDirectory() as folder:
        ranks = range(schedule.num_ranks)
        found = trace_costs(write(Path(folder), [make(spans_of(rank, steps)) for rank in ranks]))
    for action in {action for row in schedule.rows for action in row}:
        assert found.costs.duration_ns(action) == costs.duration_ns(action)
    # Where no rank ever waited for another, nothing tells the latency.
    assert found.costs.latency_us in (0, 3)
    assert simulate(schedule, found.costs).makespan_ns <= steps[0].makespan_ns


def sent(start: int, rows: int = 4, end: int = 9_000) -> Data:
    told = {"Input Dims": [[rows, 8]], "Input type": ["c10::BFloat16"]}
    return annotation("gloo:send", us(start), us(end)) | {"args": told}


def test_the_bytes_of_a_boundary_are_those_sent_behind_its_forwards(tmp_path: Path) -> None:
    first = [annotation(text, 10 * i, 9) for i, text in enumerate(("0F0", "0F1", "0B0", "0B1"))]
    first += [sent(9_500), sent(19_500)]
    second = [annotation(text, 10 * i, 9) for i, text in enumerate(("1F0", "1F1", "1B0", "1B1"))]
    second += [sent(29_500, rows=5), sent(39_500, rows=5)]
    found = trace_costs(write(tmp_path, [first, second]))
    assert found.costs.transfer_bytes == (64, 0)
    assert not any("record_shapes" in line for line in found.not_told)


def test_torch_s_sends_are_told_by_their_own_ranges(tmp_path: Path) -> None:
    first = [annotation(text, 10 * i, 9) for i, text in enumerate(("PP:0F0", "PP:0B0", "PP:0SEND_F0"))]
    found = trace_costs(
        write(tmp_path, [[*first, sent(21_000)], [annotation("PP:1F0", 0, 3), annotation("PP:1B0", 3, 3)]])
    )
    assert found.costs.transfer_bytes == (64, 0)
    assert found.source == "the ranges of torch's pipeline runtime: 1 step of 2 ranks"


def test_what_traces_do_not_tell_is_said(tmp_path: Path) -> None:
    steps = [simulate(one_f_one_b(2, 3), Costs())]
    found = trace_costs(write(tmp_path, [named_ranges(spans_of(rank, steps)) for rank in range(2)]))
    assert found.not_told == (
        "the bandwidth of the wire: what messages take is in the latency",
        "what a micro-batch stores, in bytes",
        "the bytes of a message: record with record_shapes=True",
    )


# --- chunks ---------------------------------------------------------------------------------------------------


def chunk(names: list[str], at: int) -> list[Data]:
    """Phases that each launch a kernel of 10 µs, one behind the other, and what holds them."""
    events = [annotation("chunk", at, 10 * len(names))]
    for index, name in enumerate(names):
        start, number = at + 10 * index, at + index + 1
        events += [annotation(name, start + 1, 8), launch(start + 2, number), kernel("gemm", 7, start + 5, 10, number)]
    return events


def test_phases_of_chunks_give_what_a_chunk_takes(tmp_path: Path) -> None:
    names = ["attn(F)", "mlp(B)", "mlp(W)", "mlp(F)"]
    found = trace_costs(write(tmp_path, [chunk(names, 0) + chunk(names, 1000)]))
    costs = found.costs
    assert (costs.forward_us, costs.input_us, costs.weight_us, costs.overlapped_us) == (20, 10, 10, 40)
    assert costs.given(Kind.B, 0) is None
    assert found.source.startswith("the phases of 2 chunks in ")


def test_without_a_phase_of_weights_the_backward_is_whole(tmp_path: Path) -> None:
    costs = trace_costs(write(tmp_path, [chunk(["attn(F)", "attn(B)"], 0)])).costs
    assert (costs.forward_us, costs.backward_us, costs.input_us, costs.weight_us) == (10, 10, None, None)


def test_forwards_alone_make_no_pair(tmp_path: Path) -> None:
    found = trace_costs(write(tmp_path, [chunk(["attn(F)", "mlp(F)"], 0)]))
    assert (found.costs.forward_us, found.costs.overlapped_us) == (20, None)
    assert found.not_told[-1] == "F&B: no annotation holds a forward and a backward"


def test_the_published_profile_gives_the_pair_and_its_parts() -> None:
    costs = trace_costs([open_trace(real_trace("deepseek_train.json.gz"))]).costs
    assert costs.overlapped_us == 129_012
    # Four layers: what the facts give as means of a layer, computing and communicating.
    assert costs.forward_us == pytest.approx(4 * (4_370 + 6_690 + 4_604 + 8_684), rel=1e-3)
    assert costs.weight_us == pytest.approx(4 * (5_063 + 2_388), rel=1e-3)
    assert costs.input_us == pytest.approx(4 * (5_769 + 5_306 + 7_487 + 9_341), rel=1e-2)


def test_neither_actions_nor_phases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TraceError, match=r"names neither actions \(such as 3F12\) nor phases .*; run the pipeline with"
    ):
        trace_costs(write(tmp_path, [[annotation("forward", 0, 5), kernel("gemm", 7, 0, 5)]]))
