"""What hides what: each instant of communication in one column, and rows that add up to the nanosecond."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from counterflow import open_trace
from counterflow.trace import Exposure, exposures
from counterflow.trace.cover import Cover
from counterflow.trace.hiding import hidden_under, owned
from counterflow.trace.reference import hiding_reference
from traces import annotation, compact, kernel, launch, real_trace, trace, traces

GEMM, NCCL, SEND = "void gemm<1>(float*)", "ncclDevKernel_AllReduce(int)", "ncclDevKernel_SendRecv(int)"

spans = st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda p: (p[0], p[0] + p[1]))
pieces = st.lists(st.tuples(spans, st.sampled_from("abc")).map(lambda p: (*p[0], p[1])), max_size=9)


def columns(rows: list[tuple[int, int, str]]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([row[n] for row in rows], dtype=np.int64) for n in (0, 1))


def in_order(rows: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    return sorted(rows, key=lambda row: row[0])


@given(pieces, pieces)
def test_the_matrix_is_that_of_the_reference(talks, computes) -> None:
    computes = in_order(computes)
    slow = hiding_reference(talks, computes)
    kinds = ["a", "b", "c"]
    column = np.array([kinds.index(kind) for *_, kind in computes], dtype=np.int64)
    which, start, end = owned(*columns(computes))
    for row in kinds:
        talk = Cover.of(*columns([one for one in talks if one[2] == row]))
        fast = hidden_under(talk, column[which], start, end, len(kinds)).tolist()
        assert fast == [slow.get((row, kind), 0) for kind in kinds]
        assert talk.total_ns - sum(fast) == slow.get((row, None), 0)


@given(pieces)
def test_every_instant_of_compute_has_one_owner(computes) -> None:
    computes = in_order(computes)
    which, start, end = owned(*columns(computes))
    assert all(one <= two for one, two in pairwise(np.stack([start, end]).T.ravel().tolist()))
    assert (end - start).sum() == Cover.of(*columns(computes)).total_ns
    assert all(
        computes[row][0] <= one < two <= computes[row][1] for row, one, two in zip(which, start, end, strict=True)
    )


def in_ns(us: float) -> int:
    return round(us * 1000)


def adds_up(gpu: Exposure) -> None:
    for row in gpu.hiding:
        assert in_ns(row.communication_us) == in_ns(row.exposed_us) + sum(in_ns(share.us) for share in row.under)


@given(data=traces)
def test_rows_add_up_in_any_trace(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("any") / "trace.json"
    path.write_text(compact(data))
    for gpu in exposures(open_trace(path)):
        adds_up(gpu)
        assert sum(in_ns(row.communication_us) for row in gpu.hiding) >= in_ns(gpu.communication_us)
        assert sum(in_ns(row.exposed_us) for row in gpu.hiding) >= in_ns(gpu.exposed_us)


def test_communication_is_told_by_phase_and_without_one_by_kernel(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    events = [
        annotation("dispatch(F)", 0, 5), launch(1, 1), annotation("mlp(B)", 6, 5), launch(7, 2), launch(20, 3),
        launch(21, 4),
        kernel(SEND, 20, 30, 20, 1), kernel(GEMM, 7, 35, 5, 2), kernel(NCCL, 20, 50, 10, 3), kernel(GEMM, 7, 45, 8, 4),
    ]  # fmt: skip
    path.write_text(compact(trace(events)))
    [gpu] = exposures(open_trace(path))
    found = [(row.name, row.exposed_us, {share.phase: share.us for share in row.under}) for row in gpu.hiding]
    assert found == [("dispatch(F)", 10, {"mlp(B)": 5, "": 5}), ("ncclDevKernel_AllReduce", 7, {"": 3})]


def test_the_published_profile_hides_each_transfer_where_its_plan_says() -> None:
    [gpu] = exposures(open_trace(real_trace("deepseek_train.json.gz")))
    adds_up(gpu)
    found = {row.name: (row.exposed_us, {share.phase: share.us for share in row.under}) for row in gpu.hiding}
    assert found == {
        "combine(B)": (1_385, {"attn(F)": 14_501, "attn(W)": 6_110}),
        "dispatch(F)": (255, {"mlp(B)": 20_989, "mlp(W)": 5_517}),
        "dispatch(B)": (1_897, {"mlp(W)": 14_086, "mlp(F)": 13_964}),
        "combine(F)": (653, {"attn(B)": 34_083}),
    }
    assert sum(exposed for exposed, _ in found.values()) == gpu.exposed_us
