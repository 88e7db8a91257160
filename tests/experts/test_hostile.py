"""Whatever comes in, one sentence or a right answer comes out: no traceback, no warning, and the same every time."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow import LoadTracker, Placement, balance, plan_migration, rebalance_experts
from counterflow.cli import main
from counterflow.errors import PlacementError
from counterflow.experts import (
    balance_scenarios,
    move_frontier,
    read_loads,
    read_placement,
    read_routes,
    read_served,
    replay,
    resize,
)

FLOATS = (0.0, -0.0, 1.0, 3.5, 1e39, -1.0, float("nan"), float("inf"), -float("inf"), 5e-324, 1e-310, 3.4e38, 2.0**53)
INTS = (0, 1, 7, -1, 2**24 + 1, 2**31, 2**53 + 1, 2**62 + 1, 2**63 - 1)
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        "loads",
        b"",
        "",
        {},
        [],
        [[]],
        [[], []],
        [[[]]],
        [[1, 2], [3]],
        1,
        1.5,
        object(),
        {"a": 1},
        (),
        10**400,
    ),
    *(
        np.array(3),
        np.zeros((0, 4)),
        np.zeros((4, 0)),
        np.zeros((2, 0, 3)),
        [["1", "2"]],
        [[None, 1]],
        [[1j, 2]],
        range(4),
    ),
    *(np.array([["a", "b"]]), np.array([[1, None]], dtype=object), np.array([[1, 2]], dtype="datetime64[s]"), {1, 2}),
    *(np.zeros((1, 1, 1, 1)), np.ma.masked_array([[1, 2]], [[True, False]]), np.zeros(2, dtype=[("a", "i4")])),
)
NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    5,
    2**24,
    2**24 + 1,
    2**40,
    2**70,
    1.0,
    2.5,
    "2",
    None,
    True,
    float("nan"),
    [2],
    np.int8(2),
)

TYPES = ("f2", "f4", "f8", ">f8", "i1", "u1", "i8", "u8", "?", "g")


def usual(rng: random.Random, layers: int, experts: int) -> np.ndarray:
    return np.random.default_rng(rng.randrange(2**32)).integers(0, rng.choice((2, 9, 2**24)), (layers, experts))


def hostile_array(rng: random.Random, layers: int, experts: int) -> Any:
    """Loads of that shape, or nothing of the kind."""
    if rng.random() < 0.2:
        return rng.choice(ODD)
    if rng.random() < 0.1:
        experts = 1
    kind = rng.choice(TYPES)
    with np.errstate(over="ignore"):
        array: Any = usual(rng, layers, experts).astype(kind)
    if rng.random() < 0.5:
        values = FLOATS if array.dtype.kind == "f" else INTS if array.dtype.itemsize == 8 else (0, 1)
        with np.errstate(all="ignore"):
            for _ in range(rng.randrange(1, 4)):
                value = np.array(rng.choice(values)).astype(array.dtype)
                array[rng.randrange(layers), rng.randrange(experts)] = value
    match rng.randrange(8):
        case 0:
            array = np.asfortranarray(array)
        case 1:
            array = np.repeat(array, 2, axis=1)[:, ::2]
        case 2:
            array.setflags(write=False)
        case 3:
            array = array[::-1, ::-1]
        case 4:
            array = array[0]
        case 5:
            array = array.astype(object)
        case 6:
            array = array.tolist()
        case _:
            pass
    return array


def hostile_sizes(rng: random.Random, experts: int) -> tuple[Any, Any, Any, Any]:
    """Replicas, GPUs, nodes and groups; most often such as divide."""
    nodes = rng.choice((1, 1, 2))
    gpus = nodes * rng.randrange(1, 4)
    sizes: list[Any] = [gpus * (-(-experts // gpus) + rng.randrange(3)), gpus, nodes, rng.choice((1, nodes, 3))]
    if rng.random() < 0.25:
        sizes[rng.randrange(4)] = rng.choice(NUMBERS)
    return tuple(sizes)  # type: ignore[return-value]


def is_right(placement: Placement, loads: Any = None) -> None:
    """Every expert lives, all GPUs have as many slots, and the certificate is true."""
    slots = placement.physical_to_logical
    assert slots.shape[1] % placement.num_gpus == 0
    assert [sorted(set(row)) for row in slots.tolist()] == [list(range(placement.num_experts))] * len(slots)
    if loads is None or placement.certificate is None:
        return
    load = np.asarray(loads, dtype=np.float64).reshape(len(slots), -1).tolist()
    certificate = placement.certificate
    assert (certificate.max_load_bound <= certificate.max_load).all()
    for layer, row in enumerate(slots.tolist()):
        shares = [load[layer][expert] / row.count(expert) for expert in row]
        room = len(row) // placement.num_gpus
        heaviest = max(sum(shares[at : at + room]) for at in range(0, len(row), room))
        assert certificate.max_load[layer] == pytest.approx(heaviest, rel=1e-9, abs=1e-320)
        assert heaviest >= sum(load[layer]) / placement.num_gpus * (1 - 1e-9) - 1e-320


def any_placement(rng: random.Random, layers: int, experts: int, gpus: int) -> Placement:
    room = -(-experts // gpus) + rng.randrange(3)
    rows = []
    for _ in range(layers):
        row = [*range(experts), *(rng.randrange(experts) for _ in range(gpus * room - experts))]
        rng.shuffle(row)
        rows.append(row)
    return Placement(rows, experts, gpus)


# --- what is called with it ---------------------------------------------------------------------------------


def run_published(rng: random.Random, folder: Path) -> object:
    layers, experts = rng.randrange(1, 4), rng.randrange(1, 9)
    replicas, gpus, nodes, groups = hostile_sizes(rng, experts)
    maps = rebalance_experts(hostile_array(rng, layers, experts), replicas, groups, nodes, gpus)
    is_right(Placement(maps[0], maps[2].shape[1], int(gpus)))
    return [each.tolist() for each in maps]


def run_balance(rng: random.Random, folder: Path) -> object:
    layers, experts = rng.randrange(1, 4), rng.randrange(1, 9)
    loads, sizes = hostile_array(rng, layers, experts), hostile_sizes(rng, experts)
    hierarchy, spill = (
        rng.choice(("auto", "auto", "none", "node", "x", None, 3)),
        rng.choice((0.0, 0.0, 0.5, 2, "a", None)),
    )
    placement = balance(loads, *sizes, hierarchy, spill)
    is_right(placement, loads)
    return placement.physical_to_logical.tolist()


def run_from_current(rng: random.Random, folder: Path) -> object:
    layers, experts, gpus = rng.randrange(1, 4), rng.randrange(1, 9), rng.randrange(1, 4)
    current: Any = any_placement(rng, layers, experts, gpus)
    most = rng.choice((None, 0, 1, 3, 10**30, -1, 1.5, "3", True, float("nan")))
    loads, slots = hostile_array(rng, layers, experts), current.num_slots
    current = rng.choice((current, current, current, current, None, "placement", [[0]]))
    placement = balance(loads, slots, gpus, current=current, max_moves=most)
    is_right(placement, loads)
    if current is not None and most is not None:
        assert plan_migration(current, placement).moves.sum() <= most
    return placement.physical_to_logical.tolist()


def run_scenarios(rng: random.Random, folder: Path) -> object:
    layers, experts = rng.randrange(1, 3), rng.randrange(1, 6)
    kinds: Any = [hostile_array(rng, layers, experts) for _ in range(rng.randrange(0, 3))]
    kinds = rng.choice((kinds, dict(enumerate(kinds)), iter(kinds), rng.choice(ODD)))
    placement = balance_scenarios(kinds, *hostile_sizes(rng, experts))
    is_right(placement)
    return placement.physical_to_logical.tolist()


def run_plan(rng: random.Random, folder: Path) -> object:
    layers, experts, gpus = rng.randrange(1, 3), rng.randrange(1, 7), rng.randrange(1, 4)
    old = any_placement(rng, layers, rng.choice((experts, experts, 2)), gpus)
    new = any_placement(rng, layers, experts, rng.choice((gpus, gpus, gpus + 1, 1)))
    lost: Any = rng.choice(((), (), (0,), (gpus - 1,), (9,), (-1,), ("0",), (0.0,), (None,), (True,), range(gpus)))
    plan = plan_migration(old, new, lost_gpus=lost, reload_lost=rng.random() < 0.5)
    is_right(plan.new)
    for layer in plan.layers:
        for swap in plan.swaps(layer):
            assert {*range(experts)} <= {expert for row in swap.held for expert in row}
    return plan.to_json()


def run_resize(rng: random.Random, folder: Path) -> object:
    layers, experts, gpus = rng.randrange(1, 3), rng.randrange(1, 7), rng.randrange(1, 4)
    current = any_placement(rng, layers, experts, gpus)
    lost: Any = rng.choice(((), (0,), (gpus - 1,), (9,), (-1,), ("0",), (0.0,), (True,), range(gpus)))
    sizes = [rng.choice((None, None, rng.randrange(1, 6), rng.choice(NUMBERS))) for _ in range(3)]
    loads = rng.choice((None, hostile_array(rng, layers, experts)))
    found = resize(current, loads, lost_gpus=lost, num_gpus=sizes[0], num_replicas=sizes[1], num_nodes=sizes[2])
    is_right(found.placement)
    assert found.plan.moves.tolist() == found.fewest.tolist()
    return found.plan.to_json()


def run_frontier(rng: random.Random, folder: Path) -> object:
    layers, experts, gpus = rng.randrange(1, 3), rng.randrange(1, 7), rng.randrange(1, 4)
    loads = hostile_array(rng, layers, experts)
    found = move_frontier(loads, any_placement(rng, layers, experts, gpus), rng.choice((1, 1, 1, 2, *NUMBERS)))
    for point in range(len(found.moves)):
        is_right(found.placement(point), loads)
    assert (np.diff(found.balancedness) >= 0).all()
    return found.moves.tolist(), found.balancedness.tolist()


def run_tracker(rng: random.Random, folder: Path) -> object:
    layers, experts = rng.randrange(1, 3), rng.randrange(1, 5)
    some = [rng.choice((2, 2, *NUMBERS)) if rng.random() < 0.2 else 2 for _ in range(2)]
    trackers = []
    for _ in range(2):
        decay = (
            rng.choice((None, None, 0.5)) if rng.random() < 0.8 else rng.choice((0, 1, -1, "x", float("nan"), 10**400))
        )
        tracker = LoadTracker(layers, experts, *some, decay)
        for _ in range(rng.randrange(4)):
            tracker.add(hostile_array(rng, layers, experts))
        trackers.append(tracker)
    merged = LoadTracker.merge(rng.choice((trackers, trackers[:1], [])))
    loads = merged.loads()
    assert loads.shape == (layers, experts)
    assert (np.isfinite(loads) & (loads >= 0)).all()
    merged.save(folder / "tracker.npz")
    assert LoadTracker.load(folder / "tracker.npz").loads() == pytest.approx(loads)
    return loads.tolist()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Cut off, with other bytes in it, empty, or whole."""
    match rng.randrange(5):
        case 0:
            return data[: rng.randrange(len(data) + 1)]
        case 1:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                if changed:
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)
        case 2:
            return rng.choice(
                (b"", b"\0", b"PK\x03\x04", b"\x93NUMPY", b"[", b"\xff\xfe", b"[[1e999, 1]]", b"[[" * 5000)
            )
        case _:
            return data


