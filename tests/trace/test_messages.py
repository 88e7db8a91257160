"""Messages: what a trace tells of who said how much to whom, in whatever formatting."""

import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from counterflow import open_trace
from counterflow.trace import Message, messages
from counterflow.trace.messages import unheard
from ranks import EPOCH_NS
from traces import FORMATTINGS, Data, annotation, compact, kernel, launch, real_trace, sample, trace


def described(name: str, ts: int, **more: object) -> Data:
    told = {
        "Collective name": name,
        "In msg nelems": 100,
        "dtype": "BFloat16",
        "Process Group Name": "3",
        "Process Group Ranks": "[0, 4]",
        "Seq": 7,
    } | more
    made = kernel(f"ncclDevKernel_{name}(int)", 20, ts, 5, 1)
    return made | {"args": made["args"] | told}


def read(folder: Path, events: list[Data], formatting: str = "kineto") -> list[Message]:
    path = folder / "trace.json"
    path.write_text(FORMATTINGS[formatting](trace(events, baseTimeNanoseconds=EPOCH_NS)))
    return messages(open_trace(path))


@pytest.mark.parametrize("formatting", FORMATTINGS)
def test_nccl_s_kernels_tell_group_number_and_size_in_every_formatting(tmp_path: Path, formatting: str) -> None:
    events = [*sample()["traceEvents"], described("allreduce", 40), *sample()["traceEvents"]]
    assert read(tmp_path, events, formatting) == [
        Message("allreduce", "3", (0, 4), EPOCH_NS + 40_000, EPOCH_NS + 45_000, 200, False, 7)
    ]


@pytest.mark.parametrize("formatting", FORMATTINGS)
def test_gloo_s_ranges_tell_shapes(tmp_path: Path, formatting: str) -> None:
    ranges = [
        annotation("gloo:send", 3, 4) | {"args": {"Input Dims": [[2, 3], [5]], "Input type": ["float", "long int"]}},
        annotation("gloo:recv", 9, 4) | {"args": {"Input Dims": [[2, 3]], "Input type": ["a new type"]}},
    ]
    found = read(tmp_path, ranges, formatting)
    assert [(one.name, one.size_bytes, one.is_collective, one.on_host) for one in found] == [
        ("send", 64, False, True),
        ("recv", None, False, True),
    ]


@pytest.mark.parametrize(
    ("kernel_name", "call"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "SendRecv"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", "AllReduce"),
        ("ncclSymkDevKernel_ReduceScatter_LD_sum_bf16(ncclSymkDevWorkArgs4K)", "ReduceScatter"),
        ("ncclAllReduceRingLLKernel_sum_f32(ncclColl)", "AllReduce"),
        ("ncclSendRecvKernel_copy_i8(ncclColl)", "SendRecv"),
        ("void rcclGenericKernel<1, false>(ncclDevKernelArgsStorage<4096ul>)", "Generic"),
    ],
)
def test_a_kernel_that_is_not_described_tells_its_call_by_its_name(tmp_path: Path, kernel_name: str, call: str) -> None:
    assert [one.name for one in read(tmp_path, [launch(1, 1), kernel(kernel_name, 20, 10, 5, 1)])] == [call]
    named = [annotation("nccl:send 0->1", 0, 5), launch(1, 1), kernel(kernel_name, 20, 10, 5, 1)]
    assert [one.name for one in read(tmp_path, named)] == ["send"]


def test_a_call_on_the_cpu_counts_for_its_size_where_it_goes_to_another_rank(tmp_path: Path) -> None:
    """The call of a collective returns at once: its kernel tells when it was."""
    calls = [
        described(name, 40) | {"cat": "cpu_op", "name": "record_param_comms"} for name in ("send", "recv", "allreduce")
    ]
    assert [(one.name, one.size_bytes, one.on_host) for one in read(tmp_path, calls)] == [
        ("send", 200, True),
        ("recv", 200, True),
    ]


