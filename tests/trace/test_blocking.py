"""Exposed, but blocking? Told by what came next: when it was launched, and how soon it started."""

from pathlib import Path

import pytest

from counterflow import open_trace
from counterflow.trace import Exposure, exposures
from traces import compact, kernel, launch, real_trace, trace

GEMM, NCCL = "void gemm<1>(float*)", "ncclDevKernel_SendRecv(int)"


def measured(folder: Path, *events: dict) -> Exposure:
    path = folder / "trace.json"
    path.write_text(compact(trace(list(events))))
    [gpu] = exposures(open_trace(path))
    return gpu


def outcome(folder: Path, *events: dict) -> str:
    """What became of the one exposed piece, from 10 to 100 µs; a first GEMM had ended before it."""
    gpu = measured(folder, launch(0, 1), kernel(GEMM, 7, 5, 5, 1), launch(2, 2), kernel(NCCL, 20, 10, 90, 2), *events)
    piece = next(piece for piece in gpu.pieces if piece.start_us == 5)
    assert gpu.blocking_us == sum(piece.length_us for piece in gpu.pieces if piece.waited == "blocking")
    return piece.waited


def test_compute_launched_long_ago_that_starts_when_the_transfer_ends_had_waited(tmp_path: Path) -> None:
    assert outcome(tmp_path, launch(20, 3), kernel(GEMM, 7, 103, 5, 3)) == "blocking"
    assert outcome(tmp_path, launch(20, 3), kernel(GEMM, 20, 101, 5, 3)) == "blocking", "also on the transfer's stream"


def test_compute_launched_after_the_transfer_had_not_waited(tmp_path: Path) -> None:
    assert outcome(tmp_path, launch(101, 3), kernel(GEMM, 7, 109, 5, 3)) == "launched late"


def test_compute_that_starts_under_the_transfer_had_not_waited_for_its_end(tmp_path: Path) -> None:
    assert outcome(tmp_path, launch(20, 3), kernel(GEMM, 7, 60, 5, 3)) == "compute resumed first"


def test_compute_may_have_waited_for_the_first_of_two_transfers(tmp_path: Path) -> None:
    other = kernel(NCCL, 21, 30, 200, 4)
    assert outcome(tmp_path, other, launch(20, 3), kernel(GEMM, 7, 104, 5, 3)) == "blocking"
    assert outcome(tmp_path, other, launch(20, 3), kernel(GEMM, 7, 150, 5, 3)) == "compute resumed first"


def test_the_end_of_waiting_for_peers_holds_nothing_back(tmp_path: Path) -> None:
    notify, send = "void deep_ep::intranode::cached_notify<8>(int)", "void deep_ep::intranode::dispatch<8>(int)"
    gpu = measured(
        tmp_path, launch(1, 1), launch(2, 2), launch(3, 3),
        kernel(notify, 20, 10, 30, 1), kernel(send, 20, 41, 60, 2), kernel(GEMM, 7, 44, 70, 3),
    )  # fmt: skip
    assert [(piece.length_us, piece.waited) for piece in gpu.pieces] == [
        (30, "compute resumed first"),
        (3, "compute resumed first"),
    ]


def test_transfers_on_end_are_judged_by_the_last(tmp_path: Path) -> None:
    more = kernel(NCCL, 20, 102, 50, 4)
    assert outcome(tmp_path, more, launch(20, 3), kernel(GEMM, 7, 155, 5, 3)) == "blocking"
    assert outcome(tmp_path, more, launch(20, 3), kernel(GEMM, 7, 200, 5, 3)) == "unknown"
    assert outcome(tmp_path, more, launch(120, 3), kernel(GEMM, 7, 155, 5, 3)) == "launched late"


def test_nothing_waits_for_the_last_transfer(tmp_path: Path) -> None:
    assert outcome(tmp_path) == "nothing follows"


def test_what_starts_much_later_or_has_no_launch_record_is_unknown(tmp_path: Path) -> None:
    assert outcome(tmp_path, launch(20, 3), kernel(GEMM, 7, 150, 5, 3)) == "unknown"
    assert outcome(tmp_path, kernel(GEMM, 7, 103, 5, 99)) == "unknown"


@pytest.mark.parametrize(
    ("name", "blocking", "not_blocking"),
    [("deepseek_train.json.gz", 2_029, 2_161), ("a100_nccl_8ranks.json.gz", 59_125, 28_796)],
)
def test_exposed_time_is_blocking_or_not_or_unknown(name: str, blocking: float, not_blocking: float) -> None:
    [gpu] = exposures(open_trace(real_trace(name)))
    assert (gpu.blocking_us, gpu.not_blocking_us) == (blocking, not_blocking)
    assert gpu.blocking_us + gpu.not_blocking_us <= gpu.exposed_us


def test_in_the_published_profile_attention_and_experts_of_the_last_layer_waited() -> None:
    [gpu] = exposures(open_trace(real_trace("deepseek_train.json.gz")))
    waited = [(piece.length_us, piece.phases, piece.then_phase) for piece in gpu.pieces if piece.waited == "blocking"]
    assert waited == [(1_758, ("dispatch(B)",), "attn(B)"), (271, ("combine(B)",), "mlp(B)")]
