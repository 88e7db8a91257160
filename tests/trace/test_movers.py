"""Which work moves data: inside a CUDA graph by what runs beside compute, elsewhere by its stream."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import open_trace
from counterflow.trace import Rules, Trace
from counterflow.trace.hints import hint_of
from counterflow.trace.movers import Movers
from traces import Data, compact, kernel, launch, trace

OUT, IN, GEMM = "Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)", "void gemm<1>(float*)"


def copy(name: str, stream: int, ts: int, dur: int, correlation: int = 1) -> Data:
    return kernel(name, stream, ts, dur, correlation) | {"cat": "gpu_memcpy"}


def movers(folder: Path, events: list[Data], graph: bool = True) -> tuple[Trace, Movers]:
    """Of events that are in order."""
    if not graph:
        events = [made | {"args": made["args"] | {"correlation": one}} for one, made in enumerate(events)]
    launches = [launch(one, one) for one in ([1] if graph else range(len(events)))]
    path = folder / "trace.json"
    path.write_text(compact(trace([*launches, *events])))
    found = open_trace(path)
    work, hints = found.work, {name: hint_of(found.names[name]) for name in found.work.name.tolist()}
    classes = Rules().classify(work, found.names, found.sms)
    launched = np.zeros(len(work), dtype=np.int64) if graph else np.arange(len(work))
    in_graph = np.full(len(work), graph)
    return found, Movers.of(work, classes, launched, in_graph, found.names, hints, found.sms[0])


def test_copies_of_a_graph_that_run_beside_kernels_move_data_whatever_their_stream(tmp_path: Path) -> None:
    events = [kernel(GEMM, 7, 0, 100), copy(OUT, 8, 10, 30), copy("Memcpy DtoD (Device -> Device)", 8, 50, 30)]
    events += [kernel(GEMM, 8, 110, 20)]
    assert movers(tmp_path, events)[1].moves.tolist() == [False, True, False, False]
    assert not movers(tmp_path, events, graph=False)[1].moves.any(), "a stream that also runs kernels"


def test_copies_of_a_graph_that_nothing_runs_beside_move_data_if_they_come_back(tmp_path: Path) -> None:
    events = [kernel(GEMM, 7, 0, 100), copy(OUT, 7, 100, 30), copy(IN, 7, 131, 30), kernel(GEMM, 7, 161, 20)]
    assert movers(tmp_path, events)[1].moves.tolist() == [False, True, True, False]
    assert not movers(tmp_path, [events[0], events[2], events[3]])[1].moves.any(), "an input"
    swapped = [events[0], copy(IN, 7, 100, 30), copy(OUT, 7, 131, 30), events[3]]
    assert not movers(tmp_path, swapped)[1].moves.any(), "an input and an output"


@pytest.mark.parametrize(
    ("name", "grid", "moves"),
    [("push_rows", 20, True), ("push_rows", 100, False), ("flash_fwd_splitkv", 20, False), (GEMM, 20, False)],
)
def test_a_long_kernel_on_few_sms_beside_others_may_move_data(
    tmp_path: Path, name: str, grid: int, moves: bool
) -> None:
    events = [kernel(GEMM + "<132>", 8, 0, 100), kernel(name, 7, 10, 60, grid=grid), kernel("big", 7, 100, 60)]
    assert movers(tmp_path, events)[1].moves.tolist() == [False, moves, False]
    apart = [events[0], kernel(name, 7, 100, 60, grid=grid), kernel("big", 7, 170, 60)]
    assert not movers(tmp_path, apart)[1].moves.any()
    assert not movers(tmp_path, events, graph=False)[1].moves.any(), "its stream runs larger ones"
    twice = [*events, kernel(name, 7, 170, 60, grid=132)]
    assert not movers(tmp_path, twice)[1].moves.any(), "it does run on more"


def test_compute_of_a_graph_is_not_set_aside_for_the_transfers_on_its_stream(tmp_path: Path) -> None:
    events = [kernel(GEMM, 7, 0, 100), kernel("ncclDevKernel_SendRecv(int)", 8, 0, 60), kernel("cast", 8, 60, 5)]
    assert not movers(tmp_path, events)[1].aside.any()
    assert movers(tmp_path, events, graph=False)[1].aside.tolist() == [False, False, True]


def test_copies_out_are_one_exchange_if_they_follow_each_other_whatever_comes_in(tmp_path: Path) -> None:
    events = [copy(OUT, 8, 0, 20), copy(OUT, 8, 21, 20), copy(IN, 9, 42, 80), copy(OUT, 8, 110, 20)]
    events += [copy(IN, 9, 130, 80), copy(IN, 9, 230, 80)]
    assert movers(tmp_path, [kernel(GEMM, 7, 0, 10), *events])[1].joined.tolist()[1:] == [False, True, *[False] * 4]


def test_what_still_runs_as_a_transfer_begins_was_not_needed_for_it(tmp_path: Path) -> None:
    events = [kernel(GEMM, 7, 0, 20), kernel(GEMM, 7, 20, 30), copy(OUT, 8, 25, 30), kernel(GEMM, 7, 50, 30)]
    for graph, before in ((True, [False, True, False]), (False, [False, False, True])):
        found, about = movers(tmp_path, events, graph)
        assert about.edges(found.work, np.array([0, 1, 3])).tolist() == before


exchanges = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 60), st.integers(0, 900)), min_size=1, max_size=8)


@given(exchanges, st.integers(0, 4), st.integers(0, 4))
def test_each_copy_in_brings_what_a_copy_out_took(tmp_path_factory, drawn, missing_out: int, missing_in: int) -> None:
    outs, ins, free = [], [], [0, 0]
    for count, pause, lag in drawn:
        for _ in range(count):
            outs.append((free[0] + pause, 20))
            free[0] += pause + 20
            ins.append((max(free[0] + lag, free[1]), 20))
            free[1] = ins[-1][0] + 20
    # A trace may begin before the first copies in, and end behind the last copies out.
    kept_out, kept_in = outs[min(missing_out, len(outs) - 1) :], ins[: len(ins) - min(missing_in, len(ins) - 1)]
    if missing_out and missing_in:
        kept_out = outs
    events = [copy(OUT, 8, *one) for one in kept_out] + [copy(IN, 9, *one) for one in kept_in]
    events = sorted([*events, kernel(GEMM, 7, 0, 10)], key=lambda event: event["ts"])
    found, about = movers(tmp_path_factory.mktemp("legs"), events)
    pairs = dict(zip(outs, ins, strict=True))
    for place, origin in enumerate(about.origin.tolist()):
        if origin >= 0:
            start = [int(found.work.start_ns[one]) // 1000 for one in (origin, place)]
            assert pairs[start[0], 20] == (start[1], 20)
    paired = np.flatnonzero(about.origin >= 0)
    assert len(paired) == min(len(kept_out), len(kept_in))
