"""Broken files: figures of what is whole and warnings, or one sentence; no other exception, no silent zero."""

import gzip
import random
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from counterflow import open_trace
from counterflow.errors import TraceError
from counterflow.trace import Trace, exposures
from traces import FORMATTINGS, annotation, compact, kernel, kineto, launch, real_trace, sample, trace

LAYERS = 4
WHOLE = kineto(sample(LAYERS)).encode()


def outcome(path: Path, data: bytes) -> Trace | str:
    """What reading and measuring gives: a trace, or the one sentence."""
    path.write_bytes(data)
    try:
        found = open_trace(path)
        for gpu in exposures(found):
            assert abs(gpu.window_us - gpu.compute_us - gpu.exposed_us - gpu.other_us - gpu.idle_us) < 1e-3
    except TraceError as error:
        sentence = str(error)
        assert sentence.startswith(f"{path}: ")
        assert "\n" not in sentence
        return sentence
    assert len(found.work) or "the trace holds no GPU work" in found.warnings[-1]
    return found


def spelt(found: Trace) -> list[tuple[int | str, ...]]:
    """The work with its names: which ids they have depends on the way of reading."""
    return [(start, end, found.names[name], *rest) for start, end, name, *rest in found.work.tuples()]


def mutated(data: bytes, seed: int) -> bytes:
    """A few bytes changed, removed, doubled or moved, the way disks, editors and people do it."""
    rng = random.Random(seed)
    text = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(text))
        until = min(len(text), at + rng.choice([1, 1, 5, 200]))
        match rng.randrange(6):
            case 0:
                text[at] = rng.randrange(256)
            case 1:
                del text[at:until]
            case 2:
                text[at:at] = text[at:until]
            case 3:
                text[at:at] = rng.choice([b"{", b"}", b"[", b"]", b'"', b"\\", b",", b"\x00", b"\xff", b"[" * 3000])
            case 4:
                numbers = [
                    b"NaN",
                    b"-1",
                    b"1e999",
                    b"1" * 5000,
                    b"null",
                    b"true",
                    b"9223372036854775808",
                    b'"7"',
                    b"[1]",
                ]
                place = text.find(b": ", at)
                text[place : place + 2] = b": " + rng.choice(numbers) + b', "was": '
            case 5:
                place = rng.randrange(len(text))
                text[at:at] = text[place : place + 300]
    return bytes(text)


