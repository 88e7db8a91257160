"""Phases without annotations: the order of kernels tells them, in the names of several worlds and in several orders."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunk_traces import BACKWARD, COMPUTE, FORWARD, PUBLISHED_ORDER, TRAINING_PLAN, WIRES, Builder
from counterflow import open_trace
from counterflow.trace import CLASSES, Annotations, Rules, Trace, exposures
from counterflow.trace.kernel_phases import STATES, best_path
from counterflow.trace.parts import part_of
from counterflow.trace.phases import Phases, phases_of
from traces import annotation, compact, kernel, launch, real_trace, trace

LAYERS = 5


def told(found: Trace) -> Phases:
    return phases_of(found, Rules().classify(found.work, found.names, found.sms))


def right(built: Builder, folder: Path, hide: bool = False) -> tuple[float, Counter]:
    """The part of GPU time that got its true phase, and what got which other one."""
    path = folder / "trace.json"
    path.write_text(compact(trace(built.events)))
    found = open_trace(path)
    phases = told(replace(found, launches=found.launches.empty()) if hide else found)
    assert phases.source == "kernel order"
    good, wrong = 0, Counter()
    # Correlations count the launches; the truth stands in their order.
    for correlation, row in zip(found.work.correlation.tolist(), phases.rows.tolist(), strict=True):
        _, phase, us = built.truth[correlation - 1]
        label = phases.names[row] if row >= 0 else ""
        good += us * (label == phase)
        wrong[phase, label] += us * (label != phase)
    return good / sum(us for _, _, us in built.truth), +wrong


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("world", COMPUTE)
@pytest.mark.parametrize("order", [PUBLISHED_ORDER, TRAINING_PLAN], ids=["published", "plan"])
def test_a_forward_interleaved_with_a_backward_is_told_apart(tmp_path: Path, order, world: str, wire: str) -> None:
    share, wrong = right(Builder(COMPUTE[world], wire).phases(order * LAYERS), tmp_path)
    assert share > 0.95, wrong


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("world", COMPUTE)
def test_a_forward_then_a_backward_of_the_same_layers(tmp_path: Path, world: str, wire: str) -> None:
    built = Builder(COMPUTE[world], wire).phases(FORWARD * LAYERS).phases(BACKWARD * LAYERS, thread=10)
    share, wrong = right(built, tmp_path)
    assert share > 0.95, wrong


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("world", COMPUTE)
def test_a_backward_whose_gradients_of_weights_stand_in_between_is_one(tmp_path: Path, world: str, wire: str) -> None:
    kernels = dict(COMPUTE[world])
    for part in ("attention", "experts"):
        whole, weights = kernels[f"{part}(B)"], list(kernels[f"{part}(W)"])
        kernels[f"{part}(B)"] = [
            one for each in whole for one in (each, *([weights.pop()] if _matmul(each) and weights else []))
        ]
    built = Builder(kernels, wire).phases(FORWARD * LAYERS).phases(BACKWARD * LAYERS, thread=10)
    share, wrong = right(built, tmp_path)
    assert share > 0.95, wrong


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("world", COMPUTE)
def test_what_prepares_a_grouped_product_tells_no_direction(tmp_path: Path, world: str, wire: str) -> None:
    prepares = ("void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t>(int)", 2)
    kernels = {
        phase: [one for each in names for one in ((prepares, each) if phase.startswith("experts") else (each,))]
        for phase, names in COMPUTE[world].items()
    }
    share, wrong = right(Builder(kernels, wire).phases(TRAINING_PLAN * LAYERS), tmp_path)
    assert share > 0.95, wrong


def _matmul(one: tuple[str, int]) -> bool:
    return any(mark in one[0] for mark in ("gemm", "nvjet", "grouped", "Group"))


@pytest.mark.parametrize("hide", [False, True], ids=["launches", "no launches"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("world", COMPUTE)
def test_a_forward_alone_has_no_backward(tmp_path: Path, world: str, wire: str, hide: bool) -> None:
    share, wrong = right(Builder(COMPUTE[world], wire).phases(FORWARD * LAYERS), tmp_path, hide)
    assert share > 0.95, wrong
    assert not any(label.endswith(("(B)", "(W)")) for _, label in wrong)


@pytest.mark.parametrize("world", COMPUTE)
def test_copies_under_a_backward_whose_launches_are_not_told_have_no_phase(tmp_path: Path, world: str) -> None:
    _, wrong = right(Builder(COMPUTE[world], "copies").phases(PUBLISHED_ORDER * LAYERS), tmp_path, hide=True)
    assert {told for (phase, told) in wrong if phase.startswith(("dispatch", "combine"))} == {""}


def test_exchanges_of_several_copies_that_stand_on_end_are_taken_apart(tmp_path: Path) -> None:
    order = ["attention(F)", "combine(B)", "dispatch(F)", "experts(B)", "dispatch(B)", "experts(F)", "attention(B)"]
    built = Builder(COMPUTE["pytorch"], "copies", pause=5).phases([*order, "combine(F)"] * LAYERS)
    share, wrong = right(built, tmp_path)
    assert share > 0.95, wrong


def test_prefill_of_two_micro_batches(tmp_path: Path) -> None:
    kernels = {
        "attention(F)": [
            ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(int)", 8),
            ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNN", 120),
            ("void flashinfer::BatchPrefillWithRaggedKVCacheKernel<int>(int)", 400),
            ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNN", 120),
            ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(int)", 8),
            ("void vllm::moe::grouped_topk_fused_kernel<float>(int)", 9),
        ],
        "experts(F)": [
            ("moe_align_block_size", 9),
            ("fused_moe_kernel", 400),
            ("silu_and_mul", 20),
            ("fused_moe_kernel", 200),
        ],
        "shared": [("nvjet_tst_64x8_TNT", 60), ("silu_and_mul", 9), ("nvjet_tst_64x8_TNT", 50)],
    }
    order = ["attention(F)", "shared", "attention(F)", "dispatch(F)", "experts(F)", "dispatch(F)", "experts(F)"]
    order += ["combine(F)", "shared", "combine(F)"]
    _, wrong = right(Builder(kernels, "deep_ep").phases(order * LAYERS), tmp_path)
    # Shared experts cannot be told from others by their kernels; of the rest less than a hundredth is wrong.
    assert {phase for phase, _ in wrong} <= {"shared", "attention(F)"}
    assert wrong.total() - wrong["shared", "experts(F)"] < 0.01 * 2 * 650 * LAYERS


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    dense = {
        "attention(F)": COMPUTE["pytorch"]["attention(F)"][:-4],
        "mlp(F)": [
            COMPUTE["pytorch"]["attention(F)"][0],
            ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", 200),
            ("void vllm::act_and_mul_kernel<c10::BFloat16, vllm::silu>(int)", 30),
            ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", 100),
        ],
    }  # fmt: skip
    share, wrong = right(Builder(dense, "nccl").phases(["attention(F)", "mlp(F)"] * LAYERS), tmp_path)
    assert share > 0.95, wrong


def test_reductions_belong_to_no_phase(tmp_path: Path) -> None:
    built = Builder(COMPUTE["pytorch"], "deep_ep").phases(FORWARD * 2)
    path = tmp_path / "trace.json"
    path.write_text(compact(trace([*built.events, kernel("ncclDevKernel_AllReduce_Sum_f32(int)", 21, 9_000, 50)])))
    [gpu] = exposures(open_trace(path))
    assert [(h.name, h.communication_us) for h in gpu.hiding][-1] == ("ncclDevKernel_AllReduce_Sum_f32", 50)


def test_kernels_that_show_no_model_have_no_phases(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(compact(trace([kernel("gemm", 7, 0, 5), kernel("ncclDevKernel_AllReduce(int)", 20, 3, 5)])))
    [gpu] = exposures(open_trace(path))
    assert (gpu.phase_source, gpu.phases) == ("none", ())


def test_annotations_of_parts_come_before_the_order_of_kernels_and_others_after_it(tmp_path: Path) -> None:
    built = Builder(COMPUTE["pytorch"], "deep_ep").phases(FORWARD)
    path = tmp_path / "trace.json"
    for name, source in (("MLP(W)", "annotations"), ("execute_model", "kernel order")):
        path.write_text(compact(trace([annotation(name, 0, 10_000), *built.events])))
        [gpu] = exposures(open_trace(path))
        assert gpu.phase_source == source
    path.write_text(compact(trace([annotation("mine", 0, 9), launch(1, 1), kernel("gemm", 7, 5, 5)])))
    [gpu] = exposures(open_trace(path))
    assert (gpu.phase_source, [phase.name for phase in gpu.phases]) == ("annotations", ["mine"])


# --- any kernels in any order -----------------------------------------------------------------------------------

NAMES = [name for world in COMPUTE.values() for part in world.values() for name, _ in part]
NAMES += [name for wire in WIRES.values() for phase in (*FORWARD, *BACKWARD) if "(" in phase for name, _ in wire(phase)]
runs = st.tuples(st.sampled_from(NAMES), st.sampled_from([7, 7, 20, 31]), st.integers(0, 300), st.integers(0, 40))


@given(st.lists(st.tuples(runs, st.sampled_from(["launched", "in a graph", "unknown"])), max_size=25))
def test_any_order_gives_compute_parts_of_compute_and_transfers_parts_of_transfers(tmp_path_factory, drawn) -> None:
    events = [launch(3, 99, name="cudaGraphLaunch")]
    for number, ((name, stream, at, us), how) in enumerate(drawn, 1):
        made = kernel(name, stream, at, us, 99 if how == "in a graph" else number)
        events += [made | ({"cat": "gpu_memcpy"} if name.startswith("Memcpy") else {})]
        events += [launch(at // 2, number)] if how == "launched" else []
    path = tmp_path_factory.mktemp("any") / "trace.json"
    path.write_text(compact(trace(events)))
    found = open_trace(path)
    phases = told(found)
    assert len(phases.rows) == len(found.work)
    computes = Rules().classify(found.work, found.names, found.sms) == CLASSES.index("compute")
    alone = ~np.isin(found.work.stream, found.work.stream[~computes])
    for row in phases.rows[computes & alone & (phases.rows >= 0)].tolist():
        assert phases.names[row].startswith(("attention", "experts", "mlp"))
    for row in phases.rows[~computes & (found.work.kind == 0) & (phases.rows >= 0)].tolist():
        assert phases.names[row].startswith(("dispatch", "combine"))
    assert sorted(set(phases.rows.tolist()) - {-1}) == list(range(len(phases.names)))


costs = st.lists(st.floats(0, 4), min_size=1, max_size=4)


@given(costs, st.data())
def test_the_path_is_the_best_of_all(cost, data) -> None:
    rows = st.lists(st.floats(-5, 5), min_size=len(STATES), max_size=len(STATES))
    weights = data.draw(st.lists(rows, min_size=len(cost), max_size=len(cost)))
    path = best_path(np.array(weights), np.array(cost)).tolist()

    def score(states) -> float:
        changes = sum(c for one, two, c in zip(states, states[1:], cost[1:], strict=False) if one != two)
        return sum(row[state] for row, state in zip(weights, states, strict=True)) - changes

    best = max(map(score, product(range(len(STATES)), repeat=len(cost))))
    assert score(path) == pytest.approx(best)


# --- the published profile --------------------------------------------------------------------------------------


def test_the_published_profile_with_its_annotations_hidden() -> None:
    profile = open_trace(real_trace("deepseek_train.json.gz"))
    truth = told(profile)
    hidden = told(replace(profile, annotations=Annotations.empty()))
    assert (truth.source, hidden.source) == ("annotations", "kernel order")
    length = profile.work.end_ns - profile.work.start_ns
    same = np.array([_part(truth, a) == _part(hidden, b) for a, b in zip(truth.rows, hidden.rows, strict=True)])
    assert length[same].sum() / length.sum() >= 0.99
    without = told(replace(profile, annotations=Annotations.empty(), launches=profile.launches.empty()))
    same = np.array([_part(truth, a) == _part(without, b) for a, b in zip(truth.rows, without.rows, strict=True)])
    assert length[same].sum() / length.sum() >= 0.95, "also where no launch is told"


def _part(phases: Phases, row: int) -> object:
    return part_of(phases.names[row]) if row >= 0 else None


@pytest.mark.parametrize(
    ("name", "parts"),
    [("b200_multimem.json.gz", {"attention", "experts"}), ("mi300_qwen05.json.gz", {"attention", "mlp"})],
)
def test_other_real_traces_are_cut_into_layers(name: str, parts: set[str]) -> None:
    [gpu] = exposures(open_trace(real_trace(name)))
    assert gpu.phase_source == "kernel order"
    assert {phase.name for phase in gpu.phases} == {f"{part}(F)" for part in parts}
    one, two = gpu.phases
    assert abs(one.count - two.count) <= 1 <= one.count - 20
