"""Replay: the obvious loop gives the same, no policy sees the future, and what figures say is what was counted."""

import math
import re
import tracemalloc
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from counterflow import LoadTracker, Placement, balance, loops, plan_migration, rebalance_experts
from counterflow.errors import PlacementError
from counterflow.experts import POLICIES, Replay, ReplaySettings, replay, replicas, starting
from counterflow.experts.replay import FORESEEING, arrivals

Sizes = tuple[int, int, int, int]
RNG = np.random.default_rng(5)
DRIFTING = np.rint(np.exp(np.cumsum(RNG.normal(0, 0.4, (24, 3, 12)), axis=0)) * 100)
OFTEN = ReplaySettings(window_size=4, step_interval=3)
BLIND = [name for name in POLICIES if name not in FORESEEING]


@st.composite
def recordings(draw: st.DrawFn) -> tuple[np.ndarray, Sizes]:
    nodes = draw(st.sampled_from([1, 2]))
    gpus, groups = nodes * draw(st.integers(1, 3)), nodes * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 3))
    replicas = gpus * (-(-experts // gpus) + draw(st.integers(0, 2)))
    shape = (draw(st.integers(1, 7)), draw(st.integers(1, 2)), experts)
    return draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 30))), (replicas, gpus, nodes, groups)


# --- the obvious loop ---------------------------------------------------------------------------------------


class Slow(NamedTuple):
    """What the reference found."""

    balancedness: list[list[float]]
    slowdown: float
    rebalances: list[tuple[int, int, int]]


def reference(windows: np.ndarray, policy: str, sizes: Sizes, chosen: ReplaySettings) -> Slow:
    """Everything counted anew from the whole history, GPU by GPU."""
    serving = start_of(windows, sizes)
    even, rebalances, fullest, mean = [], [], 0.0, 0.0
    for step, counts in enumerate(windows):
        if policy == "oracle":
            serving = balance(counts, *sizes)
        loads = [gpu_loads(serving, layer, counts[layer].tolist()) for layer in range(len(counts))]
        even.append([sum(row) / len(row) / max(row) if max(row) else 1.0 for row in loads])
        fullest += sum(max(row) for row in loads)
        mean += sum(sum(row) / len(row) for row in loads)
        last = step + 1 == len(windows)
        if policy in ("none", "oracle") or last or (step + 1) % chosen.step_interval:
            continue
        known = windows[max(0, step + 1 - chosen.window_size) : step + 1]
        if policy == "hindsight":
            known = windows[step + 1 : step + 1 + chosen.step_interval]
        new = decided(policy, known.sum(axis=0), serving, sizes, chosen)
        come = [newly_held(serving, new, layer) for layer in range(len(counts))]
        rebalances.append((step + 1, sum(map(sum, come)), sum(map(max, come))))
        serving = new
    return Slow(even, fullest / mean if mean else 1.0, rebalances)


def start_of(windows: np.ndarray, sizes: Sizes) -> Placement:
    _, layers, experts = windows.shape
    replicas, gpus, nodes, groups = sizes
    by_node = nodes > 1 and groups % nodes == 0
    parts = nodes if by_node else 1
    own, room = experts // parts, replicas // parts
    row = [part * own + slot % own for part in range(parts) for slot in range(room)]
    return Placement([row] * layers, experts, gpus, nodes, "node" if by_node else "none")


def decided(policy: str, loads: np.ndarray, serving: Placement, sizes: Sizes, chosen: ReplaySettings) -> Placement:
    replicas, gpus, nodes, groups = sizes
    if serving.balancedness(loads).mean() >= chosen.skip_above - 1e-12:
        return serving
    if policy == "published":
        grouping = (groups, nodes) if serving.hierarchy == "node" else (1, 1)
        slots, _, _ = rebalance_experts(loads, replicas, *grouping, gpus)
        return Placement(slots, loads.shape[1], gpus, nodes, serving.hierarchy)
    if policy == "current":
        new = balance(loads, *sizes, current=serving, max_moves=chosen.max_moves)
    else:
        new = balance(loads, *sizes)
    return plan_migration(serving, new).new


def gpu_loads(placement: Placement, layer: int, load: list[float]) -> list[float]:
    slots = placement.physical_to_logical[layer].tolist()
    room = len(slots) // placement.num_gpus
    share = [load[expert] / slots.count(expert) for expert in slots]
    return [sum(share[gpu * room : (gpu + 1) * room]) for gpu in range(placement.num_gpus)]