def hostile_file(rng: random.Random, folder: Path, windows: bool) -> Path:
    """A file that may hold loads."""
    layers, experts = rng.randrange(1, 3), rng.randrange(1, 6)
    array: Any = hostile_array(rng, layers, experts)
    if windows and isinstance(array, np.ndarray) and array.ndim == 2:
        array = np.stack([array] * rng.randrange(1, 6))
    suffix = rng.choice((".npy", ".npy", ".npz", ".npz", ".json", ".safetensors", ".pt", ".txt", ""))
    data = io.BytesIO()
    if suffix == ".npy":
        saved = array if isinstance(array, np.ndarray) else usual(rng, layers, experts)
        np.save(data, saved, allow_pickle=True)
    elif suffix == ".npz":
        saved = array if isinstance(array, np.ndarray) else usual(rng, layers, experts)
        names = rng.choice((["loads"], ["a"], ["a", "b"], ["loads", "routes"], ["format", "num_steps", "recent"]))
        np.savez(data, **dict.fromkeys(names, saved))
    else:
        plain = array.tolist() if isinstance(array, np.ndarray) else array
        plain = rng.choice(
            (plain, {"loads": plain}, {"logical_count": plain}, {"load_history": [{"logical_expert_load": plain}]})
        )
        data.write(json.dumps(plain, default=str, skipkeys=True).encode())
    path = folder / f"loads{suffix}"
    path.write_bytes(damaged(rng, data.getvalue()))
    return path


