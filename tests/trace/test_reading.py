"""Reading: the same columns from every packing, formatting and dialect, by the scan, in stretches, or in full."""

import gzip
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from decimal import Decimal
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, open_trace, simulate
from counterflow.errors import TraceError
from counterflow.schedule import generate
from counterflow.timeline import write_chrome
from counterflow.trace import Trace, exposures, open_traces, read, source, ways, whole
from counterflow.trace.reference import Launch, Range, Work, read_reference
from counterflow.trace.scan import Opening
from traces import FORMATTINGS, compact, kernel, kineto, launch, layer, mixed, real_trace, sample, trace, traces


def rows(found: Trace) -> tuple[list[Work], list[Launch], list[Range]]:
    """In the reference's form, with names spelt out."""
    work = [Work(s, e, found.names[name], *rest) for s, e, name, *rest in found.work.tuples()]
    launches = [Launch(s, e, correlation) for s, e, _, correlation in found.launches.tuples()]
    ranges = [Range(s, e, found.names[name], on_gpu) for s, e, name, _, on_gpu, *_ in found.annotations.tuples()]
    return work, launches, ranges


def written(folder: Path, text: str, name: str = "trace.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def in_stretches(path: Path, stretch: int, block: int) -> tuple[list[Work], list[Launch], list[Range]] | None:
    """As several processes read it, one after another; None where the scan does not fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "STRETCH", stretch)
        patch.setattr(ways, "BLOCK", block)
        patch.setattr(ways, "pool_of", lambda most: ThreadPoolExecutor(1))
        found = ways._by_processes(path, path.stat().st_size, ways._Taken(None, 0))
    return None if found is None else rows(read._trace(str(path), *found, []))


# --- one file, many ways --------------------------------------------------------------------------------------


@pytest.mark.parametrize("formatting", FORMATTINGS.values(), ids=FORMATTINGS)
@given(data=traces, seed=st.integers(0, 3))
def test_every_formatting_reads_as_the_reference(tmp_path_factory, formatting, data, seed) -> None:
    text = formatting(data, seed) if formatting.__name__ in ("reordered", "mixed") else formatting(data)
    path = written(tmp_path_factory.mktemp("any"), text)
    assert rows(open_trace(path)) == read_reference(path)


@pytest.mark.parametrize("formatting", FORMATTINGS)
def test_the_mark_before_utf_8_costs_nothing(tmp_path: Path, formatting: str) -> None:
    text = FORMATTINGS[formatting](sample())
    plain, marked = open_trace(written(tmp_path, text)), open_trace(written(tmp_path, "\ufeff" + text, "marked.json"))
    assert rows(marked) == rows(plain)
    assert (marked.rank, marked.sms, marked.warnings) == (3, {0: 132}, ())


@given(data=traces, stretch=st.integers(40, 3000), block=st.integers(7, 900))
def test_stretches_cut_anywhere_read_as_the_whole(tmp_path_factory, data, stretch, block) -> None:
    path = written(tmp_path_factory.mktemp("cut"), kineto(data))
    found = in_stretches(path, stretch, block)
    assert found is None or found == read_reference(path)


@pytest.mark.parametrize("stretch", [50, 300, 1000])
def test_a_trace_in_the_profilers_formatting_is_scanned_in_stretches(tmp_path: Path, stretch: int) -> None:
    path = written(tmp_path, kineto(sample(9)))
    assert in_stretches(path, stretch, 64) == read_reference(path)


@pytest.mark.parametrize("formatting", ["kineto", "compact", "indented"])
def test_a_trace_of_one_formatting_is_never_decoded_in_full(tmp_path: Path, monkeypatch, formatting: str) -> None:
    monkeypatch.setattr(ways, "_in_full", None)
    path = written(tmp_path, FORMATTINGS[formatting](sample()))
    assert len(open_trace(path).work) == 9


@pytest.mark.parametrize("formatting", ["reordered", "mixed"])
def test_other_formattings_are_decoded_in_full(tmp_path: Path, monkeypatch, formatting: str) -> None:
    path = written(tmp_path, FORMATTINGS[formatting](sample()))
    monkeypatch.setattr(ways, "_in_full", lambda source: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_trace(path)


@pytest.mark.parametrize("formatting", ["reordered", "mixed"])
def test_a_whole_file_is_decoded_at_once(tmp_path: Path, monkeypatch, formatting: str) -> None:
    monkeypatch.setattr(whole, "recovered", None)
    path = written(tmp_path, FORMATTINGS[formatting](sample()))
    assert rows(open_trace(path)) == read_reference(path)


@pytest.mark.parametrize("window", [1, 10, 300, 5000])
def test_event_by_event_reads_as_the_reference_through_windows_of_any_size(tmp_path: Path, monkeypatch, window) -> None:
    monkeypatch.setattr(whole, "_WINDOW", window)
    monkeypatch.setattr(whole, "_decoded", whole.recovered)
    path = written(tmp_path, mixed(sample(4)))
    assert rows(open_trace(path)) == read_reference(path)
    assert open_trace(path).warnings == ()


def test_an_event_inside_another_ones_arguments_is_none(tmp_path: Path) -> None:
    inner = kernel("inner", 7, 0, 1)
    outer = kernel("outer", 7, 0, 1) | {"cat": "cpu_op", "args": {"nested": [inner, inner]}}
    path = written(tmp_path, kineto(trace([kernel("before", 7, 0, 1), outer, kernel("after", 7, 2, 1)])))
    assert rows(open_trace(path)) == read_reference(path)


def test_large_plain_files_are_read_by_processes(tmp_path: Path, monkeypatch) -> None:
    path = written(tmp_path, kineto(sample(40)))
    monkeypatch.setattr(ways, "PARALLEL_FROM", 0)
    monkeypatch.setattr(ways, "STRETCH", 4000)
    monkeypatch.setattr(ways, "may_fork", lambda: True)
    monkeypatch.setattr(ways, "_by_blocks", None)
    told: list[tuple[int, int]] = []
    found = open_trace(path, progress=lambda done, total: told.append((done, total)))
    assert rows(found) == read_reference(path)
    assert told[-1] == (path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize("failure", [OSError("no more processes"), BrokenProcessPool("killed")])
def test_where_processes_fail_one_is_enough(tmp_path: Path, monkeypatch, failure: Exception) -> None:
    def pool(most: int) -> None:
        raise failure

    path = written(tmp_path, kineto(sample()))
    monkeypatch.setattr(ways, "PARALLEL_FROM", 0)
    monkeypatch.setattr(ways, "may_fork", lambda: True)
    monkeypatch.setattr(ways, "pool_of", pool)
    assert rows(open_trace(path)) == read_reference(path)


def test_processes_that_meet_another_formatting_leave_it_to_full_decoding(tmp_path: Path, monkeypatch) -> None:
    path = written(tmp_path, mixed(sample(40)))
    monkeypatch.setattr(ways, "PARALLEL_FROM", 0)
    monkeypatch.setattr(ways, "STRETCH", 2000)
    monkeypatch.setattr(ways, "may_fork", lambda: True)
    assert rows(open_trace(path)) == read_reference(path)


# --- packings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstd.compress, lambda b: gzip.compress(b[:99]) + gzip.compress(b[99:])]
)
def test_packed_files_read_as_plain_ones(tmp_path: Path, pack) -> None:
    plain = written(tmp_path, kineto(sample()))
    packed = tmp_path / "packed"  # the content decides, not the ending
    packed.write_bytes(pack(plain.read_bytes()))
    assert rows(open_trace(packed)) == rows(open_trace(plain))
    assert open_trace(packed).warnings == ()


# --- pipes ----------------------------------------------------------------------------------------------------


def piped(data: bytes) -> int:
    """A descriptor from which the data can be read once; it has to fit the pipe's buffer."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("formatting", ["kineto", "reordered"])
def test_a_pipe_reads_as_a_file(tmp_path: Path, formatting: str, pack) -> None:
    plain = written(tmp_path, FORMATTINGS[formatting](sample()))
    pipe = piped(pack(plain.read_bytes()))
    found = open_trace(f"/dev/fd/{pipe}")
    os.close(pipe)
    assert rows(found) == rows(open_trace(plain))
    assert (found.file, found.warnings) == (f"/dev/fd/{pipe}", ())


def test_standard_input_reads_as_a_file(tmp_path: Path, monkeypatch, out) -> None:
    plain = written(tmp_path, kineto(sample()))
    with plain.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert rows(open_trace("-")) == rows(open_trace(plain))
    with plain.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        [entry] = json.loads(out("trace", "overlap", "-", "--json"))["traces"]
        with pytest.raises(TraceError, match="-: nothing came through standard input, which can be read once;"):
            open_trace("-")
    assert (entry["file"], entry["rank"]) == ("-", 3)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(TraceError, match="-: there is no standard input; give a file"):
        open_trace("-")


def test_several_pipes_are_read_one_after_another(tmp_path: Path) -> None:
    pipes = [
        piped(gzip.compress(compact(trace(layer(0, 0), distributedInfo={"rank": rank})).encode())) for rank in "10"
    ]
    found = open_traces([f"/dev/fd/{pipe}" for pipe in pipes])
    for pipe in pipes:
        os.close(pipe)
    assert [len(one.work) for one in found] == [3, 3]


def test_a_pipe_that_cannot_be_copied_is_told_in_one_sentence(monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source.shutil, "copyfileobj", full)
    pipe = piped(b"{}")
    with pytest.raises(
        TraceError, match=r"cannot be copied to .* \(No space left on device\); write the trace to a file"
    ):
        open_trace(f"/dev/fd/{pipe}")
    os.close(pipe)


# --- dialects -------------------------------------------------------------------------------------------------


def test_the_dialect_of_2021(tmp_path: Path) -> None:
    old = {"kernel": "Kernel", "gpu_memset": "Memset", "cuda_runtime": "Runtime", "user_annotation": "Operator"}
    data = sample()
    for event in data["traceEvents"]:
        event["cat"] = old.get(event.get("cat"), event.get("cat"))
        if event["cat"] in ("Kernel", "Memset"):
            event["tid"] = f"stream {event['tid']}"
            event["args"].pop("stream", None)
    path = written(tmp_path, kineto(data))
    found = open_trace(path)
    assert found.work.stream.tolist() == [27, 7, 7] * 3
    assert rows(found) == read_reference(path)


def test_whole_microseconds_since_the_epoch_stay_exact(tmp_path: Path) -> None:
    path = written(tmp_path, kineto(trace([kernel("k", 7, 1_740_461_679_471_346, 52)])))
    assert open_trace(path).work.tuples()[0][:2] == (1_740_461_679_471_346_000, 1_740_461_679_471_398_000)


def test_fractions_since_the_epoch_stay_exact_although_no_double_holds_them(tmp_path: Path) -> None:
    path = written(tmp_path, kineto(trace([kernel("k", 7, Decimal("1699999999123456.789"), Decimal("0.001"))])))
    assert open_trace(path).work.tuples()[0][:2] == (1_699_999_999_123_456_789, 1_699_999_999_123_456_790)


def test_the_base_time_counts_wherever_it_stands(tmp_path: Path) -> None:
    for data in (sample() | {"baseTimeNanoseconds": 10**18}, {"baseTimeNanoseconds": 10**18} | sample()):
        assert open_trace(written(tmp_path, kineto(data))).work.start_ns[0] == 10**18 + 40_000


def test_a_bare_list_of_events_is_a_trace(tmp_path: Path) -> None:
    found = open_trace(written(tmp_path, json.dumps(sample()["traceEvents"])))
    assert (len(found.work), found.rank, found.warnings) == (9, None, ())


@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_our_own_timelines_are_traces(tmp_path: Path, name: str) -> None:
    timeline = simulate(generate(name, 2, 4), Costs())
    write_chrome(timeline, tmp_path / "own.json")
    found = exposures(open_trace(tmp_path / "own.json"))
    assert [gpu.device for gpu in found] == [0, 1]
    assert [round(gpu.compute_us * 1000) for gpu in found] == timeline.busy_ns().tolist()


# --- what it says beside --------------------------------------------------------------------------------------


def test_a_trace_tells_its_rank_and_the_size_of_its_gpus(tmp_path: Path) -> None:
    found = open_trace(written(tmp_path, kineto(sample())))
    assert (found.rank, found.sms) == (3, {0: 132})


def test_work_without_a_launch_is_counted_and_told(tmp_path: Path) -> None:
    found = open_trace(
        written(tmp_path, kineto(trace([launch(0, 1), kernel("a", 7, 1, 1, 1), kernel("b", 7, 2, 1, 2)])))
    )
    assert len(found.work) == 2
    assert found.warnings == ("1 piece of GPU work without a launch record: counted all the same",)


def test_work_before_its_launch_is_told(tmp_path: Path) -> None:
    found = open_trace(written(tmp_path, kineto(trace([launch(5, 1), kernel("a", 7, 1, 1, 1)]))))
    assert found.warnings == (
        "1 piece of GPU work before the call that launched it, by up to 4.000 µs: the clocks of CPU and GPU differ",
    )


def test_no_gpu_work_is_told(tmp_path: Path) -> None:
    found = open_trace(written(tmp_path, kineto(trace([launch(5, 1)]))))
    assert found.warnings == ("the trace holds no GPU work: profile with ProfilerActivity.CUDA",)


# --- many files -----------------------------------------------------------------------------------------------


def of_ranks(folder: Path, ranks: list[int]) -> list[Path]:
    return [
        written(folder, compact(trace(layer(0, 0), distributedInfo={"rank": rank})), f"{number}.json")
        for number, rank in enumerate(ranks)
    ]


def test_the_traces_of_a_folder_come_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    of_ranks(tmp_path, [2, 0, 1])
    (tmp_path / "notes.txt").write_text("no trace")
    assert [found.rank for found in open_traces(tmp_path)] == [0, 1, 2]


def test_any_executor_serves(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as executor:
        assert [found.rank for found in open_traces(of_ranks(tmp_path, [1, 0]), executor)] == [0, 1]


def test_a_bad_file_among_many_is_named(tmp_path: Path) -> None:
    of_ranks(tmp_path, [0, 1])
    bad = written(tmp_path, "", "bad.json")
    with pytest.raises(TraceError) as refused:
        open_traces(tmp_path)
    assert str(refused.value) == f"{bad}: the file is empty; give a trace as the PyTorch profiler writes it"


def test_an_empty_folder_and_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TraceError, match=r"the folder holds no \.json, \.json\.gz or \.json\.zst; give a folder of traces"
    ):
        open_traces(tmp_path)
    with pytest.raises(TraceError, match="there is no trace to read; give at least one file"):
        open_traces([])


# --- real traces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a100_nccl_8ranks", "b200_multimem", "deepseek_train", "kineto_2021_dialect", "mi300_qwen05"],
)
def test_real_traces_read_as_the_reference_by_the_scan(name: str, monkeypatch) -> None:
    monkeypatch.setattr(ways, "_in_full", None)
    path = real_trace(f"{name}.json.gz")
    assert rows(open_trace(path)) == read_reference(path)
    assert Opening.of(gzip.decompress(path.read_bytes())[: 1 << 20]) is not None
