"""The scripts under profiles/ run anywhere with a tiny model, and tell the phases inside a CUDA graph."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from counterflow.trace import open_traces

PROFILES = Path(__file__).parent.parent / "profiles"
sys.path.insert(0, str(PROFILES))

from graph_phases import mark_phases  # noqa: E402


def ran(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_everything_is_measured_profiled_and_shown_in_a_tiny_model(tmp_path: Path) -> None:
    out = ran(PROFILES / "make.py", "--tiny", "--rounds", 1, "--ctas", 0, 20, "--out", tmp_path)
    assert [line.split()[0] for line in out.splitlines() if "overlapped_ms" in line] == [
        *("training", "training", "prefill", "prefill", "decode", "decode")
    ]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["modes"]) == ["training", "prefill", "decode"]
    assert all(list(mode["transports"]) == ["copy engines", "20 CTAs"] for mode in results["modes"].values())
    costs = tmp_path / "costs.json"
    verb = "import sys; from counterflow.cli import main; sys.exit(main())"
    compared = ran("-c", verb, "compare", "--ranks", 4, "--microbatches", 8, "--costs", costs, "--json")
    assert "dualpipe" in {row["name"] for row in json.loads(compared)["schedules"]}

    (tmp_path / "README.md").write_text((PROFILES / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    ran(PROFILES / "show.py", tmp_path)
    shown = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert shown.count("| copy engines |") == 3
    assert shown.count("| 20 CTAs |") == 3


def test_two_ranks_are_measured_and_profiled_in_a_tiny_model(tmp_path: Path) -> None:
    ran(PROFILES / "two_gpus.py", "--tiny", "--rounds", 1, "--channels", 8, "--out", tmp_path)
    found = json.loads((tmp_path / "two-gpus.json").read_text(encoding="utf-8"))
    assert found["library"] == "gloo"
    assert found["8"]["overlapped_ms"] > 0
    traces = open_traces(sorted(tmp_path.glob("*.json.gz")))
    assert [trace.rank for trace in traces] == [0, 1]


def test_the_published_figures_are_those_of_the_last_measurement(tmp_path: Path) -> None:
    for name in ("README.md", "results.json", "two-gpus.json"):
        (tmp_path / name).write_bytes((PROFILES / name).read_bytes())
    ran(PROFILES / "show.py", tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (PROFILES / "README.md").read_bytes()


# --- phases inside a graph -----------------------------------------------------------------------------------


def slice_of(category: str, name: str, ts: float, dur: float, correlation: int, tid: int = 7) -> dict[str, Any]:
    args = {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur, "args": args}


def plain_run() -> dict[str, Any]:
    steps = [("attn-a0", ["norm", "gemm"]), ("dispatch0", ["Memcpy DtoH (x)"]), ("mlp1", ["gemm"])]
    events, ts = [], 0.0
    for number, (step, work) in enumerate(steps):
        events.append(slice_of("user_annotation", step, ts, 10, 0, tid=1))
        for place, name in enumerate(work):
            correlation = 10 * number + place + 1
            events.append(slice_of("cuda_runtime", "cudaLaunchKernel", ts + 1 + place, 0.5, correlation, tid=1))
            lane = 20 if name.startswith("Memcpy") else 7
            events.append(slice_of("kernel", name, 100 + ts + 5 * place, 5, correlation, tid=lane))
        ts += 10
    return {"traceEvents": events}


def replayed(plain: dict[str, Any]) -> dict[str, Any]:
    work = [copy.deepcopy(e) for e in plain["traceEvents"] if e["cat"] == "kernel"]
    return {"traceEvents": [event | {"args": {"correlation": 99}} for event in work]}


def test_a_graphs_kernels_get_the_phases_of_the_plain_run() -> None:
    plain = plain_run()
    graph = replayed(plain)
    mark_phases(graph, plain)
    told = {e["name"]: (e["ts"], e["dur"], e["tid"]) for e in graph["traceEvents"] if e["cat"] == "gpu_user_annotation"}
    assert told == {"attn-a0": (100, 10, 7), "dispatch0": (110, 5, 20), "mlp1": (120, 5, 7)}


def test_a_step_on_several_streams_has_a_slice_on_each_that_holds_nothing_else() -> None:
    events, replay = [], []
    # The copies out of one step lie on two streams; on the second one compute of another step comes in between.
    steps = [("attn-a0", "norm", 7), ("dispatch0", "Memcpy DtoH (x)", 20), ("mlp1", "gemm", 21)]
    for number, (step, name, stream) in enumerate(steps):
        events.append(slice_of("user_annotation", step, 10 * number, 10, 0, tid=1))
        for place in range(3):
            correlation = 10 * number + place + 1
            events.append(slice_of("cuda_runtime", "launch", 10 * number + place, 0.5, correlation, tid=1))
            events.append(slice_of("kernel", name, 100 + 10 * number + place, 1, correlation, tid=stream))
    at = {"norm": [(7, 100), (7, 110), (21, 120)], "Memcpy DtoH (x)": [(20, 130), (21, 140), (21, 160)]}
    at["gemm"] = [(21, 150), (21, 170), (7, 180)]
    for name, places in at.items():
        replay += [slice_of("kernel", name, ts, 5, 99, tid=stream) for stream, ts in places]
    graph = {"traceEvents": replay}
    mark_phases(graph, {"traceEvents": events})
    told = {(e["tid"], e["ts"], e["dur"], e["name"]) for e in graph["traceEvents"] if "annotation" in e["cat"]}
    assert told == {
        *((7, 100, 15, "attn-a0"), (7, 180, 5, "mlp1"), (20, 130, 5, "dispatch0"), (21, 120, 5, "attn-a0")),
        *((21, 140, 5, "dispatch0"), (21, 150, 5, "mlp1"), (21, 160, 5, "dispatch0"), (21, 170, 5, "mlp1")),
    }


def test_other_work_than_in_the_plain_run_is_refused() -> None:
    plain = plain_run()
    graph = replayed(plain)
    graph["traceEvents"].pop()
    with pytest.raises(ValueError, match="the graph has 2 pieces of work on the lane compute and the plain run 3"):
        mark_phases(graph, plain)
