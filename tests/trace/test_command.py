"""`counterflow trace overlap`: tables for people, stable keys for programs, and a gate."""

import json
from pathlib import Path

import pytest

from counterflow.cli import main
from traces import compact, kernel, kineto, sample, trace

KEYS = {
    *("file", "rank", "window_us", "compute_us", "communication_us", "overlapped_us", "exposed_communication_us"),
    *("other_us", "idle_us", "streams", "kernels", "phases", "warnings"),
    *("phase_source", "hiding", "flights", "flights_us", "hidden_flights_us", "exposed_flights_us"),
    *("blocking_us", "not_blocking_us"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(kineto(sample(2)))
    return path


def test_the_figures_stand_in_the_tables(file: Path, capsys) -> None:
    assert main(["trace", "overlap", str(file)]) == 0
    said = capsys.readouterr()
    lines = {" ".join(line.split()) for line in said.out.splitlines()}
    assert f"{file}: rank 3, GPU 0, 132 SMs" in lines
    assert "window 142 100.00%" in lines
    assert "exposed 10 7.04% 25.00%" in lines
    assert "deep_ep::internode::dispatch transfer 2 40 10 20 × 128" in lines
    assert "communication takes up to 20 of 132 SMs" in lines
    assert "mlp(B) 2 60 0 0 4" in lines
    assert "phase, by annotations ranges compute µs communication µs exposed µs other µs" in lines
    assert "communication exposed under mlp(B)" in lines
    assert "dispatch(F) 40 10 30" in lines
    assert said.err == ""


def test_the_keys_are_stable_and_the_numbers_plain(file: Path, capsys) -> None:
    assert main(["trace", "overlap", str(file), str(file), "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)["traces"]
    assert one == two
    assert one.keys() >= KEYS
    assert (one["file"], one["rank"], one["window_us"], one["exposed_communication_us"]) == (str(file), 3, 142, 10)
    assert one["phases"][0] == {
        "name": "dispatch(F)",
        "count": 2,
        "compute_us": 0,
        "communication_us": 40,
        "exposed_us": 10,
        "other_us": 0,
        "part": "dispatch",
        "direction": "F",
    }
    assert one["phase_source"] == "annotations"
    assert one["hiding"] == [
        {
            "name": "dispatch(F)",
            "communication_us": 40,
            "exposed_us": 10,
            "under": [{"phase": "mlp(B)", "us": 30}],
        }
    ]
    assert one["flights"] == []
    assert one["exposed_pieces"][0]["waited"] == "compute resumed first"
    assert one["blocking_us"] + one["not_blocking_us"] == 10


def test_a_folder_is_all_its_traces(file: Path, capsys) -> None:
    (file.parent / "second.json").write_text(kineto(sample(1)))
    assert main(["trace", "overlap", str(file.parent), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["traces"]) == 2


def test_no_gpu_work_is_said_and_keeps_the_keys(tmp_path: Path, capsys) -> None:
    path = tmp_path / "empty.json"
    path.write_text(compact(trace([])))
    assert main(["trace", "overlap", str(path), "--json"]) == 0
    said = capsys.readouterr()
    [entry] = json.loads(said.out)["traces"]
    assert entry.keys() >= KEYS
    assert entry["warnings"] == ["the trace holds no GPU work: profile with ProfilerActivity.CUDA"]
    assert said.err.startswith(f"counterflow: warning: {path}: the trace holds no GPU work")
    assert main(["trace", "overlap", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no GPU work\n"


@pytest.mark.parametrize(("limit", "code"), [("7.1%", 0), ("7%", 1), ("100%", 0), ("0%", 1)])
def test_the_gate_holds_the_exposed_part_of_the_window(file: Path, capsys, limit: str, code: int) -> None:
    assert main(["trace", "overlap", str(file), "--max-exposed", limit]) == code
    said = capsys.readouterr().err
    assert ("7.04% of GPU 0's window is exposed communication; at most" in said) is (code == 1)


def test_the_gate_lets_nothing_through_that_shows_nothing(tmp_path: Path, capsys) -> None:
    path = tmp_path / "empty.json"
    path.write_text(compact(trace([])))
    assert main(["trace", "overlap", str(path), "--max-exposed", "50%"]) == 2
    assert "there is no GPU work to hold to 50%" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["4", "-1%", "101%", "nan%", "%", "a lot"])
def test_a_limit_that_is_no_percentage_is_refused(file: Path, capsys, limit: str) -> None:
    assert main(["trace", "overlap", str(file), f"--max-exposed={limit}"]) == 2
    said = capsys.readouterr().err
    assert said == f"counterflow: --max-exposed got {limit!r}; it needs a part of the window, such as 4%\n"


def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.json"
    path.write_text("hello")
    assert main(["trace", "overlap", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"counterflow: {path}: the file is not JSON with")
    assert said.count("\n") == 1


def test_names_in_a_trace_steer_no_terminal(tmp_path: Path, capsys) -> None:
    path = tmp_path / "evil.json"
    path.write_text(compact(trace([kernel("nccl\x1b[2JKernel\n[red]evil(int)", 20, 0, 5), kernel("gemm", 7, 1, 1)])))
    assert main(["trace", "overlap", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_rules_and_annotations_are_taken(file: Path, tmp_path: Path, capsys) -> None:
    rules = tmp_path / "rules.txt"
    rules.write_text(json.dumps({"rules": [{"pattern": "gemm", "class": "transfer"}]}))
    assert main(["trace", "overlap", str(file), "--rules", str(rules), "--within", "mlp(B)", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["traces"]
    assert entry["compute_us"] == 0
    assert entry["window_us"] == 137


def test_flights_are_shown_where_there_are_any(tmp_path: Path, capsys) -> None:
    name = "void deep_ep::internode_ll::dispatch<true, 3, 10, 7168>(void*)"
    path = tmp_path / "decode.json"
    path.write_text(compact(trace([kernel(name, 7, 0, 10), kernel("gemm", 7, 12, 90), kernel(name, 7, 110, 10)])))
    assert main(["trace", "overlap", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == "dispatch 1 100 90 10"


def test_a_damaged_trace_passes_no_gate(tmp_path: Path, capsys) -> None:
    whole = tmp_path / "whole.json"
    slices = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 10 * n, "dur": 5} for n in range(20)
    ]
    whole.write_text(json.dumps({"traceEvents": slices}), encoding="utf-8")
    cut = tmp_path / "cut.json"
    cut.write_bytes(whole.read_bytes()[:-300])
    assert main(["trace", "overlap", str(cut), "--max-exposed", "4%"]) == 2
    said = capsys.readouterr().err
    assert "a part of the file is missing, so it cannot be held to 4%; give a whole one" in said


def test_copies_where_rows_should_travel_are_warned_of(tmp_path: Path, capsys) -> None:
    path = tmp_path / "copies.json"
    calls = [
        {"ph": "X", "cat": "user_annotation", "name": "dispatch(F)", "pid": 1, "tid": 1, "ts": 0, "dur": 10},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemcpyAsync", "pid": 1, "tid": 1, "ts": 1, "dur": 1}
        | {"args": {"correlation": 5}},
        {
            "ph": "X",
            "cat": "gpu_memcpy",
            "name": "Memcpy DtoH (Device -> Pinned)",
            "pid": 0,
            "tid": 9,
            "ts": 5,
            "dur": 30,
        }
        | {"args": {"correlation": 5, "device": 0, "stream": 9}},
    ]
    path.write_text(json.dumps({"traceEvents": calls}), encoding="utf-8")
    assert main(["trace", "overlap", str(path)]) == 0
    assert "30.000 µs of copies in the phases of dispatch and combine are counted as other" in capsys.readouterr().err