def run_read_loads(rng: random.Random, folder: Path) -> object:
    loads = read_loads(hostile_file(rng, folder, rng.random() < 0.5), rng.choice((None, None, None, "a", "")))
    assert loads.ndim == 3
    assert loads.size > 0
    assert (np.isfinite(loads) & (loads >= 0)).all()
    return np.asarray(loads).tolist()


def run_read_routes(rng: random.Random, folder: Path) -> object:
    routes = read_routes(hostile_file(rng, folder, True))
    assert (routes.ndim, routes.dtype) == (3, np.int64)
    assert routes.min() >= -1
    return routes.tolist()


def run_tracker_file(rng: random.Random, folder: Path) -> object:
    path = folder / "tracker.npz"
    tracker = LoadTracker(rng.randrange(1, 3), 3, 2, 2, rng.choice((None, 0.5)))
    for _ in range(rng.randrange(4)):
        tracker.add(usual(rng, tracker.num_layers, 3))
    tracker.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    if rng.random() < 0.6:
        name = rng.choice(sorted(arrays))
        strange = rng.choice((*FLOATS, *INTS, "x", [], [1, 2], np.zeros((2, 0, 3)), np.zeros((1, 1, 3)), 2**40))
        arrays[name] = np.array(strange) if rng.random() < 0.8 else np.array([strange], dtype=object)
        if rng.random() < 0.2:
            del arrays[name]
    data = io.BytesIO()
    np.savez(data, **arrays)
    path.write_bytes(damaged(rng, data.getvalue()))
    loads = LoadTracker.load(path).loads()
    assert (np.isfinite(loads) & (loads >= 0)).all()
    return loads.tolist()


