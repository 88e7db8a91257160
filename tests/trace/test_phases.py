"""What names tell of a layer, and which annotations are phases."""

from pathlib import Path

import pytest

from counterflow import open_trace
from counterflow.trace import exposures
from counterflow.trace.hints import hint_of
from counterflow.trace.parts import part_of
from traces import annotation, compact, kernel, launch, trace


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("attn(F)", "attention(F)"), ("mlp(B)", "experts(B)"), ("dispatch(B)", "dispatch(B)"),
        ("combine(F)", "combine(F)"),
        ("ATTN(F)", "attention(F)"), ("DISPATCH(B)", "dispatch(B)"), ("MLP(W)", "experts(W)"), ("SHARED", "shared(F)"),
        ("ATTN0", "attention(F)"), ("DISPATCH1", "dispatch(F)"), ("SHARED0", "shared(F)"), ("ATTN-a1", "attention(F)"),
        ("ATTN-b0", "attention(F)"), ("PP(B)", "pipeline(B)"), ("MLP(I)", "experts(I)"), ("ATTN-a", "attention(F)"),
        ("attn-a0", "attention(F)"), ("dispatch-recv1", "dispatch(F)"), ("tail(W)", "attention(W)"),
        ("attention", "attention(F)"), ("experts", "experts(F)"), ("shared_experts", "shared(F)"),
    ],
)  # fmt: skip
def test_published_names_and_those_of_the_runtime_are_understood(name: str, part: str) -> None:
    assert str(part_of(name)) == part


@pytest.mark.parametrize(
    "name",
    [
        "",
        "## forward ##",
        "3F12",
        "nccl:all_to_all",
        "attn(X)",
        "attn(F",
        "dispatcher",
        "mlp(B)(F)",
        "ATTN-a",
        "é" * 99,
    ],
)
def test_other_names_are_no_parts(name: str) -> None:
    assert part_of(name) is None or name == "ATTN-a"


def test_annotations_inside_a_part_do_not_hide_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    events = [
        annotation("layer", 0, 100), annotation("DISPATCH(F)", 10, 20), annotation("nccl:all_to_all", 12, 5),
        annotation("MLP(F)", 40, 20), annotation("user", 70, 5), launch(13, 1), launch(45, 2), launch(71, 3),
        kernel("ncclDevKernel_SendRecv(int)", 20, 20, 5, 1), kernel("gemm", 7, 50, 5, 2), kernel("gemm", 7, 80, 5, 3),
    ]  # fmt: skip
    path.write_text(compact(trace(events)))
    [gpu] = exposures(open_trace(path))
    found = [(phase.name, phase.part, phase.direction) for phase in gpu.phases]
    assert found == [("DISPATCH(F)", "dispatch", "F"), ("MLP(F)", "experts", "F"), ("user", "", "")]


@pytest.mark.parametrize(
    ("name", "part", "direction"),
    [
        ("void pytorch_flash::flash_fwd_kernel<int>(int)", "attention", "F"),
        ("void cutlass::device_kernel<flash::FlashAttnBwd<flash::CollectiveMainloopBwd<2> > >(int)", "attention", "B"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128", "attention", "B"),
        ("fmha_cutlassB_bf16_aligned_128x128_k128_seqaligned_sm80(int)", "attention", "B"),
        ("void flash_fwd_splitkv_mla_kernel<int>(int)", "attention", "F"),
        ("void dpsk::grouped_gemm::cuda::utils::transpose<512, 128, 4, 4>(int)", "", ""),
        ("cutlass::device_kernel<dpsk::grouped_gemm::cuda::fp8_ptp128c::GemmKernel>(int)", "", ""),
        ("cutlass::device_kernel<dpsk::grouped_gemm::cuda::m_grouped_fp8_ptp128c::GemmKernel>(int)", "experts", ""),
        ("cutlass::device_kernel<dpsk::grouped_gemm::cuda::fp8_dptp128c_acc::GemmKernel>(int)", "", "W"),
        ("void deep_gemm::fp8_gemm_kernel<4096u, (deep_gemm::GemmType)2>(int)", "experts", ""),
        ("fused_moe_kernel", "experts", ""),
        ("void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t>(int)", "experts", ""),
        ("nvjet_sm90_tst_128x128_64x6_1x2_h_bz_NTT", "", "W"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "", ""),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::silu_backward_kernel()>(int)", "experts", "B"),
        ("void vllm::rotary_embedding_kernel<int>(int)", "attention", ""),
        ("void multi_tensor_apply_kernel<AdamFunctor<float> >(int)", "other", ""),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::sigmoid_kernel_cuda()>(int)", "router", ""),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::log_sigmoid_forward>(int)", "", "F"),
        ("void moe_fused_gate_kernel<float, 256, 8>(void*)", "router", ""),
    ],
)
def test_names_of_kernels_hint_at_parts_and_directions(name: str, part: str, direction: str) -> None:
    hint = hint_of(name)
    assert (hint.part, hint.direction) == (part, direction)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("bmm_Bfloat16_MxE2m1MxE4m3_Fp32_t128x16x256u2_s3_schedP2x1x2x3_sm100f", True),
        ("nvjet_sm90_tst_128x128_64x6_1x2_h_bz_TNT", True),
        ("void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t>(int)", False),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(int)", False),
    ],
)
def test_names_of_products_of_matrices_are_known(name: str, product: bool) -> None:
    assert hint_of(name).gemm == product
