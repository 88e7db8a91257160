"""The verb replay: policies side by side, how many redundant experts pay, pictures, and one sentence for bad input."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from counterflow.cli import main
from counterflow.cli.replay import Policy
from counterflow.experts import (
    POLICIES,
    STALL_ASSUMES,
    ReplaySettings,
    alternatives,
    copies_per_token,
    replay,
    sweep_replicas,
    worthwhile,
)
from counterflow.report.png import has_font

Run = Callable[..., str]
RECORDED = Path(__file__).parents[3] / "shared" / "data" / "expert-loads"
WINDOWS = np.random.default_rng(2).zipf(1.7, (16, 3, 8)).clip(max=300)
SIZES = ["--replicas", "12", "--gpus", "4"]
SETTINGS = ReplaySettings(window_size=2, step_interval=2)


@pytest.fixture
def out(out: Run) -> Run:
    return partial(out, "replay")


@pytest.fixture
def refusal(refusal: Run) -> Run:
    return partial(refusal, "replay")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "loads.npy"
    np.save(path, WINDOWS)
    return path


def table(text: str) -> dict[str, list[str]]:
    """The cells of each line that begins with a policy or a number."""
    lines = (re.split(r" {2,}", line.strip()) for line in text.splitlines())
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 3 and cells[0] not in ("policy", "replicas")}


# --- plain data ---------------------------------------------------------------------------------------------


def test_as_json_it_has_the_keys_that_others_rely_on(out: Run, file: Path) -> None:
    data = json.loads(out(file, *SIZES, "--json"))
    assert {key: data[key] for key in ("num_steps", "num_layers", "num_experts", "num_gpus", "num_replicas")} == {
        "num_steps": 16,
        "num_layers": 3,
        "num_experts": 8,
        "num_gpus": 4,
        "num_replicas": 12,
    }
    assert (data["num_redundant_experts"], data["window_size"], data["step_interval"]) == (4, 2, 2)
    assert [each["policy"] for each in data["policies"]] == list(POLICIES)
    for each in data["policies"]:
        served = replay(WINDOWS, each["policy"], 12, 4, settings=SETTINGS)
        assert each["balancedness"] == served.balancedness.mean(axis=1).tolist()
        assert each["balancedness_of_layers"] == served.balancedness.mean(axis=0).tolist()
        assert each["balancedness_mean"] == pytest.approx(served.balancedness.mean())
        assert each["balancedness_worst_step"] == min(each["balancedness"]) == each["balancedness"][each["worst_step"]]
        assert each["balancedness_worst_layer"] == each["balancedness_of_layers"][each["worst_layer"]]
        assert (each["slowdown"], each["moves"], each["share_moved"]) == (served.slowdown, served.moves, served.share)
        assert [(one["step"], one["moves"]) for one in each["rebalances"]] == [
            (one.step, one.moves) for one in served.due
        ]
        assert (each["bytes_moved"], each["stall_s"]) == (None, None)


def test_bytes_and_stalls_are_told_to_those_who_know_their_hardware(out: Run, file: Path) -> None:
    data = json.loads(out(file, *SIZES, "--expert-bytes", "17e6", "--gb-per-s", "50", "--json"))
    assert data["stall_assumes"] == STALL_ASSUMES
    for each in data["policies"]:
        served = replay(WINDOWS, each["policy"], 12, 4, settings=SETTINGS)
        assert each["bytes_moved"] == served.moves * 17e6
        assert each["stall_s"] == served.stall_s(17e6, 50e9)
    alone = json.loads(out(file, *SIZES, "--expert-bytes", "17e6", "--json"))
    assert (alone["policies"][1]["stall_s"], alone["stall_assumes"]) == (None, None)


def test_what_is_asked_for_reaches_the_policies(out: Run, file: Path) -> None:
    limits = ["--max-moves", "1", "--skip-above", "0.9", "--nodes", "2", "--groups", "4"]
    options = ["--step-interval", "3", "--decay", "0.5", *limits]
    data = json.loads(out(file, *SIZES, *options, "--policy", "current", "--json"))
    assert [each["policy"] for each in data["policies"]] == ["none", "current"]
    chosen = ReplaySettings(step_interval=3, decay=0.5, max_moves=1, skip_above=0.9)
    served = replay(WINDOWS, "current", 12, 4, 2, 4, settings=chosen)
    assert data["policies"][1]["balancedness"] == served.balancedness.mean(axis=1).tolist()
    assert (data["window_size"], data["decay"]) == (None, 0.5)


def test_long_recordings_are_rebalanced_as_vllm_does(out: Run, tmp_path: Path) -> None:
    path = tmp_path / "long.npy"
    np.save(path, np.ones((24_000, 1, 2), dtype=np.uint8))
    data = json.loads(out(path, "--replicas", "2", "--gpus", "2", "--policy", "none", "--json"))
    assert (data["window_size"], data["step_interval"]) == (1000, 3000)


def test_the_command_line_knows_the_policies_that_there_are() -> None:
    assert [policy.value for policy in Policy] == list(POLICIES)


# --- the table ----------------------------------------------------------------------------------------------


def test_every_policy_has_a_line(out: Run, file: Path) -> None:
    text = out(file, *SIZES, "--expert-bytes", "17e6", "--gb-per-s", "50")
    rows = table(text)
    assert list(rows) == list(POLICIES)
    served = replay(WINDOWS, "balance", 12, 4, settings=SETTINGS)
    start = replay(WINDOWS, "none", 12, 4)
    assert rows["balance"][0] == f"{served.balancedness.mean():.4f}"
    assert rows["balance"][4] == f"{start.slowdown / served.slowdown - 1:.1%}"
    assert rows["balance"][6:8] == [str(served.moves), f"{served.share:.1%}"]
    assert rows["balance"][9] == f"{served.stall_s(17e6, 50e9) * 1e3:.4g}"
    assert rows["none"][4:] == ["-"] * 7
    assert " ".join(STALL_ASSUMES.split()) in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 130


def test_what_nobody_asked_for_is_no_column(out: Run, file: Path) -> None:
    text = out(file, *SIZES)
    assert not re.search("GB|stall|Stall|skipped", text)
    assert "skipped" in out(file, *SIZES, "--skip-above", "0.5")


# --- how many redundant experts -----------------------------------------------------------------------------


def test_a_sweep_says_how_many_redundant_experts_pay(out: Run, file: Path) -> None:
    rows = sweep_replicas(WINDOWS, "balance", 20, 4, settings=SETTINGS)
    data = json.loads(out(file, "--gpus", "4", "--sweep-replicas", "20", "--expert-bytes", "1e6", "--json"))
    assert [each["num_replicas"] for each in data["sweep"]] == [8, 12, 16, 20]
    assert [each["slowdown"] for each in data["sweep"]] == [row.slowdown for row in rows]
    assert [each["gain"] for each in data["sweep"]] == [row.gain for row in rows]
    assert [each["bytes_per_gpu"] for each in data["sweep"]] == [3e6 * row.slots for row in rows]
    assert (data["policy"], data["slot_cost"]) == ("balance", 0.01)
    assert data["pays_up_to"] == worthwhile(rows, 0.01).num_replicas


@pytest.mark.parametrize(
    ("cost", "sentence"),
    [
        ("0.9", "No redundant experts pay: no number of further slots gains as much as it costs."),
        ("0", r"They pay up to \d+ replicas, \d+ redundant experts: "),
    ],
)
def test_a_sweep_explains_what_it_means_by_paying(out: Run, file: Path, cost: str, sentence: str) -> None:
    text = out(file, "--gpus", "4", "--sweep-replicas", "20", "--slot-cost", cost)
    assert list(table(text)) == ["8", "12", "16", "20"]
    assert re.search(sentence, text)
    assert f"counted here as {cost} of the throughput (--slot-cost)" in text


# --- pictures -----------------------------------------------------------------------------------------------


def test_gpus_before_and_after_and_balancedness_over_time_are_drawn(out: Run, file: Path, tmp_path: Path) -> None:
    heat, plot = tmp_path / "heat.svg", tmp_path / "plot.svg"
    text = out(file, *SIZES, "--heatmap", heat, "--plot", plot)
    assert text.endswith(f"wrote {heat}\nwrote {plot}\n")
    texts = {text.text for text in ElementTree.parse(heat).iter() if text.text}
    for policy in ("none", "current"):
        even = replay(WINDOWS, policy, 12, 4, settings=SETTINGS).balancedness.mean()
        assert f"{policy}, balancedness of a step {even:.3f}" in texts
    assert "GPU loads, sum of 16 steps: loads.npy on 4 GPUs, 12 replicas" in texts
    assert {text.text for text in ElementTree.parse(plot).iter() if text.get("class") == "name"} == set(POLICIES)


def test_a_long_plot_shows_means(out: Run, tmp_path: Path) -> None:
    path, plot = tmp_path / "long.npy", tmp_path / "plot.svg"
    np.save(path, np.tile([[[2, 1]], [[1, 1]]], (250, 1, 1)))
    out(path, "--replicas", "2", "--gpus", "2", "--policy", "none", "--plot", plot)
    picture = plot.read_text()
    assert "step (each point is the mean over 3)" in picture
    assert picture.count("<circle") == 167


def test_of_policies_that_know_the_future_the_last_is_drawn(out: Run, file: Path, tmp_path: Path) -> None:
    out(file, *SIZES, "--policy", "hindsight", "--heatmap", tmp_path / "heat.svg")
    assert "hindsight, balancedness" in (tmp_path / "heat.svg").read_text()


@pytest.mark.skipif(not has_font(), reason="no font is installed here")
def test_a_sweep_is_plotted_as_png(out: Run, file: Path, tmp_path: Path) -> None:
    plot = tmp_path / "sweep.png"
    out(file, "--gpus", "4", "--sweep-replicas", "16", "--plot", plot)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_a_terminal_sees_how_far_it_is_and_a_pipe_does_not(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    assert main(["replay", str(file), *SIZES, "--policy", "none", "--json"]) == 0
    assert "replaying" in capsys.readouterr().err
    monkeypatch.delenv("FORCE_COLOR")
    assert main(["replay", str(file), *SIZES, "--policy", "none", "--json"]) == 0
    assert capsys.readouterr().err == ""


# --- what is refused ----------------------------------------------------------------------------------------


def with_value(value: float) -> np.ndarray:
    windows = WINDOWS.astype(np.float64)
    windows[5, 1, 2] = value
    return windows


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (with_value(np.nan), "window 5: the load of expert 2 in layer 1 is nan"),
        (with_value(np.inf), "window 5: the load of expert 2 in layer 1 is inf"),
        (with_value(-1), "window 5: the load of expert 2 in layer 1 is -1.0"),
        (with_value(1e39), "window 5: the load of expert 2 in layer 1 is 1e+39; a load has to fit float32"),
        (WINDOWS[None], "the loads have shape [1, 16, 3, 8]"),
        (WINDOWS[:, :0], "0 layers and 8 experts; at least one layer"),
        (WINDOWS[:, :, :1], "each layer has one expert, so there is nothing to balance"),
        (WINDOWS[0], "holds a single step, of which nothing can be learnt for a next; record several"),
        (WINDOWS[:0], "the loads have 0 windows; record at least one"),
    ],
)
def test_recordings_of_which_nothing_can_be_replayed(
    refusal: Run, tmp_path: Path, windows: np.ndarray, message: str
) -> None:
    path = tmp_path / "bad.npy"
    np.save(path, windows)
    sentence = refusal(path, *SIZES)
    assert sentence.startswith(str(path))
    assert message in sentence


def test_files_that_are_empty_cut_off_or_missing(refusal: Run, tmp_path: Path) -> None:
    whole, cut, empty = (tmp_path / name for name in ("whole.npz", "cut.npz", "empty.npz"))
    np.savez(whole, loads=WINDOWS)
    cut.write_bytes(whole.read_bytes()[:-200])
    empty.touch()
    assert "cut off" in refusal(cut, *SIZES)
    assert refusal(empty, *SIZES) == f"{empty} is empty; give a file with loads"
    assert "No such file" in refusal(tmp_path / "none.npy", *SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpus 4", "replay needs either --replicas or --sweep-replicas; give one of them"),
        ("--gpus 4 --replicas 12 --sweep-replicas 16", "replay needs either --replicas or --sweep-replicas"),
        ("--gpus 4 --replicas 13", "13 replicas do not divide over 4 GPUs: give 16, or another multiple"),
        ("--gpus 4 --sweep-replicas 4", "at most 4 replicas on 4 GPUs cannot hold 8 experts"),
        ("--gpus 4 --sweep-replicas 16 --policy none --policy balance", "a sweep over replicas is of one --policy"),
        ("--gpus 4 --sweep-replicas 16 --heatmap x.svg", "has no --heatmap and no --gb-per-s"),
        ("--gpus 4 --sweep-replicas 16 --slot-cost 2", "'--slot-cost'"),
        ("--gpus 4 --replicas 12 --step-interval 16", "there are 16 steps, and with --step-interval 16 no rebalance"),
        ("--gpus 4 --replicas 12 --step-interval 0", "step_interval is 0; it has to be a whole number"),
        ("--gpus 4 --replicas 12 --window-size 0", "window_size is 0; it has to be a whole number"),
        ("--gpus 4 --replicas 12 --decay 2", "the decay is 2.0; it has to lie between 0 and 1"),
        ("--gpus 4 --replicas 12 --skip-above 0", "skip_above is 0.0; it has to be a balancedness"),
        ("--gpus 4 --replicas 12 --max-moves -1", "'--max-moves'"),
        ("--gpus 4 --replicas 12 --policy best", "'best' is not one of 'none', 'published'"),
        ("--gpus 4 --replicas 12 --gb-per-s 5", "--gb-per-s 5 needs to know how much moves; give --expert-bytes"),
        ("--gpus 4 --replicas 12 --expert-bytes 0", "--expert-bytes is 0; it has to be a finite number above 0"),
        (
            "--gpus 4 --replicas 12 --plot x.svg --heatmap x.svg",
            "both name x.svg, which can hold one picture; give two",
        ),
        ("--gpus 4 --replicas 12 --plot x.jpg", "x.jpg ends in '.jpg'; a picture is drawn as .svg or .png"),
        ("--gpus 4 --replicas 12 --key loads", "a .npy file has no array named 'loads'"),
    ],
)
def test_options_that_do_not_fit(refusal: Run, file: Path, options: str, message: str) -> None:
    assert message in refusal(file, *options.split())


# --- recorded by others -------------------------------------------------------------------------------------


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded loads are not here")
def test_on_recorded_loads_few_moves_are_worth_about_what_many_are(out: Run) -> None:
    data: dict[str, Any] = json.loads(out(RECORDED / "esft_intent.npz", "--replicas", "80", "--gpus", "16", "--json"))
    found = {each["policy"]: each for each in data["policies"]}
    even = {name: each["balancedness_mean"] for name, each in found.items()}
    assert even["none"] + 0.2 < even["current"]
    assert abs(even["current"] - even["published"]) < 0.01
    assert found["current"]["moves"] < found["published"]["moves"] / 5
    assert even["balance"] < even["hindsight"] < even["oracle"]


# --- what crosses nodes -------------------------------------------------------------------------------------

ROUTES = np.random.default_rng(4).integers(0, 8, (40, 3, 2))
ON_NODES = [*SIZES, "--nodes", "2", "--groups", "4"]


def test_token_copies_between_nodes_are_those_of_the_last_placement_and_of_each_way_to_place(
    out: Run, file: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "routes.npy", ROUTES)
    data = json.loads(out(file, *ON_NODES, "--routes", tmp_path / "routes.npy", "--json"))
    for each in data["policies"]:
        last = replay(WINDOWS, each["policy"], 12, 4, 2, 4, SETTINGS).last
        assert each["copies_per_token"] == pytest.approx(copies_per_token(ROUTES, last).mean())
    ways = alternatives(WINDOWS.sum(axis=0), 12, 4, 2, 4)
    assert list(data["ways"]) == ["published", "hierarchical", "global", "spill"]
    for name, way in ways.items():
        assert data["ways"][name]["copies_per_token"] == pytest.approx(copies_per_token(ROUTES, way).mean())
    told = out(file, *ON_NODES, "--routes", tmp_path / "routes.npy")
    lines = {line.split("  ")[0]: line for line in told.splitlines()}
    assert lines["policy"].endswith("copies")
    assert lines["oracle"].endswith(f"{data['policies'][-1]['copies_per_token']:.3f}")
    assert lines["spill of 0.05"].endswith(f"{data['ways']['spill']['copies_per_token']:.3f}")


def test_routes_in_the_file_are_found_and_without_them_copies_are_not_known(
    out: Run, file: Path, tmp_path: Path
) -> None:
    data = json.loads(out(file, *ON_NODES, "--json"))
    assert {each["copies_per_token"] for each in data["policies"]} == {None}
    assert {way["copies_per_token"] for way in data["ways"].values()} == {None}
    told = out(file, *ON_NODES)
    assert told.count("not known") == len(POLICIES) + 4
    both = tmp_path / "both.npz"
    np.savez(both, loads=WINDOWS, routes=ROUTES)
    assert json.loads(out(both, *ON_NODES, "--json"))["ways"]["global"]["copies_per_token"] > 0
    assert json.loads(out(file, *SIZES, "--json"))["ways"] is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--replicas 12", "--routes {file} says what crosses nodes, and there is one; give --nodes, or leave it out"),
        ("--sweep-replicas 12 --nodes 2", "--routes {file} is for the policies side by side, not for a sweep; leave"),
        ("--replicas 12 --nodes 2", "{file}: the routes: experts go from 0 to "),
    ],
)
def test_routes_that_do_not_fit_are_one_sentence(refusal: Run, file: Path, arguments: str, sentence: str) -> None:
    said = refusal(file, "--gpus", "4", "--routes", file, *arguments.split())
    assert said.startswith(sentence.format(file=file))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--replicas", 4, "--slot-cost", 0.5), "--slot-cost 0.5 is for --sweep-replicas"),
        (("--replicas", 4, "--policy", "balance", "--max-moves", 3), "--max-moves 3 is for the policy current"),
        (("--replicas", 4, "--window-size", 2, "--decay", 0.5), "are two ways to forget; give one of them"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, refusal, options: tuple[object, ...], said: str
) -> None:
    path = tmp_path / "loads.npy"
    np.save(path, np.ones((4, 1, 4)))
    assert said in refusal(path, "--gpus", 2, *options)