def run_placement_file(rng: random.Random, folder: Path) -> object:
    placement = any_placement(rng, rng.randrange(1, 3), rng.randrange(1, 6), rng.randrange(1, 4))
    content: Any = json.loads(placement.to_json())
    if rng.random() < 0.6:
        content = {"physical_to_logical_map": placement.physical_to_logical.tolist()}
        content["logical_replica_count"] = placement.logical_count.tolist()
        content["logical_to_physical_map"] = placement.logical_to_physical.tolist()
    if rng.random() < 0.7:
        strange = (
            *FLOATS[:6],
            *INTS,
            *NUMBERS[:8],
            "x",
            None,
            True,
            [],
            [[]],
            [[[]]],
            {},
            [[0, 1], [2]],
            [["0"]],
            [[10**400]],
        )
        key = rng.choice(sorted(content))
        value = content[key]
        if isinstance(value, list) and rng.random() < 0.5:
            row = value[rng.randrange(len(value))]
            row[rng.randrange(len(row))] = rng.choice(strange)
        else:
            content[key] = rng.choice(strange)
    path = folder / "placement.json"
    path.write_bytes(damaged(rng, json.dumps(content).encode()))
    if rng.random() < 0.3:
        found = read_placement(path)
    else:
        gpus = placement.num_gpus if rng.random() < 0.8 else rng.choice(NUMBERS)
        found = read_served(path, gpus, rng.choice((1, 1, 1, 2, *NUMBERS)))
    is_right(found)
    return found.physical_to_logical.tolist()


