"""The verb balance: loads out of many files, a table, plain data, and one sentence for whatever cannot be read."""

import io
import json
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow import LoadTracker, Placement, balance, plan_migration, rebalance_experts
from counterflow.experts import (
    alternatives,
    balance_scenarios,
    copies_per_token,
    move_frontier,
    read_placement,
    read_served,
    resize,
    write_placement,
    write_served,
)

Run = Callable[..., str]
LOADS = np.random.default_rng(0).integers(1, 500, (3, 8))
SIZES = ["--replicas", "12", "--gpus", "4"]


@pytest.fixture
def out(out: Run) -> Run:
    return partial(out, "balance")


@pytest.fixture
def refusal(refusal: Run) -> Run:
    return partial(refusal, "balance")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "loads.npy"
    np.save(path, LOADS)
    return path


# --- plain data ---------------------------------------------------------------------------------------------


def test_as_json_it_has_the_keys_that_others_rely_on(out: Run, file: Path) -> None:
    data = json.loads(out(file, *SIZES, "--json"))
    placement = balance(LOADS, 12, 4)
    certificate = placement.certificate
    assert data["physical_to_logical"] == placement.physical_to_logical.tolist()
    assert data["logical_count"] == placement.logical_count.tolist()
    assert data["balancedness"] == placement.balancedness(LOADS).tolist()
    assert data["max_load"] == certificate.max_load.tolist()
    assert data["max_load_bound"] == certificate.max_load_bound.tolist()
    assert data["limited_by"] == list(certificate.limited_by)
    assert (data["moves"], data["placement"], data["hierarchy"]) == (None, None, "none")
    in_order = Placement([[*range(8), 0, 1, 2, 3]] * 3, 8, 4)
    assert data["balancedness_before"] == in_order.balancedness(LOADS).tolist()
    published = Placement(rebalance_experts(LOADS, 12, 1, 1, 4)[0], 8, 4)
    assert data["balancedness_published"] == published.balancedness(LOADS).tolist()