def held(placement: Placement, layer: int) -> list[set[int]]:
    rows = placement.physical_to_logical[layer].reshape(placement.num_gpus, -1).tolist()
    return [set(row) for row in rows]


def newly_held(old: Placement, new: Placement, layer: int) -> list[int]:
    return [len(after - before) for before, after in zip(held(old, layer), held(new, layer), strict=True)]


@settings(max_examples=60)
@given(
    recordings(),
    st.sampled_from(sorted(POLICIES)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([1.0, 0.8]),
)
def test_it_is_what_the_obvious_loop_finds(
    recording: tuple[np.ndarray, Sizes], policy: str, window: int, interval: int, moves: int | None, skip: float
) -> None:
    windows, sizes = recording
    compare(windows, policy, sizes, ReplaySettings(window, interval, None, moves, skip))


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_what_the_obvious_loop_finds_where_much_moves(policy: str) -> None:
    for sizes in ((16, 4, 1, 1), (16, 4, 2, 4), (20, 5, 1, 1)):
        compare(DRIFTING, policy, sizes, OFTEN)


def compare(windows: np.ndarray, policy: str, sizes: Sizes, chosen: ReplaySettings) -> None:
    served, slow = replay(windows, policy, *sizes, chosen), reference(windows, policy, sizes, chosen)
    np.testing.assert_allclose(served.balancedness, slow.balancedness, rtol=1e-12)
    assert served.slowdown == pytest.approx(slow.slowdown, rel=1e-12)
    assert [(each.step, each.moves, each.in_turn) for each in served.due] == slow.rebalances


# --- the future ---------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.sampled_from(BLIND), st.integers(1, 23), st.integers(0, 2**32 - 1))
def test_no_policy_but_the_foreseeing_ones_knows_a_step_before_it_is_served(policy: str, step: int, seed: int) -> None:
    other = DRIFTING.copy()
    other[step:] = np.random.default_rng(seed).integers(0, 900, other[step:].shape)
    one, two = (replay(windows, policy, 16, 4, settings=OFTEN) for windows in (DRIFTING, other))
    assert (one.balancedness[:step] == two.balancedness[:step]).all()
    known = [
        [(each.step, each.moves, each.layers) for each in served.due if each.step <= step] for served in (one, two)
    ]
    assert known[0] == known[1]


def test_a_step_is_served_by_what_was_placed_before_it_came() -> None:
    """Two kinds of steps in turn: who knows only the last one is always wrong, who knows the next one never."""
    one, other = [8, 6, 1, 3], [8, 6, 3, 1]  # only 8 beside 1 and 6 beside 3 is even
    windows = np.array([[one], [other]] * 3)
    chosen = ReplaySettings(window_size=1, step_interval=1)
    late, knowing = (replay(windows, policy, 4, 2, settings=chosen) for policy in ("balance", "hindsight"))
    assert late.balancedness[1:].ravel().tolist() == [9 / 11] * 5
    assert knowing.balancedness[1:].ravel().tolist() == [1.0] * 5


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_exceeds_the_bound_of_any_step(policy: str) -> None:
    served = replay(DRIFTING, policy, 16, 4, settings=OFTEN)
    for counts, even in zip(DRIFTING, served.balancedness, strict=True):
        certificate = balance(counts, 16, 4).certificate
        assert certificate is not None
        assert (even <= counts.sum(axis=1) / 4 / certificate.max_load_bound * (1 + 1e-12)).all()


def test_the_oracle_is_balance_of_every_single_step() -> None:
    served = replay(DRIFTING, "oracle", 16, 4)
    assert served.due == ()
    assert served.balancedness.tolist() == [balance(each, 16, 4).balancedness(each).tolist() for each in DRIFTING]


# --- when it rebalances, and what moves ---------------------------------------------------------------------


def test_until_the_first_rebalance_all_serve_with_the_placement_that_a_server_starts_with() -> None:
    start = starting(3, 12, 16, 4)
    assert start.physical_to_logical[0].tolist() == [*range(12), 0, 1, 2, 3]
    for policy in BLIND:
        served = replay(DRIFTING, policy, 16, 4, settings=ReplaySettings(step_interval=10))
        assert served.balancedness[:10].tolist() == [start.balancedness(each).tolist() for each in DRIFTING[:10]]
    assert replay(DRIFTING, "none", 16, 4).last.physical_to_logical.tolist() == start.physical_to_logical.tolist()


def test_a_rebalance_comes_due_at_every_interval_but_not_after_the_last_step() -> None:
    served = replay(DRIFTING, "published", 16, 4, settings=ReplaySettings(step_interval=6))
    assert [each.step for each in served.due] == [6, 12, 18]


def test_it_learns_from_the_window_or_from_the_average() -> None:
    for chosen in (OFTEN, ReplaySettings(step_interval=3, decay=0.7)):
        tracker = LoadTracker(3, 12, chosen.window_size, chosen.step_interval, chosen.decay)
        for counts in DRIFTING[:21]:
            tracker.add(counts)
        wanted, _, _ = rebalance_experts(tracker.loads(), 16, 1, 1, 4)
        last = replay(DRIFTING, "published", 16, 4, settings=chosen).last
        assert last.physical_to_logical.tolist() == wanted.tolist()


def test_what_is_balanced_enough_is_left_alone() -> None:
    served = replay(DRIFTING, "balance", 16, 4, settings=ReplaySettings(4, 3, skip_above=0.1))
    assert (served.moves, served.rebalances, len(served.due)) == (0, (), 7)
    some = replay(DRIFTING, "balance", 16, 4, settings=ReplaySettings(4, 3, skip_above=0.75))
    assert 0 < len(some.rebalances) < len(some.due)
    assert all(each.moves == each.in_turn == 0 for each in some.due if not each.layers)


def test_steady_loads_are_rebalanced_once() -> None:
    steady = np.repeat(DRIFTING[:1], 12, axis=0)
    for policy in ("published", "balance", "current"):
        served = replay(steady, policy, 16, 4, settings=ReplaySettings(2, 2))
        assert [each.step for each in served.rebalances] == [2]


def test_from_the_current_placement_less_moves_and_at_most_what_is_allowed() -> None:
    anew, few = (replay(DRIFTING, policy, 16, 4, settings=OFTEN) for policy in ("balance", "current"))
    assert 0 < few.moves < anew.moves
    limited = replay(DRIFTING, "current", 16, 4, settings=ReplaySettings(4, 3, max_moves=2))
    assert all(each.moves <= 2 for each in limited.due)
    assert limited.moves < few.moves


@pytest.mark.parametrize("policy", POLICIES)
def test_groups_stay_on_nodes_under_every_policy(policy: str) -> None:
    last = replay(DRIFTING, policy, 16, 4, 2, 4, OFTEN).last
    assert last.hierarchy == "node"
    for row in last.physical_to_logical.reshape(3, 2, 8):
        first, second = ({expert // 3 for expert in node.tolist()} for node in row)
        assert first.isdisjoint(second)


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_arrivals_are_counted_as_a_migration_counts_its_moves(random: Any) -> None:
    old, new = (
        Placement([random.sample([*range(6), *random.choices(range(6), k=2)], 8) for _ in range(2)], 6, 4)
        for _ in range(2)
    )
    plan = plan_migration(old, new)
    assert arrivals(old, plan.new).sum(axis=1).tolist() == plan.moves.tolist()
    assert [arrivals(old, new)[layer].tolist() for layer in range(2)] == [newly_held(old, new, k) for k in range(2)]


# --- figures ------------------------------------------------------------------------------------------------


def test_a_stall_is_what_arrives_one_after_the_other_over_the_bandwidth() -> None:
    served = replay(DRIFTING, "published", 16, 4, settings=OFTEN)
    in_turn = sum(each.in_turn for each in served.due)
    assert served.moves / 4 <= in_turn <= served.moves
    assert served.stall_s(2e6, 1e9) == pytest.approx(in_turn * 2e6 / 1e9)
    assert replay(DRIFTING, "none", 16, 4).stall_s(2e6, 1e9) == 0


def test_the_share_is_of_all_slots_in_the_mean_rebalance() -> None:
    served = replay(DRIFTING, "published", 16, 4, settings=OFTEN)
    assert served.share == pytest.approx(served.moves / len(served.rebalances) / (3 * 16))
    assert replay(DRIFTING, "none", 16, 4).share == 0


def test_gpu_loads_are_what_each_gpu_did_in_all_steps() -> None:
    served = replay(DRIFTING, "none", 16, 4)
    np.testing.assert_allclose(served.gpu_loads, starting(3, 12, 16, 4).gpu_loads(DRIFTING.sum(axis=0)))
    moved = replay(DRIFTING, "balance", 16, 4, settings=OFTEN)
    np.testing.assert_allclose(moved.gpu_loads.sum(axis=1), DRIFTING.sum(axis=(0, 2)))


def test_steps_without_load_are_even() -> None:
    served = replay(np.zeros((5, 2, 4)), "balance", 4, 2, settings=ReplaySettings(2, 2))
    assert served.balancedness.tolist() == [[1.0, 1.0]] * 5
    assert (served.slowdown, served.moves) == (1.0, 0)


def test_a_result_does_not_change() -> None:
    served = replay(DRIFTING, "none", 16, 4)
    with pytest.raises(ValueError, match="read-only"):
        served.balancedness[0] = 0
    with pytest.raises(AttributeError):
        served.slowdown = 1.0  # type: ignore[misc]


def test_a_long_recording_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loops, replicas):  # else it depends on earlier tests which of both replays compiles
        monkeypatch.setattr(module, "COMPILED_FROM", 0)
    long = np.ones((800, 4, 128), dtype=np.uint8)
    settings = ReplaySettings(window_size=10, step_interval=500)
    replay(long, "published", 128, 4, settings=settings)  # the first one also imports and compiles
    tracemalloc.start()
    replay(long, "published", 128, 4, settings=settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < long.size * 8 / 4


def test_progress_is_told_step_by_step() -> None:
    told: list[tuple[int, int]] = []
    replay(DRIFTING, "current", 16, 4, settings=OFTEN, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 24) for done in range(1, 25)]


# --- what is refused ----------------------------------------------------------------------------------------


def served(**changed: Any) -> Replay:
    asked: dict[str, Any] = {"windows": DRIFTING, "policy": "balance", "num_replicas": 16, "num_gpus": 4, **changed}
    return replay(**asked)


def broken(value: float) -> np.ndarray:
    windows = DRIFTING.copy()
    windows[7, 1, 2] = value
    return windows


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"windows": broken(math.nan)}, "step 7: the load of expert 2 in layer 1 is nan"),
        ({"windows": broken(math.inf)}, "step 7: the load of expert 2 in layer 1 is inf"),
        ({"windows": broken(-1)}, "step 7: the load of expert 2 in layer 1 is -1.0"),
        ({"windows": broken(1e39)}, "step 7: the load of expert 2 in layer 1 is 1e+39"),
        ({"windows": DRIFTING[0]}, "the windows have shape [3, 12]; they have to be [steps, layers, experts]"),
        ({"windows": DRIFTING[:0]}, "the windows have shape [0, 3, 12]"),
        ({"windows": DRIFTING[:, :0]}, "step 0: the loads have 0 layers and 12 experts"),
        ({"windows": [[[1, 2], [3]]]}, "the windows are no array"),
        ({"policy": "best"}, "the policy is 'best'; it has to be one of none, published, balance, current, hindsight"),
        ({"num_replicas": 8}, "8 replicas cannot hold 12 experts"),
        ({"num_gpus": 5}, "16 replicas do not divide over 5 GPUs"),
        ({"settings": ReplaySettings(step_interval=0)}, "step_interval is 0"),
        ({"settings": ReplaySettings(decay=1.0)}, "the decay is 1.0"),
        ({"policy": "current", "settings": ReplaySettings(4, 3, max_moves=-1)}, "max_moves is -1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=re.escape(message)):
        served(**changed)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 4, 6, 0), "num_gpus is 0"),
        ((0, 4, 6, 2), "num_layers is 0"),
        ((3, 4, 7, 2), "7 replicas do not divide over 2 GPUs"),
        ((3, 5, 6, 2, 2), "5 experts do not divide into 2 groups"),
    ],
)
def test_a_server_starts_with_sizes_that_divide(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        starting(*sizes)


@pytest.mark.parametrize("value", [0, -0.5, 1.5, math.nan, "much"])
def test_what_is_balanced_enough_has_to_be_a_balancedness(value: Any) -> None:
    with pytest.raises(PlacementError, match=r"skip_above is .*; it has to be a balancedness"):
        ReplaySettings(skip_above=value)


@pytest.mark.parametrize(("size", "speed", "name"), [(0, 1, "expert_bytes"), (1, math.inf, "bytes_per_s")])
def test_a_stall_needs_real_sizes_and_speeds(size: float, speed: float, name: str) -> None:
    with pytest.raises(PlacementError, match=rf"{name} is .*; it has to be a finite number above 0"):
        served().stall_s(size, speed)
