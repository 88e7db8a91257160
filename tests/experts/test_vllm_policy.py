"""The policy for vLLM: called as vLLM calls it, it hands back valid maps, the same on every rank, and moves little."""

import importlib.util
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow import balance, plan_migration, rebalance_experts
from counterflow.errors import PlacementError
from counterflow.experts import Placement
from counterflow.experts.vllm_policy import CounterflowPolicy, ThreeMapsPolicy, plugin, register

LAYERS, EXPERTS, SLOTS, RANKS = 3, 8, 12, 4


class Server:
    """As much of vLLM 0.33's load balancer as calls a policy: its state, and one rearrangement of it."""

    def __init__(self, policy: Any, num_groups: int = 1, num_nodes: int = 1) -> None:
        self.policy, self.num_groups, self.num_nodes = policy, num_groups, num_nodes
        first = torch.arange(SLOTS) % EXPERTS
        self.physical_to_logical_map = first.repeat(LAYERS, 1)

    def rearrange(self, load: torch.Tensor, ranks: int = RANKS) -> torch.Tensor:
        slots = self.physical_to_logical_map.shape[1]
        new = self.policy.rebalance_experts(
            load.cpu(), slots, self.num_groups, self.num_nodes, ranks, self.physical_to_logical_map.cpu()
        )
        assert new.device == torch.device("cpu")
        assert (new.dtype, new.shape) == (torch.int64, (LAYERS, slots))
        for row in new.tolist():
            assert set(row) == set(range(EXPERTS))
        self.physical_to_logical_map = new
        return new

    def grow(self, ranks: int) -> None:
        """Slots of new ranks come at the end, and hold nothing yet."""
        empty = torch.full((LAYERS, ranks * SLOTS // RANKS), -1)
        self.physical_to_logical_map = torch.cat([self.physical_to_logical_map, empty], dim=1)


def drifting(seed: int, steps: int) -> Iterator[torch.Tensor]:
    """Loads as vLLM counts them: int32, the sum over a window."""
    rng = np.random.default_rng(seed)
    log = rng.normal(0, 1, (LAYERS, EXPERTS))
    for _ in range(steps):
        log += rng.normal(0, 0.1, log.shape)
        yield torch.tensor((1000 * np.exp(log)).astype(np.int32))


def moved(before: torch.Tensor, after: torch.Tensor) -> int:
    room = SLOTS // RANKS
    pairs = zip(before.reshape(-1, room).tolist(), after.reshape(-1, room).tolist(), strict=True)
    return sum(len({*new} - {*old}) for old, new in pairs)


def evenness(slots: torch.Tensor, load: torch.Tensor) -> np.ndarray:
    return Placement(slots, EXPERTS, slots.shape[1] * RANKS // SLOTS).balancedness(load)


# --- as vLLM calls it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (4, 2), (3, 2)])
def test_through_a_drift_it_is_as_even_as_the_published_algorithm_and_moves_less(groups: int, nodes: int) -> None:
    server = Server(CounterflowPolicy, groups, nodes)
    ours, published = [], []
    for load in drifting(0, 6):
        ours.append(server.rearrange(load))
        published.append(rebalance_experts(load, SLOTS, groups, nodes, RANKS)[0])
        assert (evenness(ours[-1], load) >= evenness(published[-1], load) - 1e-9).all()
    assert sum(map(moved, ours, ours[1:])) < sum(map(moved, published, published[1:]))


def test_what_serves_is_left_alone_while_it_is_as_even_as_the_published_algorithm_would_make_it() -> None:
    server = Server(CounterflowPolicy)
    (load,) = drifting(1, 1)
    first = server.rearrange(load)
    assert torch.equal(server.rearrange(load), first)


@given(st.integers(0, 2**32 - 1))
def test_every_rank_computes_the_same_map(seed: int) -> None:
    (load,) = drifting(seed, 1)
    ranks = [Server(CounterflowPolicy).rearrange(load) for _ in range(2)]
    assert torch.equal(*ranks)


def test_the_call_without_load_by_which_vllm_measures_memory_is_answered() -> None:
    server = Server(CounterflowPolicy)
    before = server.physical_to_logical_map
    assert torch.equal(server.rearrange(torch.zeros(LAYERS, EXPERTS, dtype=torch.int32)), before)


def test_without_a_map_that_serves_it_is_balance() -> None:
    (load,) = drifting(2, 1)
    slots = CounterflowPolicy.rebalance_experts(load, SLOTS, 4, 2, RANKS)
    assert slots.tolist() == balance(load, SLOTS, RANKS, 2, 4).physical_to_logical.tolist()


def test_after_ranks_came_the_new_placement_is_laid_beside_the_old_one() -> None:
    server = Server(CounterflowPolicy)
    load, later = drifting(3, 2)
    old = Placement(server.rearrange(load), EXPERTS, RANKS)
    server.grow(2)
    after = server.rearrange(later, RANKS + 2)
    plan = plan_migration(old, balance(later, SLOTS * 6 // 4, RANKS + 2))
    assert after.tolist() == plan.new.physical_to_logical.tolist()


def test_after_ranks_went_or_an_expert_was_lost_everything_is_placed_anew() -> None:
    (load,) = drifting(4, 1)
    wide = torch.arange(SLOTS + 3).remainder(EXPERTS).repeat(LAYERS, 1)
    lost = torch.zeros(LAYERS, SLOTS, dtype=torch.int64)
    half = torch.where(torch.arange(SLOTS) % 3 == 0, -1, torch.arange(SLOTS) % EXPERTS).repeat(LAYERS, 1)
    anew = CounterflowPolicy.rebalance_experts(load, SLOTS, 1, 1, RANKS)
    for serving in (wide, lost, half):
        assert torch.equal(CounterflowPolicy.rebalance_experts(load, SLOTS, 1, 1, RANKS, serving), anew)


def test_an_older_vllm_gets_the_other_two_maps_as_well() -> None:
    (load,) = drifting(5, 1)
    slots, where, count = ThreeMapsPolicy.rebalance_experts(load, SLOTS, 1, 1, RANKS)
    assert torch.equal(slots, CounterflowPolicy.rebalance_experts(load, SLOTS, 1, 1, RANKS))
    assert where.shape == (LAYERS, EXPERTS, SLOTS - EXPERTS + 1)  # what vLLM's buffers are made for
    assert {each.dtype for each in (slots, where, count)} == {torch.int64}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            held = (slots[layer] == expert).nonzero().flatten().tolist()
            assert where[layer, expert].tolist() == held + [-1] * (where.shape[2] - len(held))
            assert count[layer, expert] == len(held)


# --- its place in vLLM --------------------------------------------------------------------------------------


class Abstract(ABC):
    """The interface of vLLM 0.23 to 0.33."""

    @classmethod
    @abstractmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError


class AbstractOfThreeMaps(ABC):
    """The interface of vLLM 0.13."""

    @classmethod
    @abstractmethod
    def rebalance_experts(
        cls, weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class AbstractOfTomorrow(ABC):
    @classmethod
    @abstractmethod
    def rebalance_experts(cls, weight: torch.Tensor, topology: object) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that stands where vLLM has its table of policies."""
    table: Any = ModuleType("vllm.distributed.eplb.policy")
    table.AbstractEplbPolicy, table.EPLB_POLICIES = Abstract, {"default": Abstract}
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.distributed.eplb.policy", table)
    return table


POLICIES: dict[type[ABC], type[CounterflowPolicy]] = {
    Abstract: CounterflowPolicy,
    AbstractOfThreeMaps: ThreeMapsPolicy,
}


@pytest.mark.parametrize("interface", POLICIES)
def test_registered_it_stands_in_for_the_default_with_what_this_vllm_expects(vllm: Any, interface: type[ABC]) -> None:
    vllm.AbstractEplbPolicy = interface
    assert register() is POLICIES[interface]
    assert register() is vllm.EPLB_POLICIES["default"]  # plugins may be loaded more than once
    assert list(vllm.EPLB_POLICIES) == ["default"]
    assert issubclass(vllm.EPLB_POLICIES["default"], interface)


def test_an_interface_that_is_not_known_is_refused_and_the_table_left_alone(vllm: Any) -> None:
    vllm.AbstractEplbPolicy = AbstractOfTomorrow
    with pytest.raises(PlacementError, match=r"this vLLM gives its policies \(weight, topology\), and ours takes"):
        register()
    assert dict(vllm.EPLB_POLICIES) == {"default": Abstract}


@pytest.mark.parametrize(
    ("asked", "takes_over"), [(None, False), ("", False), ("other", False), ("other,counterflow", True)]
)
def test_as_a_plugin_it_takes_over_only_where_it_is_named(
    vllm: Any, monkeypatch: pytest.MonkeyPatch, asked: str | None, takes_over: bool
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_PLUGINS", asked)
    plugin()
    assert (vllm.EPLB_POLICIES["default"] is CounterflowPolicy) == takes_over


def test_without_vllm_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PlacementError, match=r"vLLM's policies cannot be imported \(.*\); install vLLM 0\.13 or later"):
        register()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_installed_vllm_has_the_interface_that_is_offered() -> None:
    table = importlib.import_module("vllm.distributed.eplb.policy")
    before = dict(table.EPLB_POLICIES)
    try:
        offered = inspect.signature(register().rebalance_experts)
    finally:
        table.EPLB_POLICIES.update(before)
    expected = inspect.signature(table.AbstractEplbPolicy.rebalance_experts)
    for mine, theirs in zip(offered.parameters.values(), expected.parameters.values(), strict=False):
        assert (mine.name, mine.kind, mine.default) == (theirs.name, theirs.kind, theirs.default)


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (found,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "counterflow"]
    assert found.load() is plugin
