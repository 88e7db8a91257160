"""Replays of a CUDA graph that decodes with experts, made here from plans and from kernel names of several worlds."""

from collections.abc import Callable, Iterable

import numpy as np

from chunk_traces import COMPUTE, Kernels
from counterflow.trace.columns import GpuWork
from traces import Data, kernel, launch

PHASES = {"attention-a": "attention(F)", "attention-b": "attention(F)", "shared": "experts(F)", "experts": "experts(F)"}
PHASES |= {"dispatch": "dispatch(F)", "combine": "combine(F)"}

Step = tuple[str, int]
"""What is done, and for which micro-batch."""

_NORM = ("void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(int)", 4)
_LATENT_NORM = ("void flashinfer::norm::RMSNormKernel<8u, __nv_bfloat16>(int)", 2)
_QUANTISE = ("void per_token_group_quant_8bit_kernel<__nv_bfloat16, __nv_fp8_e4m3, false, false>(void const*)", 3)
_BMM = ("nvjet_tst_64x32_64x16_2x1_v_bz_NNT", 9)


def _dense(inner: int, us: int) -> list[tuple[str, int]]:
    return [_QUANTISE, (f"void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, {inner}u, (deep_gemm::GemmType)0>(float*)", us)]


def _masked(inner: int, us: int) -> tuple[str, int]:
    return f"void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, {inner}u, (deep_gemm::GemmType)2>(float*)", us


LATENT: dict[str, Kernels] = {
    "attention-a": [
        _NORM,
        *_dense(7168, 14),
        _LATENT_NORM,
        _LATENT_NORM,
        *_dense(1536, 18),
        _BMM,
        ("void BatchQKApplyRotaryPosIdsCosSinCacheKernel<true, 64u>(int)", 4),
        ("set_mla_kv_buffer_kernel", 3),
    ],
    "attention-b": [
        ("void flash_fwd_splitkv_mla_kernel<cutlass::bfloat16_t>(Flash_fwd_mla_params)", 160),
        ("void flash_fwd_mla_combine_kernel<float>(Flash_fwd_mla_params)", 6),
        _BMM,
        *_dense(16384, 60),
        _NORM,
        ("void router_gemm_kernel<__nv_bfloat16, 128, 8, 16, 256, 7168>(float*)", 9),
        ("void moe_fused_gate_kernel<float, 256, 8>(void*)", 6),
    ],
    "shared": [
        *_dense(7169, 14),
        ("void act_and_mul_kernel<__nv_bfloat16, &silu<float> >(int)", 3),
        *_dense(2048, 9),
    ],
    "experts": [
        _masked(7168, 70),
        ("_silu_and_mul_post_quant_kernel", 6),
        _masked(2048, 40),
    ],
}
"""As SGLang runs models with latent attention."""

GROUPED: dict[str, Kernels] = {
    "attention-a": [
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(int)", 4),
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", 20),
        ("void vllm::fused_qk_norm_rope_kernel<c10::BFloat16>(int)", 4),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>(int)", 3),
    ],
    "attention-b": [
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2> > >(int)", 90),
        ("nvjet_tst_64x64_64x13_2x1_v_bz_splitK_TNT", 22),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(int)", 3),
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(int)", 4),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT", 6),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(int)", 3),
        ("void vllm::moe::topkGatingSoftmax<8, 128, 4, 16>(float const*)", 4),
    ],
    "shared": [],
    "experts": [
        ("void vllm::moe::moe_align_block_size_kernel<int>(int*)", 5),
        ("fused_moe_kernel", 60),
        ("void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel<c10::BFloat16> >(int)", 4),
        ("fused_moe_kernel", 35),
        ("void vllm::moe::moe_sum_kernel<c10::BFloat16, 8>(int)", 5),
    ],
}
"""As vLLM runs models with grouped queries and without shared experts."""


def _plain() -> dict[str, Kernels]:
    attention = COMPUTE["pytorch"]["attention(F)"]
    core = next(place for place, (name, _) in enumerate(attention) if "flash" in name)
    linear = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT"
    silu = "void at::native::vectorized_elementwise_kernel<8, at::native::silu_kernel(at::TensorIteratorBase&)>(int)"
    times = "void at::native::vectorized_elementwise_kernel<8, at::native::BinaryFunctor<float, MulFunctor> >(int)"
    summed = [("void at::native::vectorized_gather_kernel<16, long>(char*)", 5), ("nvjet_tst_512x8_64x3_v_bz_NNT", 9)]
    return {
        "attention-a": [*summed, *attention[:core], ("void at::native::CatArrayBatchedCopy<int>(int)", 9)],
        "attention-b": attention[core:],
        "shared": [(linear, 40), (silu, 3), (times, 3), (linear, 20)],
        "experts": COMPUTE["pytorch"]["experts(F)"],
    }