def test_the_placement_is_written_for_others_to_read(out: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    data = json.loads(out(file, *SIZES, "--nodes", "2", "--groups", "4", "-o", path, "--json"))
    placement = read_placement(path)
    assert placement.physical_to_logical.tolist() == data["physical_to_logical"]
    assert (placement.num_nodes, placement.hierarchy) == (2, "node")
    assert data["placement"] == str(path)


def test_beside_a_current_placement_as_much_as_can_be_stays(out: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "current.json"
    current = balance(LOADS[::-1], 12, 4)
    write_placement(path, current)
    data = json.loads(out(file, *SIZES, "--current", path, "--json"))
    placement = balance(LOADS, 12, 4, current=current)
    plan = plan_migration(current, placement)
    assert data["physical_to_logical"] == plan.new.physical_to_logical.tolist()
    assert data["moves"] == plan.moves.sum() > 0
    assert data["balancedness"] == placement.balancedness(LOADS).tolist()
    assert data["balancedness_before"] == current.balancedness(LOADS).tolist()
    assert re.search(rf"^Moves: {data['moves']} experts", out(file, *SIZES, "--current", path), re.MULTILINE)


def test_no_more_moves_than_allowed(out: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "current.json"
    current = balance(LOADS[::-1], 12, 4)
    write_placement(path, current)
    for most in (0, 3):
        data = json.loads(out(file, *SIZES, "--current", path, "--max-moves", str(most), "--json"))
        assert data["moves"] <= most
        plan = plan_migration(current, balance(LOADS, 12, 4, current=current, max_moves=most))
        assert data["physical_to_logical"] == plan.new.physical_to_logical.tolist()


def test_with_other_slots_the_fewest_experts_move_and_it_goes_on_from_there(
    out: Run, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "current.json"
    current = balance(LOADS, 8, 4)
    write_placement(path, current)
    data = json.loads(out(file, *SIZES, "--current", path, "--json"))
    resized = resize(current, LOADS, num_replicas=12)
    plan = plan_migration(current, balance(LOADS, 12, 4, current=resized.placement))
    assert data["physical_to_logical"] == plan.new.physical_to_logical.tolist()
    assert (data["moves"], data["fewest_moves"], data["reload"], data["lost_gpus"]) == (plan.moves.sum(), 0, [], [])


def test_what_is_gone_with_lost_gpus_is_named(out: Run, refusal: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "current.json"
    current = balance(LOADS, 12, 4)
    write_placement(path, current)
    lost = ["--replicas", "9", "--gpus", "3", "--current", path, "--lost-gpus", "1"]
    data = json.loads(out(file, *lost, "--json"))
    resized = resize(current, LOADS, lost_gpus=[1])
    assert data["reload"] == [list(gone) for gone in resized.reload] != []
    assert (data["lost_gpus"], data["fewest_moves"]) == ([1], resized.fewest.sum())
    least = json.loads(out(file, *lost, "--max-moves", str(resized.fewest.sum()), "--json"))
    assert least["moves"] == resized.fewest.sum() <= data["moves"]
    assert least["physical_to_logical"] == resized.placement.physical_to_logical.tolist()
    told = " ".join(out(file, *lost).split())
    layer, expert = resized.reload[0]
    assert f"takes {resized.fewest.sum()} of them: no way takes fewer." in told
    assert f"No GPU has a copy any more of expert {expert} of layer {layer}" in told
    assert f"load {len(resized.reload)} experts from a checkpoint" in told
    assert f"{resized.fewest.sum()} of them have to move, and --max-moves allows 0" in refusal(
        file, *lost, "--max-moves", "0"
    )


def test_the_maps_of_engines_are_of_the_gpus_there_are_and_those_lost(out: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    current = balance(LOADS, 12, 4)
    write_served(path, current, "sglang")
    data = json.loads(out(file, "--replicas", "9", "--gpus", "3", "--current", path, "--lost-gpus", "1,1", "--json"))
    assert data["fewest_moves"] == resize(current, LOADS, lost_gpus=[1]).fewest.sum()


def test_the_frontier_is_told_plotted_and_taken(out: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "current.json"
    current = balance(LOADS[::-1], 12, 4)
    write_placement(path, current)
    found = move_frontier(LOADS, current)
    plot = tmp_path / "frontier.svg"
    data = json.loads(out(file, *SIZES, "--current", path, "--frontier", "--plot", plot, "--json"))["frontier"]
    assert (data["moves"], data["balancedness"]) == (found.moves.tolist(), found.balancedness.tolist())
    assert (data["knee"], data["as_published"]) == (found.moves[found.knee], found.moves[found.as_published])
    assert plot.read_text(encoding="utf-8").count("<title>") >= 2 * len(found.moves)
    told = out(file, *SIZES, "--current", path, "--frontier")
    assert re.search(rf"^The knee: {data['knee']} moves? \(", told, re.MULTILINE)
    taken = json.loads(out(file, *SIZES, "--current", path, "--frontier", "--max-moves", str(data["knee"]), "--json"))
    assert np.mean(taken["balancedness"]) == pytest.approx(found.balancedness[found.knee])
    assert all(bound <= load for bound, load in zip(taken["max_load_bound"], taken["max_load"], strict=True))
    best = tmp_path / "best.json"
    write_placement(best, balance(LOADS, 12, 4))
    assert "no number of moves makes it more balanced" in out(file, *SIZES, "--current", best, "--frontier")


# --- the table ----------------------------------------------------------------------------------------------


def test_every_layer_has_a_line_and_the_worst_are_named(out: Run, file: Path) -> None:
    lines = out(file, *SIZES).splitlines()
    assert max(map(len, lines)) <= 120
    head = next(index for index, line in enumerate(lines) if line.startswith("layer"))
    assert re.split(r"\s{2,}", lines[head]) == [
        *("layer", "in order", "published", "balanced", "largest", "bound", "gap", "limited by"),
    ]
    rows = [re.split(r"\s{2,}", line.rstrip()) for line in lines[head + 1 : head + 6]]
    assert [row[0] for row in rows] == ["0", "1", "2", "mean", "worst"]
    even = balance(LOADS, 12, 4).balancedness(LOADS)
    assert [row[3] for row in rows] == [f"{value:.4f}" for value in (*even, even.mean(), even.min())]
    assert any(line.startswith(f"The worst layers: {even.argmin()} ({even.min():.4f}, ") for line in lines)


def test_groups_and_copies_on_one_gpu_are_told(out: Run, tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    path.write_text("[[4, 3, 1]]")
    assert "\nBeside a copy on its own GPU lies slot 1 of layer 0.\n" in out(path, "--replicas", "4", "--gpus", "2")
    np.save(tmp_path / "loads.npy", LOADS)
    printed = out(tmp_path / "loads.npy", *SIZES, "--nodes", "2", "--groups", "4", "-o", tmp_path / "p.json")
    assert "\nEach of the 4 groups stays on one of the 2 nodes.\n" in printed
    assert printed.endswith(f"\nwrote {tmp_path / 'p.json'}\n")


# --- what it reads ------------------------------------------------------------------------------------------


def tracked(path: Path) -> None:
    tracker = LoadTracker(3, 8)
    tracker.add(LOADS)
    tracker.save(path)


WINDOWS = np.stack([LOADS - 1, np.ones_like(LOADS)])
READABLE: dict[str, Callable[[Path], object]] = {
    "rows.json": lambda path: path.write_text(json.dumps(LOADS.tolist())),
    "windows.json": lambda path: path.write_text(json.dumps(WINDOWS.tolist())),
    "object.json": lambda path: path.write_text(json.dumps({"model": "x", "loads": LOADS.tolist()})),
    "sglang.json": lambda path: path.write_text(json.dumps({"logical_count": WINDOWS.tolist()})),
    "adrs.json": lambda path: path.write_text(
        json.dumps({"load_history": [{"logical_expert_load": window} for window in WINDOWS.tolist()]})
    ),
    "vllm.json": lambda path: path.write_text(
        json.dumps({"current_step": 7, "per_layer_stats": [{"logical_load": row} for row in LOADS.tolist()]})
    ),
    "windows.npy": lambda path: np.save(path, WINDOWS.astype(np.uint16)),
    "one.npz": lambda path: np.savez(path, anything=LOADS),
    "several.npz": lambda path: np.savez_compressed(path, loads=WINDOWS, tokens=np.ones(3)),
    "tracker.npz": tracked,
    "recorder.pt": lambda path: torch.save({"rank": 0, "logical_count": torch.tensor(WINDOWS)}, path),
}


@pytest.mark.parametrize("name", READABLE)
def test_loads_are_read_in_every_form_that_is_about(out: Run, tmp_path: Path, name: str) -> None:
    READABLE[name](tmp_path / name)
    data = json.loads(out(tmp_path / name, *SIZES, "--json"))
    assert data["physical_to_logical"] == balance(LOADS, 12, 4).physical_to_logical.tolist()


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_key_chooses_among_several(out: Run, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"loads{suffix}"
    if suffix == ".npz":
        np.savez(path, loads=np.ones((3, 8)), code=LOADS)
    else:
        path.write_text(json.dumps({"loads": np.ones((3, 8)).tolist(), "code": LOADS.tolist()}))
    data = json.loads(out(path, *SIZES, "--key", "code", "--json"))
    assert data["physical_to_logical"] == balance(LOADS, 12, 4).physical_to_logical.tolist()


def folder_of_ranks(path: Path) -> None:
    path.mkdir()
    slots = torch.arange(8).repeat(3, 1)
    for rank, counts in enumerate(WINDOWS):
        record = {"forward_pass_id": 1, "rank": rank, "global_physical_count": torch.tensor(counts)}
        torch.save({"records": [record], "last_physical_to_logical_map": slots}, path / f"recorder_1.{rank}_{rank}.pt")


def test_what_the_ranks_recorded_is_read_from_their_folder(out: Run, tmp_path: Path) -> None:
    folder_of_ranks(tmp_path / "ranks")
    data = json.loads(out(tmp_path / "ranks", *SIZES, "--json"))
    assert data["physical_to_logical"] == balance(LOADS, 12, 4).physical_to_logical.tolist()


# --- several kinds of traffic -------------------------------------------------------------------------------

CODE, CHAT = LOADS, np.random.default_rng(1).integers(1, 500, (3, 8))


@pytest.fixture
def kinds(tmp_path: Path) -> list[Path]:
    np.savez(tmp_path / "code.npz", loads=np.stack([CODE, CODE]))
    (tmp_path / "chat.json").write_text(json.dumps(CHAT.tolist()))
    return [tmp_path / "code.npz", tmp_path / "chat.json"]


def test_several_files_get_one_placement_that_suits_each(out: Run, kinds: list[Path]) -> None:
    data = json.loads(out(*kinds, *SIZES, "--json"))
    placement = balance_scenarios({"code": CODE, "chat": CHAT}, 12, 4)
    mixture = CODE / CODE.sum(axis=1, keepdims=True) + CHAT / CHAT.sum(axis=1, keepdims=True)
    assert data["physical_to_logical"] == placement.physical_to_logical.tolist()
    assert list(data["scenarios"]) == ["code", "chat"]
    in_order = Placement([[*range(8), 0, 1, 2, 3]] * 3, 8, 4)
    for name, loads in (("code", CODE), ("chat", CHAT)):
        assert data["scenarios"][name]["balancedness"] == placement.balancedness(loads).tolist()
        assert data["scenarios"][name]["balancedness_before"] == in_order.balancedness(loads).tolist()
    assert data["balancedness"] == pytest.approx(placement.balancedness(mixture))
    assert (data["max_load_bound"], data["limited_by"], data["moves"]) == (None, None, None)


def test_of_several_files_each_has_a_line_and_so_has_the_mixture(out: Run, kinds: list[Path]) -> None:
    lines = out(*kinds, *SIZES).splitlines()
    assert max(map(len, lines)) <= 120
    head = next(index for index, line in enumerate(lines) if line.startswith("scenario"))
    rows = [re.split(r"\s{2,}", line) for line in lines[head : head + 4]]
    assert [row[0] for row in rows] == ["scenario", "code", "chat", "mixture"]
    even = balance_scenarios({"code": CODE, "chat": CHAT}, 12, 4).balancedness(CHAT)
    assert (rows[2][3], rows[2][6]) == (f"{even.mean():.4f}", f"{even.min():.4f}")


def test_the_placement_for_several_files_is_laid_beside_what_serves(
    out: Run, kinds: list[Path], tmp_path: Path
) -> None:
    current = balance(CODE, 12, 4)
    write_placement(tmp_path / "current.json", current)
    data = json.loads(out(*kinds, *SIZES, "--current", tmp_path / "current.json", "--json"))
    plan = plan_migration(current, balance_scenarios({"code": CODE, "chat": CHAT}, 12, 4))
    assert data["physical_to_logical"] == plan.new.physical_to_logical.tolist()
    assert data["moves"] == plan.moves.sum()


def test_files_of_one_name_go_by_their_paths(out: Run, refusal: Run, kinds: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "code.npy"
    np.save(other, CHAT)
    data = json.loads(out(kinds[0], other, *SIZES, "--json"))
    assert list(data["scenarios"]) == [str(kinds[0]), str(other)]
    assert refusal(other, other, *SIZES).startswith(f"{other} is given twice")


# --- what crosses nodes -------------------------------------------------------------------------------------

NODES = [*SIZES, "--nodes", "2", "--groups", "4"]
ROUTES = np.random.default_rng(2).integers(0, 8, (50, 3, 2))


def test_spilt_load_leaves_its_node_and_is_told(out: Run, file: Path) -> None:
    data = json.loads(out(file, *NODES, "--node-spill", "0.2", "--json"))
    assert data["physical_to_logical"] == balance(LOADS, 12, 4, 2, 4, node_spill=0.2).physical_to_logical.tolist()
    told = re.search(
        r"stays on one of the 2 nodes, but for ([\d.]+)% of the load\.", out(file, *NODES, "--node-spill", ".2")
    )
    assert told is not None
    assert 0 < float(told[1]) <= 20


@pytest.mark.parametrize("recorded", ["apart", "beside the loads"])
def test_with_routes_every_way_is_counted(out: Run, file: Path, tmp_path: Path, recorded: str) -> None:
    if recorded == "apart":
        np.save(tmp_path / "routes.npy", ROUTES.astype(np.int16))
        arguments = [file, *NODES, "--routes", tmp_path / "routes.npy"]
    else:
        np.savez(tmp_path / "both.npz", loads=LOADS, routes=ROUTES)
        arguments = [tmp_path / "both.npz", *NODES]
    data = json.loads(out(*arguments, "--json"))
    ways = alternatives(LOADS, 12, 4, 2, 4)
    assert list(data["ways"]) == list(ways)
    for name, way in ways.items():
        assert data["ways"][name]["balancedness"] == way.balancedness(LOADS).mean()
        assert data["ways"][name]["copies_per_token"] == pytest.approx(copies_per_token(ROUTES, way).mean())
    printed = out(*arguments)
    assert re.search(r"^spill of 0\.05 +\d\.\d{4} +\d\.\d{4} +\d\.\d{3}$", printed, re.MULTILINE)
    assert "\nOf 50 tokens, taken to be spread over the GPUs in equal blocks.\n" in printed


def test_a_recording_of_tokens_brings_its_routes(out: Run, tmp_path: Path) -> None:
    record = {
        "forward_pass_id": 1,
        "rank": 0,
        "topk_ids_of_layer": torch.tensor(ROUTES.swapaxes(0, 1)),
        "global_physical_count": torch.tensor(LOADS),
    }
    content = {"records": [record], "last_physical_to_logical_map": torch.arange(8).repeat(3, 1)}
    torch.save(content, tmp_path / "recorder.pt")
    data = json.loads(out(tmp_path / "recorder.pt", *NODES, "--json"))
    ways = alternatives(LOADS, 12, 4, 2, 4)
    assert data["ways"]["global"]["copies_per_token"] == pytest.approx(copies_per_token(ROUTES, ways["global"]).mean())


def test_without_routes_nobody_knows_what_crosses(out: Run, file: Path) -> None:
    data = json.loads(out(file, *NODES, "--json"))
    assert {way["copies_per_token"] for way in data["ways"].values()} == {None}
    printed = out(file, *NODES)
    assert len(re.findall(r" not known$", printed, re.MULTILINE)) == 4
    assert "\nNo routes were recorded with these loads; give those of some tokens with --routes.\n" in printed


def test_on_one_node_nothing_crosses_and_nothing_is_said(out: Run, file: Path) -> None:
    assert "ways" not in json.loads(out(file, *SIZES, "--json"))
    assert "cross" not in out(file, *SIZES)


def test_what_comes_of_a_current_placement_is_one_more_way(out: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "current.json"
    write_placement(path, balance(LOADS[::-1], 12, 4, 2, 4))
    data = json.loads(out(file, *NODES, "--current", path, "--json"))
    assert list(data["ways"]) == ["published", "hierarchical", "global", "spill", "this one"]
    assert data["ways"]["this one"]["balancedness"] == pytest.approx(np.mean(data["balancedness"]))


# --- what it writes for others ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["counterflow", "sglang", "vllm"])
def test_what_is_written_for_a_server_is_taken_as_what_serves(out: Run, file: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "served.json"
    data = json.loads(out(file, *NODES, "-o", path, "--format", kind, "--json"))
    assert read_served(path, 4, 2).physical_to_logical.tolist() == data["physical_to_logical"]
    again = json.loads(out(file, *NODES, "--current", path, "--json"))
    assert (again["moves"], again["physical_to_logical"]) == (0, data["physical_to_logical"])


def test_it_is_told_how_sglang_takes_what_was_written(out: Run, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "sglang.json"
    told = out(file, *SIZES, "-o", path, "--format", "sglang").splitlines()[-2:]
    assert told == [
        f"wrote {path}",
        f"start SGLang with --init-expert-location {path} --ep-num-redundant-experts 4",
    ]


# --- what it refuses ----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    np.savez(path, loads=np.arange(4096.0).reshape(64, 64))
    path.write_bytes(path.read_bytes()[:-4000])


def damaged(path: Path) -> None:
    np.savez(path, loads=np.arange(4096.0).reshape(64, 64))
    data = bytearray(path.read_bytes())
    data[2000:2010] = b"\xff" * 10
    path.write_bytes(data)


def claims_much(path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def array(content: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.asarray(content))


REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("none.npy", lambda path: None, r"cannot be read \(No such file or directory\); give a file"),
    ("folder.npy", lambda path: path.mkdir(), r"cannot be read \(Is a directory\)"),
    ("empty.npy", text(""), "is empty; give a file with loads"),
    ("empty.npz", text(""), "is empty; give a file with loads"),
    ("empty.json", text(""), "is empty; give a file with loads"),
    ("loads.csv", text("1,2"), r"ends in '\.csv'; loads are read from \.npy, \.npz, \.json and \.safetensors"),
    ("nan.npy", array([[1, np.nan]]), "the load of expert 1 in layer 0 is nan"),
    ("inf.npy", array([[1, np.inf]]), "the load of expert 1 in layer 0 is inf"),
    ("minus.npy", array([[1, -2]]), "the load of expert 1 in layer 0 is -2; a load cannot be negative"),
    ("large.npy", array([[1, 1e39]]), r"the load of expert 1 in layer 0 is 1e\+39; a load has to fit float32"),
    ("window.npy", array([[[1, 2]], [[1, np.nan]]]), "window 1: the load of expert 1 in layer 0 is nan"),
    ("scalar.npy", array(3), r"the loads have shape \[\]"),
    ("four.npy", array(np.ones((2, 2, 2, 2))), r"the loads have shape \[2, 2, 2, 2\]"),
    ("layers.npy", array(np.ones((0, 4))), "the loads have 0 layers and 4 experts"),
    ("windows.npy", array(np.ones((0, 2, 4))), "the loads have 0 windows"),
    ("one.npy", array([[5], [7]]), "each layer has one expert, so there is nothing to balance"),
    ("text.npy", array([["a", "b"]]), "the loads are of type <U1"),
    ("complex.npy", array([[1j, 2]]), "the loads are of type complex128"),
    ("objects.npy", array([[{}, None]]), "it holds Python objects, which could run code"),
    ("garbage.npy", text("no array"), r"it is no \.npy file, or cut off \(ValueError\)"),
    ("garbage.npz", text("no arrays"), r"it is no \.npz file, or cut off \(ValueError\)"),
    ("much.npy", claims_much, "it "),
    ("cut.npz", cut, r"it is no \.npz file, or cut off \(BadZipFile\)"),
    ("damaged.npz", damaged, r"it is cut off or damaged \(BadZipFile\)"),
    ("npy.npz", lambda path: path.write_bytes(npy()), r"it holds a single array; name it \.npy"),
    ("npz.npy", lambda path: path.write_bytes(npz()), r"it holds named arrays; name it \.npz"),
    ("keys.npz", lambda path: np.savez(path, a=1, b=2), "it has no array named 'loads' but 'a', 'b'; choose one"),
    ("nothing.npz", lambda path: np.savez(path), "it has no array named 'loads' but none at all"),
    ("broken.json", text("[[1, 2]"), "it is no JSON"),
    ("binary.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "it is no JSON"),
    ("deep.json", text("[" * 100_000), "it is no JSON"),
    ("number.json", text("7"), "it holds a single value; write the loads as nested lists"),
    ("ragged.json", text("[[1, 2], [3]]"), "its rows are not of equal length"),
    ("nan.json", text("[[1, NaN]]"), "the load of expert 1 in layer 0 is nan"),
    ("large.json", text("[[1, 1e39]]"), r"the load of expert 1 in layer 0 is 1e\+39"),
    ("huge.json", text(f"[[1, {10**30}]]"), "the loads are of type object"),
    ("words.json", text('[["1", "2"]]'), "the loads are of type <U1"),
    ("keys.json", text('{"a": 1}'), "the JSON has no 'loads' but 'a'; choose one of them"),
    ("value.json", text('{"loads": 1}'), "it holds a single value"),
    ("history.json", text('{"load_history": [{"step": 1}]}'), "not every entry of 'load_history' has"),
    ("history.json", text('{"load_history": 5}'), "not every entry of 'load_history' has"),
    ("garbage.pt", text("no tensors"), "cannot be read as tensors"),
    ("empty.pt", text(""), "cannot be read as tensors"),
    ("code.pt", lambda path: torch.save({"logical_count": Path("x")}, path), "cannot be read as tensors"),
    ("other.pt", lambda path: torch.save({"records": []}, path), 'has no "records"; record at least one pass'),
    (
        "minus.pt",
        lambda path: torch.save({"logical_count": torch.tensor([[-1, 2]])}, path),
        "window 0: the load of expert 0 in",
    ),
]


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, loads=np.ones((2, 4)))
    return file.getvalue()


def npy() -> bytes:
    data = io.BytesIO()
    np.save(data, LOADS)
    return data.getvalue()


@pytest.mark.parametrize(("name", "write", "sentence"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_holds_no_loads_is_one_sentence_that_names_the_file(
    refusal: Run, tmp_path: Path, name: str, write: Callable[[Path], object], sentence: str
) -> None:
    write(tmp_path / name)
    said = refusal(tmp_path / name, "--replicas", "4", "--gpus", "2")
    assert re.match(rf"{re.escape(str(tmp_path / name))}:? {sentence}", said), said
    assert len(said) - len(str(tmp_path)) < 250


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--replicas 11 --gpus 4", "{file}: 11 replicas do not divide over 4 GPUs: give 12"),
        ("--replicas 4 --gpus 4", "{file}: 4 replicas cannot hold 8 experts"),
        ("--replicas 12 --gpus 0", "{file}: num_gpus is 0; it has to be a whole number"),
        ("--replicas 12 --gpus 4 --nodes 3", "{file}: 4 GPUs do not divide over 3 nodes"),
        ("--replicas 12 --gpus 4 --nodes 2 --groups 3 --hierarchy node", "{file}: 3 groups do not divide over 2 nodes"),
        ("--replicas 12 --gpus 4 --hierarchy rack", "{file}: the hierarchy is 'rack'; it has to be"),
        ("--replicas 12 --gpus 4 --key code", "{file}: a .npy file has no array named 'code'"),
        ("--replicas 12 --gpus 4 -o {file}/p.json", "{file}/p.json cannot be written (File exists)"),
        ("--replicas 12 --gpus 4 --current {file}x", "{file}x cannot be read (No such file or directory)"),
        ("--replicas 12 --gpus 2 --current {wide}", "{wide}: it has 4 GPUs left and --gpus says 2; name those"),
        ("--replicas 12 --gpus 4 --max-moves 3", "--max-moves 3 needs the placement that serves now; give it with"),
        ("--replicas 12 --gpus 4 --max-moves -1 --current {wide}", "Invalid value for '--max-moves'"),
        ("--replicas 10 --gpus 5 --max-moves 1 --current {wide}", "{wide}: before all experts are live on 5 GPUs with"),
        ("--replicas 12 --gpus 4 --lost-gpus 1", "--lost-gpus 1 needs the placement that serves now; give it with"),
        ("--replicas 12 --gpus 4 --frontier", "--frontier needs the placement that serves now; give it with"),
        (
            "--replicas 12 --gpus 4 --lost-gpus a --current {wide}",
            "--lost-gpus is 'a'; give the numbers of GPUs, as in",
        ),
        ("--replicas 12 --gpus 4 --lost-gpus 9 --current {wide}", "{wide}: the lost GPU 9 is none of the current plac"),
        ("--replicas 12 --gpus 4 --plot f.svg --current {wide}", "--plot f.svg plots the frontier; give --frontier as"),
        ("--replicas 12 --gpus 4 --frontier --plot f.gif --current {wide}", "f.gif ends in '.gif'; a picture is drawn"),
        ("{wide} --replicas 12 --gpus 4 --frontier --current {wide}", "--frontier is for one file, and 2 were given;"),
        ("--replicas 12 --gpus 4 --current {file}", "{file}: 'utf-8' codec can't decode"),
        ("--replicas 12 --gpus 4 --node-spill 0.1", "{file}: node_spill is 0.1, but no groups are kept on nodes here"),
        (
            "--replicas 12 --gpus 4 --nodes 2 --groups 2 --node-spill 2",
            "{file}: node_spill is 2.0; it has to be a share",
        ),
        ("{wide} --replicas 12 --gpus 4 --node-spill 0.1", "--node-spill 0.1 is for one file, and 2 were given"),
        (
            "{wide} --replicas 12 --gpus 4 --max-moves 3",
            "--max-moves 3 is for one file, and 2 were given; leave it out",
        ),
        ("--replicas 12 --gpus 4 --format sglang", "--format sglang says how to write the placement; give the file"),
        (
            "--replicas 12 --gpus 4 --format yaml -o {file}.p",
            "the format is 'yaml'; it has to be one of counterflow, sgl",
        ),
        ("--replicas 12 --gpus 4 --routes {file}", "--routes {file} says what crosses nodes, and there is one; give"),
        ("--replicas 12 --gpus 4 --nodes 2 --routes {wide}", "{wide} holds no routes; give a .npy, or a .npz"),
        ("--replicas 12 --gpus 4 --nodes 2 --routes {file}", "{file}: the routes: experts go from 0 to 7, and"),
        ("--replicas many --gpus 4", "Invalid value for '--replicas'"),
        ("--gpus 4", "Missing option '--replicas'"),
    ],
)
def test_sizes_and_options_that_do_not_fit_are_one_sentence(
    refusal: Run, file: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    wide = tmp_path / "wide.json"
    write_placement(wide, balance(LOADS, 12, 4))
    said = refusal(file, *arguments.format(file=file, wide=wide).split())
    assert said.startswith(sentence.format(file=file, wide=wide))


def test_the_example_of_its_help_runs(out: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("loads.npz", loads=np.random.default_rng(0).lognormal(0, 1, (2, 256)))
    example = re.search(r"Example:\n +counterflow balance (.*)", out("--help"))
    assert example is not None
    out(*example[1].split())
    assert read_placement("placement.json").num_slots == 288


def test_what_was_read_is_not_written_over(tmp_path: Path, refusal) -> None:
    path = tmp_path / "loads.npy"
    np.save(path, np.ones((1, 4)))
    before = path.read_bytes()
    said = refusal(path, "--replicas", 4, "--gpus", 2, "-o", path)
    assert "is what was read, and would be lost; write to another file" in said
    assert path.read_bytes() == before


def test_a_file_that_sglang_would_not_read_is_refused(tmp_path: Path, refusal) -> None:
    path = tmp_path / "loads.npy"
    np.save(path, np.ones((1, 4)))
    options = ("--replicas", 4, "--gpus", 2, "--format", "sglang", "-o", tmp_path / "a.txt")
    assert "ends in '.txt', and SGLang reads a .json; give one" in refusal(path, *options)


def test_groups_that_do_not_divide_over_nodes_are_told(tmp_path: Path, out) -> None:
    path = tmp_path / "loads.npy"
    np.save(path, np.ones((1, 9)))
    printed = out(path, "--replicas", 12, "--gpus", 4, "--nodes", 2, "--groups", 3)
    assert "3 groups do not divide over 2 nodes: placed without groups." in printed
