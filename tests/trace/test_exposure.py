"""Exposure: the fast figures are those of the slow reference, and each exposed piece tells where it stands."""

from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import open_trace
from counterflow.errors import TraceError
from counterflow.trace import CLASSES, Exposure, Rules, exposures, phase_figures
from counterflow.trace import cover as cover_module
from counterflow.trace.cover import Cover
from counterflow.trace.reference import exposure_reference
from traces import annotation, compact, kernel, launch, sample, trace, traces

KIND = {"compute": "compute", "transfer": "communication", "waiting": "communication", "preparing": "communication"}
GEMM, NCCL = "void gemm<1>(float*)", "ncclDevKernel_AllReduce(int)"


def measured(folder: Path, events: list, within: str | None = None) -> list[Exposure]:
    path = folder / "trace.json"
    path.write_text(compact(trace(events)))
    return exposures(open_trace(path), within=within)


# --- against the reference ------------------------------------------------------------------------------------


@given(data=traces)
def test_the_figures_are_those_of_the_reference(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("any") / "trace.json"
    path.write_text(compact(data))
    found = open_trace(path)
    kinds = Rules().classify(found.work, found.names, found.sms)
    pieces = [
        (start, end, KIND.get(CLASSES[kind], "other"))
        for (start, end, *_), kind in zip(found.work.tuples(), kinds.tolist(), strict=True)
    ]
    for gpu in exposures(found):
        start = gpu.start_ns
        slow = exposure_reference(pieces, start, start + round(gpu.window_us * 1000))
        fast = {name: round(getattr(gpu, f"{name}_us") * 1000) for name in slow}
        assert fast == slow
        assert sum(round(piece.length_us * 1000) for piece in gpu.pieces) == slow["exposed"]
        lone = [k for k in gpu.kernels if k.kind in ("transfer", "waiting", "preparing")]
        assert sum(k.exposed_us for k in lone) >= gpu.exposed_us - 1e-6


@given(data=traces)
def test_the_figures_do_not_depend_on_how_many_rows_are_worked_on_at_once(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("any") / "trace.json"
    path.write_text(compact(data))
    found = open_trace(path)
    at_once = exposures(found)
    for rows in (1, 3):
        with patch.object(cover_module, "BLOCK", rows), patch.object(phase_figures, "BLOCK", rows):
            assert exposures(open_trace(path)) == at_once


intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda p: (p[0], p[0] + p[1])), max_size=8)


def cover(pairs: list[tuple[int, int]]) -> Cover:
    return Cover.of(*np.array(pairs, dtype=np.int64).reshape(-1, 2).T)


def instants(pairs: list[tuple[int, int]]) -> set[int]:
    return {t for start, end in pairs for t in range(start, end)}


@given(intervals, intervals, st.sampled_from([1, 2, 1 << 15]))
def test_covers_are_sets_of_instants(a, b, rows) -> None:
    with patch.object(cover_module, "BLOCK", rows):
        covers_are_sets_of_instants(a, b)


def covers_are_sets_of_instants(a, b) -> None:
    for fast, slow in (
        (cover(a) | cover(b), instants(a) | instants(b)),
        (cover(a) & cover(b), instants(a) & instants(b)),
        (cover(a) - cover(b), instants(a) - instants(b)),
    ):
        pieces = list(zip(fast.start_ns.tolist(), fast.end_ns.tolist(), strict=True))
        assert instants(pieces) == slow
        assert fast.total_ns == len(slow)
        assert all(one[1] < two[0] for one, two in pairwise(pieces))
    within = cover(a).within_ns(*np.array(b, dtype=np.int64).reshape(-1, 2).T)
    assert within.tolist() == [len(instants(a) & set(range(*pair))) for pair in b]


# --- what each figure means -----------------------------------------------------------------------------------


def test_an_exposed_piece_tells_where_it_stands_and_what_comes_after(tmp_path: Path) -> None:
    [gpu] = measured(
        tmp_path,
        [
            annotation("dispatch(B)", 0, 2), launch(1, 2), annotation("attn(B)", 3, 2), launch(4, 3, thread=10),
            kernel(GEMM, 7, 10, 10, 1), kernel(NCCL, 20, 15, 15, 2), kernel("attention(int)", 7, 32, 5, 3),
        ],
    )  # fmt: skip
    [piece] = gpu.pieces
    assert (piece.start_us, piece.length_us) == (10, 10)
    assert (piece.kernels, piece.phases) == ((NCCL,), ("dispatch(B)",))
    assert (piece.then, piece.then_phase) == ("attention(int)", "attn(B)")
    assert (gpu.window_us, gpu.idle_us, gpu.idle_gaps) == (27, 2, 1)


