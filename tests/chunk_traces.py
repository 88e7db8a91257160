"""Traces of layers with experts, made here from plans and from the kernel names of several worlds, with their truth."""

from collections.abc import Iterable

from traces import Data, kernel, launch

COMPUTE_STREAM, WIRE_STREAM, COPY_STREAM = 7, 20, 31

Kernels = list[tuple[str, int]]
"""Names and how long they take, in µs."""


def _mangled(first_major: int, second_major: int) -> str:
    """A grouped GEMM of PyTorch, as the profiler names it: mangled, the layouts of both operands inside."""
    return (
        "_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm6kernel13GemmUniversalINS5_"
        "17GroupProblemShapeIN4cute5tupleIJiiiEEEEENS5_10collective13CollectiveMmaINSX_"
        f"5MajorE{first_major}ELSZ_{second_major}ELNSX_7ScaleInE1EEEvNT_6ParamsE"
    )


def _nvjet(layout: str, us: int) -> tuple[str, int]:
    return f"nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_{layout}", us


_ELEMENTWISE = (
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16> >(int)",
    6,
)
_TOPK = [("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(int)", 20), _ELEMENTWISE]

PYTORCH: dict[str, Kernels] = {
    "attention(F)": [
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>(int)", 12),
        *[_nvjet("TNT", 90)] * 3,
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64> >(pytorch_flash::Flash_fwd_params)",
            400,
        ),
        _nvjet("TNN", 120),
        _ELEMENTWISE,
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>(int)", 12),
        _nvjet("TNT", 30),
        *_TOPK,
    ],
    "experts(F)": [
        ("void at::native::vectorized_gather_kernel<16, long>(char*)", 40),
        (_mangled(0, 0), 300),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::silu_kernel(at::TensorIteratorBase&)>(int)",
            30,
        ),
        _ELEMENTWISE,
        (_mangled(0, 0), 150),
        ("void at::native::indexFuncLargeIndex<c10::BFloat16, long, at::native::ReduceAdd>(int)", 60),
    ],
    "experts(B)": [
        ("void at::native::vectorized_gather_kernel<16, long>(char*)", 40),
        (_mangled(0, 1), 160),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::silu_backward_kernel(int)>(int)", 30),
        _ELEMENTWISE,
        (_mangled(0, 1), 310),
        ("void (anonymous namespace)::indexing_backward_kernel<c10::BFloat16, 4>(long const*)", 50),
    ],
    "experts(W)": [(_mangled(1, 1), 160), (_mangled(1, 1), 160), _nvjet("NTN", 60), (_mangled(1, 1), 150)],
    "attention(B)": [
        ("void (anonymous namespace)::softmax_warp_backward<float, float, float, 6>(float*)", 5),
        _nvjet("NNT", 40),
        _ELEMENTWISE,
        ("void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float>(int)", 20),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>(int)", 8),
        _nvjet("NNT", 110),
        ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true>(pytorch_flash::Flash_bwd_params)", 30),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<int>(pytorch_flash::Flash_bwd_params)", 900),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel<int>(pytorch_flash::Flash_bwd_params)", 30),
        *[_nvjet("NNT", 90)] * 3,
        ("void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float>(int)", 20),
    ],
    "attention(W)": [_nvjet("NTN", 90)] * 5,
}

FP8: dict[str, Kernels] = {
    "attention(F)": [
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<int>(int)", 12),
        ("void cast_to_fp8<128>(float*)", 10),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<7168u, (deep_gemm::GemmType)0>(float*)", 120),
        ("void rotary_fwd(int)", 10),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", 500),
        ("void cast_to_fp8<128>(float*)", 10),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<7168u, (deep_gemm::GemmType)0>(float*)", 160),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<int>(int)", 12),
        ("sm90_xmma_gemm_bf16f32_bf16f32_f32_tn_n_tilesize128x128x64_cublas", 25),
        ("void transformer_engine::fused_router::fused_topk_with_score_function_forward_kernel<float>(int)", 9),
    ],
    "experts(F)": [
        ("_permute_kernel", 60),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<4096u, (deep_gemm::GemmType)1>(float*)", 300),
        ("void transformer_engine::swiglu_and_cast<128>(float*)", 40),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<7168u, (deep_gemm::GemmType)1>(float*)", 160),
        ("_unpermute_kernel", 60),
    ],
    "experts(B)": [
        ("_unpermute_bwd_kernel", 60),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<2048u, (deep_gemm::GemmType)1>(float*)", 160),
        ("void transformer_engine::dswiglu_backward_and_cast<128>(float*)", 40),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<7168u, (deep_gemm::GemmType)1>(float*)", 310),
    ],
    "experts(W)": [
        ("void cast_transpose<128>(float*)", 20),
        *[("void deep_gemm::sm90_fp8_wgrad_gemm_impl<7168u>(float*)", 120)] * 5,
    ],
    "attention(B)": [
        ("void transformer_engine::fused_router::fused_topk_with_score_function_backward_kernel<float>(int)", 9),
        ("void transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<int>(int)", 18),
        ("void cast_to_fp8<128>(float*)", 10),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<7168u, (deep_gemm::GemmType)0>(float*)", 150),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)", 30),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_kernel0_0", 1100),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", 30),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<7168u, (deep_gemm::GemmType)0>(float*)", 220),
        ("void transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<int>(int)", 18),
    ],
    "attention(W)": [("void deep_gemm::sm90_fp8_wgrad_gemm_impl<7168u>(float*)", 110)] * 4,
}