def test_kernels_without_a_description_are_named_by_the_call_that_launched_them(tmp_path: Path) -> None:
    events = [
        annotation("nccl:all_to_all", 0, 5),
        launch(1, 1),
        launch(7, 2),
        kernel("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclWorkElem)", 20, 10, 5, 1),
        kernel("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclWorkElem)", 20, 20, 5, 2),
        kernel("void gemm<ncclDevKernel_AllReduce>(int)", 7, 20, 5, 3),
    ]
    found = read(tmp_path, events)
    assert [(one.name, one.is_collective) for one in found] == [("all_to_all", True), ("SendRecv", False)]


def test_a_kernel_of_several_calls_tells_nothing_and_is_none_the_less_a_message(tmp_path: Path) -> None:
    events = [
        annotation("nccl:coalesced", 0, 5),
        launch(1, 2),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 20, 10, 5, 2),
        annotation("nccl:send 0->1", 6, 5),
        launch(7, 3),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 20, 20, 5, 3),
        described("allreduce", 40),
    ]
    found = read(tmp_path, events)
    assert [(one.name, one.is_collective) for one in found] == [
        ("coalesced", False),
        ("send", False),
        ("allreduce", True),
    ]


def test_what_is_malformed_is_left_out(tmp_path: Path) -> None:
    events = [
        described("allreduce", 40) | {"dur": "long"},
        described("allreduce", 40) | {"ts": True},
        described("allreduce", 1, **{"In msg nelems": -5, "Seq": "first", "Process Group Name": 3}),
        annotation("gloo:send", 3, 4) | {"args": {"Input Dims": [[2, "x"]], "Input type": ["float"]}},
        annotation("gloo:send", 5, 4) | {"args": []},
    ]
    found = read(tmp_path, events)
    assert [(one.name, one.size_bytes, one.group, one.sequence) for one in found] == [
        ("allreduce", None, "", -1),
        ("send", None, "", -1),
        ("send", None, "", -1),
    ]


def test_long_and_packed_traces_lose_no_message_between_blocks(tmp_path: Path) -> None:
    filler = annotation("x" * 3000, 0, 1)
    events = [event for number in range(600) for event in (described("allreduce", number, Seq=number), filler)]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(FORMATTINGS["compact"](trace(events)).encode()))
    assert [one.sequence for one in messages(open_trace(path))] == list(range(600))


def test_a_published_trace_tells_its_gather(tmp_path: Path) -> None:
    found = messages(open_trace(real_trace("b200_multimem.json.gz")))
    assert [(one.name, one.group, one.ranks, one.size_bytes, one.end_ns - one.start_ns) for one in found] == [
        ("_allgather_base", "3", tuple(range(8)), 50_272, 21_953)
    ]


def test_the_all_to_alls_of_eight_gpus_are_no_messages_between_two_ranks() -> None:
    found = messages(open_trace(real_trace("a100_nccl_8ranks.json.gz")))
    assert Counter(one.name for one in found) == {"all_to_all": 42, "all_reduce": 18}


def test_a_time_before_the_epoch_is_one_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(FORMATTINGS["kineto"](trace([described("allreduce", 40)], baseTimeNanoseconds=-7_000)))
    opened = open_trace(path)
    assert [one.start_ns for one in messages(opened)] == opened.work.start_ns.tolist() == [33_000]


def test_of_a_pipe_the_names_of_kernels_are_left(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(FORMATTINGS["kineto"](trace([described("allreduce", 40)])))
    (one,) = messages(replace(open_trace(path), file="-"))
    assert (one.name, one.size_bytes) == ("allreduce", None)


def test_of_a_trace_that_came_through_a_pipe_messages_are_not_known_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    event = annotation("gloo:all_reduce", 5, 2) | {"args": {"Input Dims": [[4, 8]], "Input type": ["float"]}}
    path.write_text(compact(trace([event])))
    there = open_trace(path)
    piped = replace(there, file="-")
    assert list(unheard([there])) == []
    assert list(unheard([there, piped])) == [
        "- cannot be read a second time, so the groups and sizes of its messages are not known: give a file in place "
        "of a pipe"
    ]
    assert (len(messages(there)), messages(piped)) == (1, [])