def test_compute_during_a_transfer_splits_what_is_exposed(tmp_path: Path) -> None:
    [gpu] = measured(tmp_path, [kernel(NCCL, 20, 0, 30, grid=24), kernel(GEMM, 7, 5, 5), kernel(GEMM, 7, 12, 8)])
    assert [(p.start_us, p.length_us) for p in gpu.pieces] == [(20, 10), (0, 5), (10, 2)]
    assert gpu.exposed_us == 17
    assert gpu.communication_sms == 24


def test_work_without_length_splits_no_gap(tmp_path: Path) -> None:
    [gpu] = measured(tmp_path, [kernel(GEMM, 7, 0, 1), kernel(GEMM, 7, 5, 0), kernel(GEMM, 7, 9, 1)])
    assert (gpu.idle_us, gpu.idle_gaps) == (8, 1)


def test_waiting_for_peers_is_told_from_transfers(tmp_path: Path) -> None:
    notify, send = "void deep_ep::intranode::notify_dispatch<8>(int)", "void deep_ep::intranode::dispatch<8>(int)"
    [gpu] = measured(tmp_path, [kernel(notify, 20, 0, 4), kernel(send, 20, 4, 6), kernel(GEMM, 7, 2, 4)])
    assert (gpu.communication_us, gpu.waiting_us, gpu.transfers_us) == (10, 4, 6)
    assert (gpu.exposed_us, gpu.exposed_transfers_us) == (6, 4)


def test_unknown_kernels_are_other_and_told(tmp_path: Path) -> None:
    [gpu] = measured(tmp_path, [kernel(GEMM, 7, 0, 100), kernel("strange(int)", 20, 50, 100, grid=8)])
    assert (gpu.compute_us, gpu.unknown_us, gpu.other_us, gpu.exposed_us) == (100, 100, 50, 0)
    assert "1 long kernel of unknown purpose counted as other" in gpu.warnings[-1]


def test_each_gpu_has_its_own_window(tmp_path: Path) -> None:
    one, two = measured(tmp_path, [kernel(GEMM, 7, 0, 5), kernel(GEMM, 7, 100, 7, device=1)])
    assert [(one.device, one.window_us), (two.device, two.window_us)] == [(0, 5), (1, 7)]


# --- the window by correlation --------------------------------------------------------------------------------


def test_the_window_is_the_span_of_what_was_launched_inside(tmp_path: Path) -> None:
    events = [annotation("step", 0, 10), launch(2, 1), launch(5, 2, thread=10), launch(12, 3)]
    work = [kernel(GEMM, 7, 3, 2, 1), kernel(NCCL, 20, 30, 10, 2), kernel(GEMM, 7, 35, 50, 3)]
    [gpu] = measured(tmp_path, events + work, within="step")
    assert (gpu.start_ns, gpu.window_us) == (3000, 37)
    assert (gpu.compute_us, gpu.exposed_us) == (7, 5), "later work counts as far as it reaches into the window"


def test_an_annotation_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"there is no annotation 'stop'; give one of 'dispatch\(F\)', 'mlp\(B\)'"):
        measured(tmp_path, sample()["traceEvents"], within="stop")
    with pytest.raises(TraceError, match="no GPU work was launched inside 'idle'"):
        measured(tmp_path, [annotation("idle", 0, 1), launch(2, 1), kernel(GEMM, 7, 3, 1, 1)], within="idle")


# --- phases ---------------------------------------------------------------------------------------------------


def test_work_belongs_to_the_annotation_open_at_its_launch_on_whichever_thread(tmp_path: Path) -> None:
    [gpu] = measured(tmp_path, sample(2)["traceEvents"])
    figures = [(p.name, p.count, p.compute_us, p.communication_us, p.exposed_us, p.other_us) for p in gpu.phases]
    assert figures == [("dispatch(F)", 2, 0, 40, 10, 0), ("mlp(B)", 2, 60, 0, 0, 4)]


def test_the_innermost_annotation_of_ones_own_thread_comes_first(tmp_path: Path) -> None:
    events = [
        annotation("ProfilerStep#1", 0, 100), annotation("outer", 0, 50), annotation("inner", 10, 10),
        annotation("other", 12, 5, thread=10), launch(13, 1), launch(13, 2, thread=10), launch(13, 3, thread=11),
        launch(30, 4),
        *(kernel(GEMM, 7, 20 + 10 * number, number, number) for number in (1, 2, 3, 4)),
    ]  # fmt: skip
    [gpu] = measured(tmp_path, events)
    assert {p.name: p.compute_us for p in gpu.phases} == {"inner": 1, "other": 5}
