"""Phases inside a CUDA graph are those of the annotations on the GPU's own time; other work keeps its own."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import open_trace
from counterflow.schedule.chunk_plans import DECODE, PREFILL, TRAINING
from counterflow.trace import Rules, Trace, exposures
from counterflow.trace.parts import part_of
from counterflow.trace.phases import Phases, phases_of
from traces import Data, annotation, compact, kernel, launch, trace

GEMM, SEND = "void gemm<1>(float*)", "void deep_ep::internode_ll::dispatch<8>(int)"
GRAPH = 1


def on_gpu(name: str, ts: int, dur: int, stream: int | str = 7, device: int = 0) -> Data:
    return annotation(name, ts, dur) | {"cat": "gpu_user_annotation", "pid": device, "tid": stream}


def graph(*kernels: Data) -> list[Data]:
    """One launch of several kernels."""
    return [launch(0, GRAPH, name="cudaGraphLaunch"), *kernels]


def read(folder: Path, events: list[Data]) -> Trace:
    path = folder / "trace.json"
    path.write_text(compact(trace(events)))
    return open_trace(path)


def told(found: Trace) -> list[str]:
    """The phase of each piece of work, in time."""
    phases = of(found)
    return [phases.names[row] if row >= 0 else "" for row in phases.rows.tolist()]


def of(found: Trace) -> Phases:
    return phases_of(found, Rules().classify(found.work, found.names, found.sms))


# --- graphs ---------------------------------------------------------------------------------------------------


def test_work_of_a_graph_has_the_phases_of_the_annotations_on_the_gpu(tmp_path: Path) -> None:
    names = ["attn-a0", "attn-b0", "shared0", "dispatch0", "dispatch-recv0", "mlp0", "combine0", "combine-recv0"]
    steps = [on_gpu(name, 10 * place, 10) for place, name in enumerate(names)]
    work = [kernel(SEND if "d" in name else GEMM, 7, 10 * place + 2, 5) for place, name in enumerate(names)]
    found = read(tmp_path, [annotation("ProfilerStep#1", 0, 5), *steps, *graph(*work)])
    assert told(found) == names
    [gpu] = exposures(found)
    assert gpu.phase_source == "annotations"
    assert [(one.name, one.part, one.direction) for one in gpu.phases][4:6] == [
        ("dispatch-recv0", "dispatch", "F"),
        ("mlp0", "experts", "F"),
    ]


@pytest.mark.parametrize("plan", [TRAINING, PREFILL, DECODE])
def test_every_step_of_a_plan_names_a_part_and_its_direction(plan: str) -> None:
    for step in plan.split():
        part = part_of(step)
        assert part is not None, step
        assert part.direction == (step[-2] if step.endswith(")") else "F")


def test_the_own_stream_comes_first_then_any_of_the_device(tmp_path: Path) -> None:
    ranges = [
        on_gpu("attn0", 0, 40), on_gpu("mlp1", 0, 100, stream=8), on_gpu("tail0", 0, 100, device=1),
        on_gpu("shared1", 50, 10, stream="steps"),
    ]  # fmt: skip
    work = [
        kernel(GEMM, 7, 5, 5), kernel(GEMM, 8, 10, 5), kernel(GEMM, 9, 20, 5), kernel(GEMM, 7, 52, 5),
        kernel(GEMM, 7, 70, 5), kernel(GEMM, 7, 80, 5, device=1), kernel(GEMM, 7, 98, 5), kernel(GEMM, 7, 120, 5),
    ]  # fmt: skip
    assert told(read(tmp_path, [*ranges, *graph(*work)])) == [
        "attn0", "mlp1", "attn0", "shared1", "mlp1", "tail0", "", "",
    ]  # fmt: skip


def test_the_innermost_annotation_counts_and_one_that_is_over_does_not(tmp_path: Path) -> None:
    ranges = [on_gpu("mlp(F)", 0, 100), on_gpu("dispatch(F)", 10, 20), on_gpu("ProfilerStep#1", 0, 100)]
    work = [kernel(GEMM, 7, 12, 5), kernel(GEMM, 7, 28, 4), kernel(GEMM, 7, 50, 5)]
    assert told(read(tmp_path, [*ranges, *graph(*work)])) == ["dispatch(F)", "mlp(F)", "mlp(F)"]


def test_a_graph_launched_inside_an_annotation_that_names_no_part_is_cut_into_its_parts(tmp_path: Path) -> None:
    events = [annotation("decode", 0, 9), on_gpu("decode", 10, 90), on_gpu("attn0", 10, 20), on_gpu("mlp0", 30, 20)]
    work = [kernel(GEMM, 7, 12, 5), kernel(GEMM, 7, 32, 5), kernel(GEMM, 7, 60, 5)]
    assert told(read(tmp_path, [*events, *graph(*work)])) == ["attn0", "mlp0", "decode"]


# --- all else stays as it was ---------------------------------------------------------------------------------


def test_a_graph_launched_inside_a_part_belongs_to_it(tmp_path: Path) -> None:
    events = [annotation("mlp(F)", 0, 9), on_gpu("attn0", 10, 90)]
    work = [kernel(GEMM, 7, 12, 5), kernel(GEMM, 7, 32, 5)]
    assert told(read(tmp_path, [*events, *graph(*work)])) == ["mlp(F)", "mlp(F)"]


def test_the_profilers_images_of_annotations_tell_nothing(tmp_path: Path) -> None:
    """A graph that runs beside annotated work is in none of its annotations."""
    events = [annotation("attn(F)", 20, 9), launch(22, 2), on_gpu("attn(F)", 30, 50), on_gpu("mlp0", 60, 10, stream=9)]
    work = [kernel(GEMM, 7, 30, 50, 2), kernel(GEMM, 8, 40, 5), kernel(GEMM, 8, 62, 5)]
    assert told(read(tmp_path, [*events, *graph(*work)])) == ["attn(F)", "", "mlp0"]


def test_a_launch_of_one_piece_goes_by_the_cpu_alone(tmp_path: Path) -> None:
    found = read(
        tmp_path, [launch(0, 1), on_gpu("attn0", 0, 100), kernel(GEMM, 7, 10, 5, 1), kernel(GEMM, 7, 20, 5, 2)]
    )
    assert told(found) == ["", ""]


pieces = st.tuples(st.sampled_from([7, 8]), st.integers(0, 40), st.integers(0, 8))
ranges = st.tuples(st.sampled_from(["attn0", "mlp0", "tail1"]), st.sampled_from([7, 8, "?"]), *[st.integers(0, 40)] * 2)


@given(st.lists(pieces, min_size=2, max_size=8), st.lists(ranges, max_size=8))
def test_the_phases_are_those_of_the_obvious_search(tmp_path_factory, work, held) -> None:
    slices = [on_gpu(name, ts, dur, stream) for name, stream, ts, dur in held]
    kernels = [kernel(GEMM, stream, ts, dur) for stream, ts, dur in work]
    found = read(tmp_path_factory.mktemp("any"), [*slices, *graph(*kernels)])
    phases = of(found)
    for (start, end, *_), stream, row in zip(
        found.work.tuples(), found.work.stream.tolist(), phases.rows.tolist(), strict=True
    ):
        around = [(at, -dur, on, name) for name, on, at, dur in held if at * 1000 <= start and end <= (at + dur) * 1000]
        around = [one for one in around if one[2] == stream] or around
        best = max((one[:2] for one in around), default=None)
        names = {name for at, length, _, name in around if (at, length) == best}
        assert (phases.names[row] in names) if names else row < 0


def test_images_beside_single_launches_change_nothing(tmp_path: Path) -> None:
    events = [annotation("attn(F)", 0, 9), launch(2, 2), launch(20, 3)]
    events += [kernel(GEMM, 7, 30, 5, 2), kernel(GEMM, 7, 32, 2, 3)]
    images = [on_gpu("attn(F)", 30, 5)]
    assert told(read(tmp_path, events)) == told(read(tmp_path, [*events, *images])) == ["attn(F)", ""]