TRITON: dict[str, Kernels] = {
    "attention(F)": [
        ("triton_red_fused_add_mean_mul_pow_rsqrt_0", 12),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_tn_align8", 180),
        ("_attn_fwd", 420),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_tn_align8", 140),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_1", 12),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64_32x3_tn_align8", 20),
        ("triton_per_fused_softmax_topk_2", 9),
    ],
    "experts(F)": [
        ("triton_poi_fused_index_3", 40),
        ("_grouped_mm_kernel", 290),
        ("triton_poi_fused_mul_silu_4", 30),
        ("_grouped_mm_kernel", 150),
        ("triton_poi_fused_index_add_5", 50),
    ],
    "experts(B)": [
        ("triton_poi_fused_index_6", 40),
        ("_grouped_mm_dgrad_kernel", 160),
        ("triton_poi_fused_mul_silu_backward_7", 40),
        ("_grouped_mm_dgrad_kernel", 300),
    ],
    "experts(W)": [("_grouped_mm_wgrad_kernel", 150)] * 3,
    "attention(B)": [
        ("triton_per_fused__softmax_backward_data_8", 9),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64_32x3_nn_align8", 20),
        ("triton_red_fused_native_layer_norm_backward_9", 20),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_nn_align8", 140),
        ("_attn_bwd_preprocess", 20),
        ("_attn_bwd", 900),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_nn_align8", 180),
        ("triton_red_fused_native_layer_norm_backward_9", 20),
    ],
    "attention(W)": [("cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_nt_align8", 90)] * 4,
}

COMPUTE = {"pytorch": PYTORCH, "fp8": FP8, "triton": TRITON}


def deep_ep(phase: str) -> Kernels:
    """The kernels of a transfer; the backward of a dispatch is a combine, and the other way round."""
    if phase in ("dispatch(F)", "combine(B)"):
        notify = "notify_dispatch" if phase == "dispatch(F)" else "cached_notify"
        return [
            (f"void deep_ep::internode::{notify}<false, 8>(int)", 60),
            ("void deep_ep::internode::dispatch<8>(int)", 400),
        ]
    return [
        ("void deep_ep::internode::cached_notify<false, 8>(int)", 60),
        ("void deep_ep::internode::combine<8>(int)", 500),
    ]


def nccl(phase: str) -> Kernels:
    return [("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 400)]


def copies(phase: str) -> Kernels:
    return [("Memcpy DtoH (Device -> Pinned)", 100), ("Memcpy HtoD (Pinned -> Device)", 100)] * 3


WIRES = {"deep_ep": deep_ep, "nccl": nccl, "copies": copies}

F_OVER_B = ("attention(F)", "combine(B)", "experts(B)", "dispatch(F)", "experts(W)", "dispatch(B)", "experts(F)")
TRAINING_PLAN = [*F_OVER_B, "attention(B)", "combine(F)", "attention(W)"]
LATE_F = ("combine(B)", "attention(F)", "experts(B)", "dispatch(F)", "dispatch(B)", "experts(W)", "experts(F)")
PUBLISHED_ORDER = [*LATE_F, "attention(B)", "attention(W)", "combine(F)"]
FORWARD = ["attention(F)", "dispatch(F)", "experts(F)", "combine(F)"]
BACKWARD = ["combine(B)", "experts(B)", "dispatch(B)", "attention(B)"]


class Builder:
    """Lays phases out as a program launches them: compute on one stream, transfers on another, both in order."""

    def __init__(self, compute: dict[str, Kernels], wire: str, pause: int = 60) -> None:
        self.compute, self.wire, self.pause = compute, wire, pause
        self.events: list[Data] = []
        self.truth: list[tuple[str, str, int]] = []
        """The kernel's name, its phase, and how long it takes."""
        self._now, self._correlation = 0, 0
        self._free: dict[int, int] = {}
        self._done = {"F": 0, "B": 0}  # each micro-batch runs its own phases one after another

    def phases(self, phases: Iterable[str], thread: int = 9) -> "Builder":
        for phase in phases:
            moves = phase.startswith(("dispatch", "combine"))
            self._now += self.pause
            direction = phase[-2] if phase.endswith(")") else ""
            after, ends = self._done.get(direction, 0), [0]
            for name, us in WIRES[self.wire](phase) if moves else self.compute[phase]:
                ends.append(self._kernel(name, us, phase, moves, thread, after))
            self._done[direction] = max(ends)
        return self

    def _kernel(self, name: str, us: int, phase: str, moves: bool, thread: int, after: int) -> int:
        self._correlation += 1
        self._now += 5
        copy = name.startswith("Memcpy")
        stream = COPY_STREAM + ("HtoD" in name) if copy else WIRE_STREAM if moves else COMPUTE_STREAM
        start = max(self._now + 8, self._free.get(stream, 0) + 2, after + 3)
        self._free[stream] = start + us
        made = kernel(name, stream, start, us, self._correlation, grid=20 if moves else 132)
        self.events += [launch(self._now, self._correlation, thread), made | ({"cat": "gpu_memcpy"} if copy else {})]
        self.truth.append((name, phase, us))
        return start + us
