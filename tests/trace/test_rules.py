"""What a kernel is: by how its name begins, its kind of copy, its stream, and a user's own rules."""

import json
from pathlib import Path

import pytest

from counterflow import open_trace
from counterflow.errors import TraceError
from counterflow.trace import CLASSES, Rules, function_of
from traces import compact, kernel, trace


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "transfer"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", "transfer"),
        ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "transfer"),
        ("ncclSymDevKernel_AllReduce_RSxLD_AGxST(ncclSymDevArgs)", "transfer"),
        ("rcclGenericKernel<1, false>(ncclDevComm*)", "transfer"),
        ("void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*)", "transfer"),
        ("void c10d::symmetric_memory::barrier_kernel(unsigned int**)", "waiting"),
        ("void (anonymous namespace)::two_shot_all_reduce_kernel<float>(float*)", "transfer"),
        ("void vllm::cross_device_reduce_2stage<__nv_bfloat16, 8>(RankData*)", "transfer"),
        ("nvshmemi_transfer_put_kernel", "transfer"),
        ("void nvshmemi_barrier_all_kernel<1>(int)", "waiting"),
        ("mscclKernel_Sum_float_Simple_false(ncclDevComm*)", "transfer"),
        ("void mscclpp::collective::kernel(int)", "transfer"),
        ("void deep_ep::internode_ll::dispatch<true, 7168>(void*)", "transfer"),
        ("void deep_ep::intranode::combine<__nv_bfloat16, 8, 768>(__nv_bfloat16*)", "transfer"),
        ("void deep_ep::intranode::notify_dispatch<8>(int const*)", "waiting"),
        ("void deep_ep::intranode::cached_notify_combine<8>(void**)", "waiting"),
        ("void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*)", "preparing"),
        ("void dpsk::ep::internode::combine<false, 8, __nv_bfloat16, 8, 2, 16, 24>(int4*, float*)", "transfer"),
        ("void dpsk::ep::internode::cached_notify<false>(int)", "waiting"),
        ("void dpsk::ep::cuda::get_dispatch_layout<256, 32, 8>(long const*)", "preparing"),
        ("_ZN7deep_ep9internode8dispatchILb0ELi8EEEvPi", "transfer"),
        ("void primus_turbo::deep_ep::intranode::combine<hip_bfloat16, 8, 1024>(hip_bfloat16*)", "transfer"),
        ("void primus_turbo::deep_ep::intranode::notify_dispatch<8>(int const*)", "waiting"),
        ("void primus_turbo::deep_ep::layout::get_dispatch_layout<256, 4, 8>(long const*)", "preparing"),
        ("void nixl_ep::ep_kernels::dispatch<true, 7168>(void*)", "transfer"),
        ("void uccl::intranode::notify_dispatch<8>(int const*)", "waiting"),
        ("void barrier_on_stream_kernel_threadgroup<(threadgroup_t)1>(int, int)", "waiting"),
        ("void fcollect_on_stream_kernel<int>(int)", "transfer"),
        ("c10d::nvshmem_extension::exchangeSplitAndOffset(long*, int, int)", "waiting"),
        ("c10d::nvshmem_extension::allToAllV(void*, void*, long*, unsigned long, int, int)", "transfer"),
        ("void tensorrt_llm::kernels::moe_comm::moeA2ADispatchKernel<WarpPolicy, 8>(int const*)", "transfer"),
        ("void flashinfer::moe_alltoall::moeA2ACombineKernel<__nv_bfloat16>(int)", "transfer"),
        ("tensorrt_llm::kernels::moe_comm::moeA2APrepareDispatchKernel(int*, int*, int)", "preparing"),
        ("void tensorrt_llm::kernels::ar_fusion::allreduce_fusion_kernel_oneshot_lamport<8>(int)", "transfer"),
        ("EpDispatchIntraNodeKernel_bf16", "transfer"),
        ("void mori::moe::EpCombineIntraNodeKernel<hip_bfloat16>(int)", "transfer"),
        ("void mooncake::combine<7168>(int)", "transfer"),
        ("kernel_dispatch_token_intra_node", "transfer"),
        ("void userbuffers_fp16_sum_inplace_gpu_rr_rs_oop_fp8<8, __nv_fp8_e4m3>(int)", "transfer"),
        ("kuserbuffers_pushsendrecv(int*, int*, int4*, int4*, int)", "transfer"),
        ("Memcpy PtoP (Device -> Device)", "transfer"),
        ("__amd_rocclr_fillBufferAligned", "memory"),
        # Names that only hold a communication's name somewhere.
        ("void cub::DeviceTransform<dpsk::ep::internode::SourceMeta>(dpsk::ep::internode::SourceMeta*)", "compute"),
        ("void cub::detail::for_each::static_kernel<deep_ep::layout::get_dispatch_layout>(int)", "compute"),
        ("void at::native::vectorized_elementwise_kernel<4, ncclKernel_AllReduce>(int)", "compute"),
        ("void dpsk::grouped_gemm::cuda::utils::transpose<512>(unsigned char const*)", "compute"),
        ("void cuda::reduce_fused_impl<__nv_bfloat16, false>(int4 const*)", "compute"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(int)", "compute"),
        ("void splitKreduce_kernel<float, float>(cublasSplitKParams<float>)", "compute"),
        ("triton_poi_fused_all_to_all_single_clone_permute_view_0", "compute"),
        ("triton_red_fused__to_copy_add_reduce_scatter_tensor_wait_tensor_3", "compute"),
        ("my_model::nccl_like_layer(float*)", "compute"),
        ("gemm_for_deep_ep(float*)", "compute"),
        ("", "compute"),
    ],
)
def test_a_kernel_is_what_its_function_is(name: str, kind: str) -> None:
    assert Rules().of_name(name) == kind


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("rotary_kernel", "rotary_kernel"),
        ("void a::b<c(d)>::e<(f)1>(int (*)(int))", "a::b::e"),
        ("std::enable_if<(((8)>(0)))&&vllm::_typeC<int>::exists, void>::type vllm::norm<int, 8>(int*)", "vllm::norm"),
        ("void (anonymous namespace)::k<x>(int)", "{anonymous}::k"),
        ("Memset (Device)", "Memset (Device)"),
        ("twins of stage 3", "twins of stage 3"),
        ("void <<<((", "void"),
        (")))>>>", ">>>"),
        ("_ZN", "_ZN"),
        ("_ZN99short", "short"),
    ],
)
def test_a_functions_name_is_found_among_brackets(name: str, function: str) -> None:
    assert function_of(name) == function