# --- cut off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formatting", ["kineto", "compact", "reordered"])
def test_every_whole_event_before_a_cut_is_read(tmp_path: Path, formatting: str) -> None:
    text = FORMATTINGS[formatting](sample(2)).encode()
    whole = open_trace_of(tmp_path, text)
    ends = [position for position in range(1, len(text)) if text[:position].endswith(b"}")]
    most = 0
    for cut in [*range(1, len(text) - 1, len(text) // 67), len(text) - 2]:
        found = outcome(tmp_path / "cut.json", text[:cut])
        if isinstance(found, str):
            assert cut < ends[2]
            continue
        size = len(found.work)
        assert size >= most
        most = size
        assert spelt(found) == spelt(whole)[:size]
        assert size == len(whole.work) or any("the file ends before its events do" in w for w in found.warnings)
    assert most == len(whole.work)


def open_trace_of(folder: Path, data: bytes) -> Trace:
    (folder / "whole.json").write_bytes(data)
    return open_trace(folder / "whole.json")


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress], ids=["gzip", "zstd"])
def test_a_packed_file_may_be_cut_anywhere(tmp_path: Path, pack) -> None:
    packed = pack(WHOLE)
    for cut in range(1, len(packed) - 1, max(1, len(packed) // 60)):
        outcome(tmp_path / "cut", packed[:cut])


def test_what_a_cut_gzip_still_holds_is_read(tmp_path: Path) -> None:
    packed = gzip.compress(WHOLE)
    found = outcome(tmp_path / "cut", packed[:-12])
    assert isinstance(found, Trace)
    assert "the gzip file ends too early: what stands before its end was read" in found.warnings
    assert len(found.work) > 0


@given(st.integers(1, len(WHOLE) - 2))
def test_a_trace_may_be_cut_anywhere(tmp_path_factory, cut: int) -> None:
    outcome(tmp_path_factory.mktemp("cut") / "cut.json", WHOLE[:cut])


# --- changed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_changed_files_give_figures_or_a_sentence(tmp_path: Path, seed: int) -> None:
    for number in range(100):
        outcome(tmp_path / "changed.json", mutated(WHOLE, 100 * seed + number))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_changed_files_give_figures_or_a_sentence(tmp_path: Path, seed: int) -> None:
    texts = [formatting(sample(LAYERS)).encode() for formatting in FORMATTINGS.values()]
    for number in range(1000):
        outcome(tmp_path / "changed.json", mutated(texts[number % len(texts)], 10_000 + 1000 * seed + number))


@pytest.mark.slow
def test_a_real_trace_may_be_changed_and_cut(tmp_path: Path) -> None:
    text = gzip.decompress(real_trace("deepseek_train.json.gz").read_bytes())
    rng = random.Random(0)
    for seed in range(30):
        outcome(tmp_path / "changed.json", mutated(text, seed))
        outcome(tmp_path / "cut.json", text[: rng.randrange(len(text))])


def test_changed_packed_files_give_figures_or_a_sentence(tmp_path: Path) -> None:
    for number in range(60):
        for pack in (gzip.compress, zstd.compress):
            outcome(tmp_path / "changed", mutated(pack(WHOLE), number))


def test_one_broken_event_costs_no_other(tmp_path: Path) -> None:
    text = kineto(sample()).replace('"name": "Memset (Device)"', '"name" "Memset (Device)"', 1)
    found = outcome(tmp_path / "broken.json", text.encode())
    assert isinstance(found, Trace)
    assert len(found.work) == 8
    assert "the file is broken in 1 place: the events there are missing" in found.warnings


@pytest.mark.parametrize("formatting", ["kineto", "reordered"])
def test_a_fault_before_the_events_is_told(tmp_path: Path, formatting: str) -> None:
    text = FORMATTINGS[formatting](sample()).replace('"deviceProperties"', '"deviceProperties', 1)
    found = outcome(tmp_path / "broken.json", text.encode())
    assert isinstance(found, Trace)
    assert (len(found.work), found.rank, found.sms) == (9, None, {})
    assert found.damaged
    assert found.warnings[0] == (
        "the file is broken before its events: what stands there, mostly its rank and GPUs, was not read"
    )


def test_where_it_gives_up_is_told(tmp_path: Path) -> None:
    text = compact(sample()).replace('"traceEvents":[', '"traceEvents":[' + '{"ph":,"X"},' * 1_000)
    found = outcome(tmp_path / "broken.json", text.encode())
    assert isinstance(found, Trace)
    assert "the file is broken in 1000 places: what follows the last of them was not read" in found.warnings


def test_an_early_bracket_costs_no_event(tmp_path: Path) -> None:
    text = kineto(sample()).replace("},\n", "}],\n", 1)
    found = outcome(tmp_path / "broken.json", text.encode())
    assert isinstance(found, Trace)
    assert len(found.work) == 9


@pytest.mark.parametrize(
    "repeated", [b"]", b'],"a":1', b'{"ph":[', b'{"ph": "X", "cat": "', b'{"name":"', b"[{", b"{ "]
)
def test_a_hostile_file_does_not_take_forever(tmp_path: Path, repeated: bytes) -> None:
    outcome(tmp_path / "hostile.json", b'{"traceEvents": [' + repeated * 20_000)


# --- strange events -------------------------------------------------------------------------------------------


def test_control_characters_and_broken_text_in_names_are_read(tmp_path: Path) -> None:
    text = kineto(trace([kernel("a@b", 7, 0, 1), kernel("plain", 7, 1, 1)])).encode()
    for strange in (b"\x01", b"\n", b"\xff", b"\\ud800", b"\xed\xa0\x80"):
        found = outcome(tmp_path / "strange.json", text.replace(b"@", strange))
        assert isinstance(found, Trace)
        assert len(found.work) == 2


@pytest.mark.parametrize("value", ["null", '"5"', "-3", "1e300", "true", "[]", "99999999999999999999", "1e999", "NaN"])
def test_events_without_a_usable_duration_are_left_out_and_counted(tmp_path: Path, value: str) -> None:
    text = compact(trace([kernel("a", 7, 0, 1), kernel("b", 7, 1, 77)])).replace('"dur":77', f'"dur":{value}')
    found = outcome(tmp_path / "strange.json", text.encode())
    assert isinstance(found, Trace)
    assert len(found.work) == 1
    assert "1 event without a usable time and duration left out" in found.warnings


@pytest.mark.parametrize("formatting", ["kineto", "compact", "reordered"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-nan", "NaN", "Infinity"])
def test_a_bandwidth_that_is_no_number_costs_no_event(tmp_path: Path, formatting: str, value: str) -> None:
    copy = kernel('Memcpy "HtoD": inf, (Pageable -> Device)', 7, 5, 0) | {"cat": "gpu_memcpy"}
    copy["args"]["memory bandwidth (GB/s)"] = "@"
    text = FORMATTINGS[formatting](trace([copy, kernel("b", 7, 6, 1)])).replace('"@"', value)
    found = outcome(tmp_path / "zero.json", text.encode())
    assert isinstance(found, Trace)
    assert (len(found.work), found.warnings) == (2, ())
    assert found.names[found.work.name[0]] == 'Memcpy "HtoD": inf, (Pageable -> Device)'


@pytest.mark.parametrize("key", ["stream", "device", "correlation", "grid", "counterflow_lane", "args"])
@pytest.mark.parametrize("value", ["null", '"x"', "[[1]]", "{}", "99999999999999999999", "1.5"])
def test_strange_arguments_cost_no_event(tmp_path: Path, key: str, value: str) -> None:
    data = kernel("a", 7, 0, 1)
    if key == "args":
        data["args"] = "@"
    else:
        data["args"][key] = "@"
    text = kineto(trace([data, kernel("b", 7, 1, 1)])).replace('"@"', value)
    found = outcome(tmp_path / "strange.json", text.encode())
    assert isinstance(found, Trace)
    assert len(found.work) == 2


def test_twice_the_same_event_counts_once_in_every_union(tmp_path: Path) -> None:
    one = kernel("gemm", 7, 0, 10)
    found = outcome(tmp_path / "twice.json", compact(trace([one, one])).encode())
    assert isinstance(found, Trace)
    [gpu] = exposures(found)
    assert (gpu.window_us, gpu.compute_us) == (10, 10)


def test_slices_that_overlap_on_one_stream_count_once(tmp_path: Path) -> None:
    data = trace([kernel("a", 7, 0, 10), kernel("b", 7, 5, 10), kernel("nccl_Kernel", 7, 8, 12)])
    found = outcome(tmp_path / "overlapping.json", compact(data).encode())
    assert isinstance(found, Trace)
    [gpu] = exposures(found)
    assert (gpu.window_us, gpu.compute_us, gpu.communication_us, gpu.exposed_us) == (20, 15, 12, 5)
    assert [(stream.count, stream.busy_us) for stream in gpu.streams] == [(3, 20)]


def test_an_id_given_twice_costs_no_event_and_the_first_launch_counts(tmp_path: Path) -> None:
    ranges = [annotation("first", 0, 2), annotation("second", 10, 2)]
    launches = [launch(1, 5), launch(11, 5)]
    data = trace([*ranges, *launches, kernel("a", 7, 20, 1, 5), kernel("b", 7, 30, 3, 5)])
    found = outcome(tmp_path / "twice.json", compact(data).encode())
    assert isinstance(found, Trace)
    assert (len(found.work), len(found.launches), found.warnings) == (2, 2, ())
    [gpu] = exposures(found)
    assert [(phase.name, phase.compute_us) for phase in gpu.phases] == [("first", 4)]


def test_a_launch_without_an_id_launches_none_of_the_work_without_one(tmp_path: Path) -> None:
    without = [launch(1, 0), launch(3, 5), kernel("a", 7, 20, 5), kernel("b", 7, 30, 5), kernel("c", 7, 40, 5, 5)]
    for event in without[0], without[2], without[3]:
        del event["args"]["correlation"]
    data = trace([annotation("attn(F)", 0, 2), annotation("mlp(F)", 2, 4), *without])
    found = outcome(tmp_path / "idless.json", compact(data).encode())
    assert isinstance(found, Trace)
    assert found.warnings == ("2 pieces of GPU work without a launch record: counted all the same",)
    [gpu] = exposures(found)
    assert [(phase.name, phase.compute_us) for phase in gpu.phases] == [("mlp(F)", 5)]


def test_ranks_joined_into_one_file_are_told_of(tmp_path: Path) -> None:
    ranks = [
        event | {"pid": f"[TP{rank}] {event['pid']}"}
        for rank in (0, 1)
        for event in (launch(0, 5), launch(3, 6), kernel("a", 7, 20, 1, 5, device=rank), kernel("b", 7, 30, 1, 6))
    ]
    found = outcome(tmp_path / "merged.json", compact(trace(ranks)).encode())
    assert isinstance(found, Trace)
    assert found.warnings == (
        "several processes launched work under the same ids, as in a file of several ranks: its phases may be wrong, "
        "and so are figures of GPUs with the same number; give the file of each rank",
    )


def test_work_without_a_launch_before_its_launch_and_on_several_gpus_is_measured_and_told(tmp_path: Path) -> None:
    work = [kernel("a", 7, 2, 4, 1), kernel("b", 7, 10, 4, 2), kernel("c", 7, 30, 5, 3, device=1)]
    found = outcome(tmp_path / "odd.json", compact(trace([launch(5, 1), launch(8, 2), *work])).encode())
    assert isinstance(found, Trace)
    assert found.warnings == (
        "1 piece of GPU work without a launch record: counted all the same",
        "1 piece of GPU work before the call that launched it, by up to 3.000 µs: the clocks of CPU and GPU differ",
    )
    assert [(gpu.device, gpu.window_us, gpu.compute_us) for gpu in exposures(found)] == [(0, 12, 8), (1, 5, 5)]


# --- no trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "the file is empty; give a trace as the PyTorch profiler writes it"),
        (b" \n", "the file is empty; give a trace as the PyTorch profiler writes it"),
        (b"{}", 'the file is JSON without "traceEvents"; give a trace as the PyTorch profiler writes it'),
        (b'{"traceEvents": 5}', "the file is not JSON with"),
        (b"5", "the file is not JSON with"),
        (b"hello", "the file is not JSON with"),
        (b"\x00" * 100, "the file is not JSON with"),
        (b"[" * 10_000, "the file holds no event"),
        (b"\x1f\x8bhello", "the gzip file is broken ("),
        (b"\x28\xb5\x2f\xfdhello", "the zstd file is broken ("),
    ],
)
def test_what_is_no_trace_is_refused_in_one_sentence(tmp_path: Path, data: bytes, sentence: str) -> None:
    found = outcome(tmp_path / "none", data)
    assert isinstance(found, str)
    assert sentence in found


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json", "nul\0l"):
        with pytest.raises(TraceError, match="the file cannot be read"):
            open_trace(path)
