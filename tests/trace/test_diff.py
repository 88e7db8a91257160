"""Two runs side by side: nothing changed against itself, signs turn with the order, and the sums are the totals."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import open_trace
from counterflow.cli import main
from counterflow.errors import TraceError
from counterflow.trace import Difference, Rules, Trace, difference, exposures
from counterflow.trace.diff import TOTALS, Pair
from traces import Data, annotation, compact, kernel, launch, sample, trace, traces

COLUMNS = ("phase", "kind", "kernel", "stream")
GEMM, NCCL = "void gemm<1>(float*)", "ncclDevKernel_AllReduce(int)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("diff")


def opened(folder: Path, data: Data, name: str = "trace.json") -> Trace:
    (folder / name).write_text(compact(data))
    return open_trace(folder / name)


def of(folder: Path, *events: Data) -> list[Trace]:
    return [opened(folder, trace(list(events)))]


def signs(found: Difference) -> dict[tuple[object, ...], tuple[float, float]]:
    return {
        tuple(getattr(change, name) for name in COLUMNS): (change.count.difference, change.total_us.difference)
        for change in found.changes
    }


with_work = traces.filter(lambda data: any(event.get("cat") == "kernel" for event in data["traceEvents"]))


@given(data=with_work)
def test_nothing_changes_against_itself(folder: Path, data: Data) -> None:
    one = opened(folder, data)
    found = difference([one], [one])
    assert all(pair.difference == 0 for pair in found.totals.values())
    assert all((change.count.difference, change.total_us.difference) == (0, 0) for change in found.changes)
    assert not any(change.only_in for change in found.changes)


@given(one=with_work, other=with_work)
def test_the_other_way_round_all_signs_turn(folder: Path, one: Data, other: Data) -> None:
    a, b = opened(folder, one), opened(folder, other)
    there, back = difference([a], [b]), difference([b], [a])
    assert {key: (-count, -us) for key, (count, us) in signs(there).items()} == signs(back)
    assert {name: Pair(*reversed(pair)) for name, pair in there.totals.items()} == back.totals


@given(data=with_work)
def test_the_sums_are_those_of_the_exposures(folder: Path, data: Data) -> None:
    one = opened(folder, data)
    [gpu] = exposures(one)
    found = difference([one], [one])
    assert {name: pair.a for name, pair in found.totals.items()} == {name: getattr(gpu, name) for name in TOTALS}
    for columns in (("kernel",), ("phase",), ("kind",), ("stream",), ("stream", "kind"), COLUMNS):
        rows = found.by(*columns)
        assert sum(row.count.a for row in rows) == sum(k.count for k in gpu.kernels)
        assert sum(row.total_us.a for row in rows) == pytest.approx(sum(k.total_us for k in gpu.kernels))
    for stream in gpu.streams:
        [row] = [row for row in found.by("stream") if row.stream == stream.stream]
        assert row.count.a == stream.count


@given(data=with_work, times=st.integers(1, 4))
def test_ranks_are_averaged(folder: Path, data: Data, times: int) -> None:
    one = opened(folder, data)
    found = difference([one], [one] * times)
    assert (found.a.gpus, found.b.gpus) == (1, times)
    assert all(pair.difference == pytest.approx(0) for pair in found.totals.values())
    assert all(change.total_us.difference == pytest.approx(0) for change in found.changes)


def steps(number: int, length: int = 10) -> list[Data]:
    events = []
    for step in range(number):
        at = 1000 * step
        events += [annotation(f"ProfilerStep#{step}", at, 900), kernel(GEMM, 7, at, length, step)]
    return events


def test_runs_of_different_numbers_of_steps_are_compared_by_the_step(folder: Path) -> None:
    found = difference(of(folder, *steps(2)), of(folder, *steps(5, length=12)))
    assert (found.a.steps, found.b.steps, found.per_step) == (2, 5, True)
    [gemm] = found.by("kernel")
    assert (gemm.count, gemm.total_us, gemm.mean_us) == ((1, 1), (10, 12), (10, 12))
    assert found.totals["compute_us"] == (10, 12)


def test_runs_of_as_many_steps_are_compared_as_they_are(folder: Path) -> None:
    found = difference(of(folder, *steps(2)), of(folder, *steps(2)))
    assert (found.a.steps, found.per_step, found.totals["compute_us"]) == (2, False, (20, 20))
    none_told = difference(of(folder, *steps(2)), of(folder, kernel(GEMM, 7, 0, 1)))
    assert (none_told.b.steps, none_told.per_step) == (None, False)


def test_a_step_in_which_nothing_was_launched_is_none(folder: Path) -> None:
    started = [launch(1000 * step + 1, step) for step in range(2)]
    ended = annotation("ProfilerStep#2", 2000, 5)
    found = difference(of(folder, *steps(2), *started, ended), of(folder, *steps(1)))
    assert (found.a.steps, found.b.steps, found.per_step) == (2, 1, True)
    assert found.totals["compute_us"] == (10, 10)


def test_what_changed_most_comes_first_and_kernels_of_one_run_are_told(folder: Path) -> None:
    a = of(folder, kernel(GEMM, 7, 0, 10), kernel("old(int)", 7, 10, 3), kernel(NCCL, 20, 0, 5))
    b = of(folder, kernel("gemm(int)", 8, 0, 6), kernel("gemm<2>(int)", 8, 6, 5), kernel(NCCL, 20, 0, 25))
    rows = difference(a, b).by("kernel", "kind")
    assert [(row.kernel, row.kind, row.total_us.difference, row.only_in) for row in rows] == [
        ("ncclDevKernel_AllReduce", "transfer", 20, ""),
        ("old", "compute", -3, "a"),
        ("gemm", "compute", 1, ""),
    ]
    assert (rows[2].count, rows[2].mean_us, rows[2].total_us.ratio) == ((1, 2), (10, 5.5), 1.1)
    assert rows[1].total_us.ratio == 0
    assert difference(b, a).by("kernel")[1].total_us.ratio is None


def test_phases_are_told_apart(folder: Path) -> None:
    events = [annotation("attn(F)", 0, 5), launch(1, 1), annotation("mlp(F)", 10, 5), launch(11, 2), launch(20, 3)]
    work = [kernel(GEMM, 7, 30 + 10 * number, number, number) for number in (1, 2, 3)]
    found = difference(of(folder, *events, *work), of(folder, *events, *work))
    assert {row.phase: row.total_us.a for row in found.by("phase")} == {"attn(F)": 1, "mlp(F)": 2, "": 3}


@given(data=with_work)
def test_a_users_rules_count(folder: Path, data: Data) -> None:
    rules = folder / "rules.txt"
    rules.write_text(json.dumps({"rules": [{"stream": 7, "class": "transfer"}, {"stream": 20, "class": "transfer"}]}))
    one = opened(folder, data)
    found = difference([one], [one], Rules.read(rules))
    assert [row.kind for row in found.by("kind")] == ["transfer"]
    assert found.totals["compute_us"] == (0, 0)


def test_a_run_without_gpu_work_is_refused(folder: Path) -> None:
    with pytest.raises(TraceError, match=r"trace.json: there is no GPU work to compare; give traces that have some"):
        difference(of(folder, kernel(GEMM, 7, 0, 1)), of(folder))


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a", tmp_path / "b"
    for path, ranks, layers in ((a, 2, 2), (b, 1, 3)):
        path.mkdir()
        for rank in range(ranks):
            opened(path, sample(layers) | {"distributedInfo": {"rank": rank}}, f"{rank}.json")
    return a, b


def test_the_tables_say_what_changed(runs: tuple[Path, Path], out) -> None:
    lines = {" ".join(line.split()) for line in out("trace", "diff", *runs).splitlines()}
    a, b = runs
    assert f"A: {a / '0.json'} and 1 more: 2 GPUs" in lines
    assert f"B: {b / '0.json'}: 1 GPU" in lines
    assert "µs are the mean of the GPUs" in lines
    assert "window 142 242 +100 1.704" in lines
    assert "exposed 10 15 +5 1.500" in lines
    assert "gemm compute 2 3 60 90 +30 1.500 30 30" in lines
    assert "mlp(B) 4 6 64 96 +32 1.500 16 16" in lines


def test_the_keys_are_stable(runs: tuple[Path, Path], out) -> None:
    data = json.loads(out("trace", "diff", *runs, "--json"))
    assert data.keys() == {"a", "b", "per_step", "totals", "kernels", "phases", "classes", "streams", "changes"}
    assert (data["a"]["gpus"], data["b"]["gpus"], data["a"]["steps"], data["per_step"]) == (2, 1, None, False)
    assert data["totals"]["window_us"] == {"a": 142, "b": 242, "difference": 100, "ratio": 242 / 142}
    assert data["kernels"][0] == {
        "kernel": "gemm",
        "kind": "compute",
        "a": {"count": 2, "total_us": 60, "mean_us": 30},
        "b": {"count": 3, "total_us": 90, "mean_us": 30},
        "difference_us": 30,
        "ratio": 1.5,
        "only_in": None,
    }
    assert {"phase", "kind", "kernel", "stream"} <= data["changes"][0].keys()


def test_steps_are_said(tmp_path: Path, out) -> None:
    for name, number in (("a", 1), ("b", 3)):
        opened(tmp_path, trace(steps(number)), f"{name}.json")
    said = out("trace", "diff", tmp_path / "a.json", tmp_path / "b.json")
    assert "b.json: 1 GPU, 3 steps\nµs are of one GPU, for each step\n" in said


def test_names_steer_no_terminal_and_warnings_are_told(tmp_path: Path, capsys) -> None:
    for name in "ab":
        events = [kernel("nccl\x1b[2J\n[red]evil", 20, 0, 5), kernel("late", 7, 1, "x")]
        (tmp_path / f"{name}.json").write_text(compact(trace(events)))
    assert main(["trace", "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert said.err.count("1 event without a usable time and duration left out") == 2


def test_what_is_no_trace_is_refused(runs: tuple[Path, Path], tmp_path: Path, refusal) -> None:
    assert "the file cannot be read" in refusal("trace", "diff", runs[0], tmp_path / "missing.json")