DECODERS = {"latent": LATENT, "grouped": GROUPED, "plain": _plain()}


def _low_latency(what: str) -> list[tuple[str, int]]:
    name = f"void deep_ep::internode_ll::{what}<true, false, 3, 10, 7168>(void*)"
    return [(name, 20), (name, 15)]


DECODING_WIRES: dict[str, Callable[[str], Kernels]] = {
    "low latency": _low_latency,
    "nccl": lambda what: [("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 90)],
    "unknown": lambda what: [("push_rows_kernel", 80 if what == "dispatch" else 130)],
    "copies": lambda what: [("Memcpy DtoH (Device -> Pinned)", 24)] * (4 if what == "dispatch" else 7),
}


def two_micro_batches(layers: int) -> list[Step]:
    """The published plan: while one micro-batch's rows are under way the other one computes."""
    steps: list[Step] = [("attention-a", 0), ("attention-b", 0)]
    for _ in range(layers):
        for one in (0, 1):
            steps += [("dispatch", one), ("shared", one), ("attention-a", 1 - one)]
            steps += [("experts", one), ("combine", one), ("attention-b", 1 - one)]
    return steps[:-2]


def one_micro_batch(layers: int) -> list[Step]:
    layer = ["attention-a", "attention-b", "dispatch", "shared", "experts", "combine"]
    return [(step, 0) for step in layer * layers]


class Replay:
    """One launch that runs all steps: compute in order, and transfers in order beside it.

    Compute goes on on another stream whenever it waited for a transfer, and so do the copies that leave the GPU; those
    that come back, ``lag`` µs later, have a stream of their own.
    """

    def __init__(self, compute: dict[str, Kernels], wire: str, lag: int = 3) -> None:
        self._compute, self._wire, self._lag = compute, wire, lag
        self.events: list[Data] = [launch(0, 1, name="cudaGraphLaunch")]
        self.truth: dict[tuple[int, str], str] = {}
        """The phase of each piece of work, by when it starts in µs and its name."""
        self._free = {"compute": 10, "out": 10, "in": 10}
        self._arrived: dict[int, int] = {}
        self._stream = 100

    def steps(self, steps: Iterable[Step]) -> "Replay":
        for step, one in steps:
            if step in ("dispatch", "combine"):
                self._transfer(step, one)
                continue
            arrives = self._arrived.get(one, 0) if step in ("attention-a", "experts") else 0
            if arrives > self._free["compute"]:
                self._free["compute"] = arrives + 2
                self._stream += 1
            for name, us in self._compute[step]:
                self._free["compute"] = self._work(name, us, step, self._stream, self._free["compute"]) + 1
        return self

    def _transfer(self, step: str, one: int) -> None:
        begin = self._free["compute"]
        for name, us in DECODING_WIRES[self._wire](step):
            copy = name.startswith("Memcpy")
            end = self._work(name, us, step, self._stream + 1 if copy else 100, max(begin, self._free["out"]))
            self._free["out"] = end + 3
            if copy:
                end = self._work("Memcpy HtoD (Pinned -> Device)", us, step, 50, max(end + self._lag, self._free["in"]))
                self._free["in"] = end + 3
            elif self._wire == "low latency":
                begin = max(end + 40, begin)
            self._arrived[one] = end

    def _work(self, name: str, us: int, step: str, stream: int, start: int) -> int:
        while (start, name) in self.truth:
            start += 1
        made = kernel(name, stream, start, us, grid=20 if step in ("dispatch", "combine") else 132)
        self.events.append(made | ({"cat": "gpu_memcpy"} if name.startswith("Memcpy") else {}))
        self.truth[start, name] = PHASES[step]
        return start + us


def work_of(names: list[str], us: list[int]) -> GpuWork:
    """Kernels of these names and lengths, all from 0 on; a name is told by its place among the sorted ones."""
    used = sorted(set(names))
    columns = {"name": np.array([used.index(name) for name in names]), "end_ns": 1000 * np.array(us)}
    zeros = np.zeros(len(names), dtype=np.int64)
    rest = ("start_ns", "kind", "device", "stream", "correlation", "blocks", "threads")
    return GpuWork(**columns, **dict.fromkeys(rest, zeros))