def classes(tmp_path: Path, events: list, rules: Rules | None = None) -> list[str]:
    path = tmp_path / "trace.json"
    path.write_text(compact(trace(events)))
    found = open_trace(path)
    kinds = (rules or Rules()).classify(found.work, found.names, found.sms)
    return [CLASSES[kind] for kind in kinds.tolist()]


def test_copies_and_fills_are_memory(tmp_path: Path) -> None:
    names = ["Memcpy HtoD (Pinned -> Device)", "Memcpy PtoP (Device -> Device)"]
    copies = [kernel(name, 7, ts, 1) | {"cat": "gpu_memcpy"} for ts, name in enumerate(names)]
    assert classes(tmp_path, [*copies, kernel("Memset (Device)", 7, 5, 1) | {"cat": "gpu_memset"}]) == [
        "memory",
        "transfer",
        "memory",
    ]


def test_long_small_kernels_on_a_stream_of_their_own_are_unknown(tmp_path: Path) -> None:
    gemm, strange = kernel("gemm", 7, 0, 100), kernel("my_a2a", 20, 10, 80, grid=16)
    assert classes(tmp_path, [gemm, strange]) == ["compute", "unknown"]
    assert classes(tmp_path, [gemm, strange | {"dur": 20}]) == ["compute", "compute"], "it is short"
    assert classes(tmp_path, [gemm, strange, kernel("norm", 20, 95, 1)]) == ["compute"] * 3, "the stream has large ones"
    assert classes(tmp_path, [strange]) == ["compute"], "there is no other stream"
    decode = kernel("gemv", 7, 0, 100, grid=8)
    assert classes(tmp_path, [decode, strange]) == ["compute", "compute"], "no stream has large ones"
    cast = strange | {"name": "void at::native::elementwise_kernel_manual_unroll<128, 4>(int)"}
    assert classes(tmp_path, [gemm, cast]) == ["compute", "compute"], "it is PyTorch's own"


def test_where_all_gpus_are_alike_their_numbers_do_not_matter(tmp_path: Path) -> None:
    """On AMD the GPU work counts other devices than ``deviceProperties`` does."""
    work = [kernel("gemm", 7, 0, 100, device=9, grid=304), kernel("my_a2a", 20, 10, 80, grid=16, device=9)]
    gpus = [{"id": 0, "numSms": 304}, {"id": 1, "numSms": 304}]
    path = tmp_path / "trace.json"
    path.write_text(compact(trace(work, deviceProperties=gpus)))
    found = open_trace(path)
    assert found.sms == {0: 304, 1: 304, 9: 304}
    assert Rules().classify(found.work, found.names, found.sms).tolist() == [
        CLASSES.index("compute"),
        CLASSES.index("unknown"),
    ]


def rules_file(folder: Path, *rules: object) -> Path:
    path = folder / "rules.json"
    path.write_text(json.dumps({"rules": rules}))
    return path


def test_a_users_rules_come_before_ours_and_the_first_one_decides(tmp_path: Path) -> None:
    rules = Rules.read(
        rules_file(
            tmp_path,
            {"pattern": "my_a2a", "class": "communication"},
            {"pattern": "ncclKernel_", "stream": 7, "class": "waiting"},
            {"stream": 9, "class": "memory"},
            {"pattern": "my_.*", "class": "unknown"},
        )
    )
    events = [
        kernel("void my_a2a<int>(int)", 20, 0, 1),
        kernel("ncclKernel_A()", 7, 1, 1),
        kernel("ncclKernel_A()", 8, 2, 1),
        kernel("gemm", 9, 3, 1),
        kernel("my_gemm", 7, 4, 1),
        kernel("not_my_a2a", 7, 5, 1),
    ]
    assert classes(tmp_path, events, rules) == ["transfer", "waiting", "transfer", "memory", "unknown", "compute"]


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"pattern": "a"}, 'rule 0 has no class; it needs "class", one of compute, transfer, waiting'),
        ({"class": "fast", "pattern": "a"}, "rule 0 has no class"),
        ({"class": "compute"}, 'rule 0 meets nothing; it needs a "pattern" of text, a "stream" number, or both'),
        ({"class": "compute", "stream": "7"}, 'rule 0 has a "pattern" that is no text, or a "stream" that is no whole'),
        ({"class": "compute", "pattern": "("}, "rule 0 has the pattern '(', which is no regular expression"),
        (5, "rule 0 has no class"),
    ],
)
def test_a_malformed_rule_is_refused_by_its_number(tmp_path: Path, rule: object, sentence: str) -> None:
    with pytest.raises(TraceError) as refused:
        Rules.read(rules_file(tmp_path, rule))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("text", ["", "5", "{}", '{"rules": 5}', "["])
def test_a_file_without_rules_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rules.json"
    path.write_text(text)
    with pytest.raises(TraceError, match=r"cannot be read as rules|holds no rules"):
        Rules.read(path)
