"""The published training profile, to the microsecond. The profile is not ours to ship: without it these tests skip."""

import pytest

from counterflow import open_trace
from counterflow.trace import Exposure, Trace, exposures, function_of
from traces import real_trace


@pytest.fixture(scope="module")
def profile() -> Trace:
    return open_trace(real_trace("deepseek_train.json.gz"))


@pytest.fixture(scope="module")
def gpu(profile: Trace) -> Exposure:
    [gpu] = exposures(profile)
    return gpu


def test_the_window_is_the_span_of_what_the_annotation_launched(profile: Trace, gpu: Exposure) -> None:
    [inside] = exposures(profile, within="1F1B")
    assert inside == gpu
    names = [profile.names[name] for name in profile.annotations.name.tolist()]
    row = names.index("1F1B")
    opens, closes = profile.annotations.start_ns[row], profile.annotations.end_ns[row]
    assert (closes - opens) // 1000 == 112_168
    assert (gpu.start_ns - opens) // 1000 == 513
    assert (gpu.start_ns + round(gpu.window_us * 1000) - closes) // 1000 == 17_357


def test_where_the_time_went(gpu: Exposure) -> None:
    assert gpu.window_us == 129_012
    assert (gpu.compute_us, gpu.communication_us) == (124_310, 113_440)
    assert (gpu.overlapped_us, gpu.exposed_us) == (109_250, 4_190)
    assert (gpu.other_us, gpu.idle_us, gpu.idle_gaps) == (15, 497, 243)
    assert (gpu.waiting_us, gpu.transfers_us, gpu.exposed_transfers_us) == (8_968 + 23_610, 80_452, 2_956)
    assert (gpu.communication_sms, gpu.sms) == (20, 132)
    assert gpu.warnings == ()


def test_streams(gpu: Exposure) -> None:
    found = [(one.stream, one.count, one.busy_us) for one in gpu.streams]
    assert found == [(7, 927, 118_193), (23, 16, 11_355), (27, 40, 114_521)]


def test_communication_kernels(gpu: Exposure) -> None:
    found: dict[str, tuple[float, ...]] = {}
    for one in gpu.kernels:
        if one.kind in ("transfer", "waiting", "preparing"):
            name = function_of(one.name).split("::")[-1]
            count, total, exposed = found.get(name, (0, 0, 0))[:3]
            found[name] = (count + one.count, total + one.total_us, exposed + one.exposed_us, one.blocks, one.threads)
    assert found == {
        "notify_dispatch": (4, 8_968, 101, 9, 256),
        "dispatch": (8, 31_004, 798, 20, 512),
        "cached_notify": (12, 23_610, 1_105, 20, 320),
        "combine": (8, 49_448, 2_158, 20, 800),
        "get_dispatch_layout": (4, 410, 28, 16, 256),
    }


def test_the_largest_exposed_pieces(gpu: Exposure) -> None:
    found = [(p.length_us, function_of(p.kernels[0]).split("::")[-1], p.phases, p.then_phase) for p in gpu.pieces[:3]]
    assert found == [
        (1_758, "combine", ("dispatch(B)",), "attn(B)"),
        (381, "cached_notify", ("combine(B)",), "attn(F)"),
        (271, "dispatch", ("combine(B)",), "mlp(B)"),
    ]


def test_the_ten_phases_in_the_order_issued(gpu: Exposure) -> None:
    found = {p.name: (p.count, (p.compute_us + p.other_us) / 4, p.communication_us / 4) for p in gpu.phases}
    rounded = {name: (count, int(busy + 0.5), int(talk + 0.5)) for name, (count, busy, talk) in found.items()}
    assert rounded == {
        "combine(B)": (4, 270, 5_499),
        "attn(F)": (4, 4_370, 0),
        "mlp(B)": (4, 5_306, 0),
        "dispatch(F)": (4, 0, 6_690),
        "dispatch(B)": (4, 0, 7_487),
        "mlp(W)": (4, 5_063, 0),
        "mlp(F)": (4, 4_604, 0),
        "attn(B)": (4, 9_341, 0),
        "attn(W)": (4, 2_389, 0),
        "combine(F)": (4, 0, 8_684),
    }
    assert list(rounded) == list(found)


def test_multimem_reductions_on_the_compute_stream_are_seen() -> None:
    [gpu] = exposures(open_trace(real_trace("b200_multimem.json.gz")))
    found = {function_of(k.name): k.count for k in gpu.kernels if k.kind == "transfer"}
    assert found == {"{anonymous}::multimem_all_reduce_kernel": 73, "ncclDevKernel_AllGather_RING_LL": 1}
    assert gpu.exposed_us == gpu.communication_us > 2_000