def run_replay(rng: random.Random, folder: Path) -> object:
    layers, experts = rng.randrange(1, 3), rng.randrange(1, 6)
    steps = [hostile_array(rng, layers, experts) for _ in range(rng.randrange(4))]
    windows: Any = rng.choice((steps, steps[:1] * 3, rng.choice(ODD)))
    served = replay(windows, rng.choice(("none", "balance", "current", "x", None)), *hostile_sizes(rng, experts))
    assert ((served.balancedness >= 0) & (served.balancedness <= 1)).all()
    return served.balancedness.tolist()


def run_command(rng: random.Random, folder: Path) -> object:
    """The verbs: exit code 0, or 2 with one line."""
    verb = rng.choice(("balance", "replay"))
    file = hostile_file(rng, folder, verb == "replay")
    words = [verb, str(file), "--replicas", str(rng.choice((6, 6, 8, -1, 0, "x", 2**70))), "--gpus", rng.choice("2221")]
    if rng.random() < 0.3:
        words += ["--nodes", rng.choice("123"), "--groups", rng.choice("123")]
    if verb == "balance" and rng.random() < 0.5:
        served = folder / "served.json"
        placement = any_placement(rng, rng.randrange(1, 3), rng.randrange(1, 6), rng.choice((2, 2, 3)))
        served.write_bytes(damaged(rng, placement.to_json().encode()))
        words += ["--current", str(served)]
        words += rng.choice(
            ([], ["--frontier"], ["--lost-gpus", rng.choice(("0", "9", "0,1", ",", "-1"))], ["--max-moves", "1"])
        )
    words += rng.choice(([], ["--json"], ["--key", "a"], ["--routes", str(file)]))
    code = main(words)
    assert code in (0, 2)
    return code


TARGETS: dict[str, Callable[[random.Random, Path], object]] = {
    name.removeprefix("run_"): value for name, value in sorted(globals().items()) if name.startswith("run_")
}


def one_sentence_or_right(target: str, seed: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for _ in range(2):
        refused = False
        try:
            answers.append(TARGETS[target](random.Random(f"{target} {seed}"), folder))
        except PlacementError as error:
            answers.append(str(error))
            refused = True
        except BaseException as error:
            error.add_note(f"{target}, seed {seed}")
            raise
        assert not refused or "\n" not in str(answers[-1]), f"seed {seed}: {answers[-1]}"
        printed = capsys.readouterr()
        if target == "command":
            assert (printed.err.count("\n"), printed.out) == (1, "") if answers[-1] == 2 else printed.err == "", seed
        if seed % 4:  # every fourth one a second time: the same comes out
            return
    assert repr(answers[0]) == repr(answers[1]), f"seed {seed}"


def test_halves_are_loads_like_any_other() -> None:
    is_right(balance(np.ones((2, 4), dtype=np.float16), 4, 2))


@pytest.mark.parametrize("target", TARGETS)
def test_400_hostile_inputs_are_refused_in_a_sentence_or_served_right(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(400 // len(TARGETS) + 1):
        one_sentence_or_right(target, seed, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_10_000_of_them(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(10_000 // len(TARGETS) + 1):
        one_sentence_or_right(target, seed, tmp_path, capsys)
