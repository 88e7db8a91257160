"""``balance`` as a policy of vLLM's expert load balancer, which moves few weights; needs neither vLLM nor torch."""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.balance import balance
from counterflow.experts.loads import Ints, as_loads, is_tensor
from counterflow.experts.migration import plan_migration
from counterflow.experts.placement import Placement

PLUGIN = "counterflow"
"""The name under which vLLM finds this policy among its plugins, and by which ``VLLM_PLUGINS`` asks for it."""


class CounterflowPolicy:
    """A policy with the interface of vLLM's ``AbstractEplbPolicy`` as it is since 0.23: one map is returned.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.vllm_policy import CounterflowPolicy
        >>> old = np.array([[0, 1, 2, 3, 0, 1]])
        >>> CounterflowPolicy.rebalance_experts(np.array([[100, 102, 51, 50]]), 6, 1, 1, 2, old)
        array([[0, 1, 2, 3, 0, 1]])
        >>> CounterflowPolicy.rebalance_experts(np.array([[100, 102, 51, 200]]), 6, 1, 1, 2, old)
        array([[3, 1, 2, 3, 0, 1]])

    Source: vLLM 0.33.0, ``vllm/distributed/eplb/policy/abstract.py``.
    """

    @classmethod
    def rebalance_experts(
        cls,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        """The expert in each slot, int64 [layers, num_replicas], on the device of ``weight`` [layers, experts].

        Groups of experts stay together on a node where ``num_groups`` is a multiple of ``num_nodes``, as in vLLM's own
        policy. ``old_global_expert_indices`` [layers, slots] is what serves now: a layer stays as it is while it is
        as even as the published algorithm would make it, and any other changes as little as it can (see ``balance``).
        Where slots came with new ranks, at the end and filled with -1, the new placement is laid beside the old one
        for the fewest moves. Where experts have no slot, or ranks went, everything is placed anew. The same input
        gives the same map on every rank.

        Raises:
            PlacementError: the loads are none, or the numbers do not divide as they have to.
        """
        return _as_given(
            weight,
            _place(
                weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
            ).physical_to_logical,
        )


class ThreeMapsPolicy(CounterflowPolicy):
    """The same for an older vLLM (0.13 to 0.18), which expects three maps, and may not say what serves now.

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.vllm_policy import ThreeMapsPolicy
        >>> slots, where, count = ThreeMapsPolicy.rebalance_experts(np.array([[90, 132, 40, 61]]), 6, 1, 1, 2)
        >>> slots.shape, where.shape, count.tolist()
        ((1, 6), (1, 4, 3), [[1, 2, 1, 2]])
    """

    @classmethod
    def rebalance_experts(
        cls,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        """Of ``CounterflowPolicy``'s map also the slots of each expert, filled up with -1, and their number."""
        placement = _place(weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices)
        maps = placement.physical_to_logical, placement.logical_to_physical, placement.logical_count
        return tuple(_as_given(weight, each) for each in maps)


def register() -> type[CounterflowPolicy]:
    """Make vLLM's load balancer in this process use ``balance`` wherever its policy is the default one.

    vLLM's configuration allows for no other name than ``default``, so that is the one taken over. It has to happen in
    every process of a server before the model is loaded: ``plugin`` does that.

    Returns:
        The policy that is in vLLM's table now: the one whose result this vLLM expects.

    Raises:
        PlacementError: vLLM is not installed, has no table of policies, or one with another interface.
    """
    try:
        table = importlib.import_module("vllm.distributed.eplb.policy")
    except ImportError as error:
        raise PlacementError(f"vLLM's policies cannot be imported ({error}); install vLLM 0.13 or later") from None
    expected = inspect.signature(table.AbstractEplbPolicy.rebalance_experts)
    offered = inspect.signature(CounterflowPolicy.rebalance_experts)
    names = list(expected.parameters)
    if names not in (list(offered.parameters), list(offered.parameters)[:-1]):
        raise PlacementError(
            f"this vLLM gives its policies ({', '.join(names)}), and ours takes ({', '.join(offered.parameters)}): "
            f"use a vLLM from 0.13 to 0.33, or its own policy"
        )
    policy = ThreeMapsPolicy if "tuple" in str(expected.return_annotation) else CounterflowPolicy
    table.AbstractEplbPolicy.register(policy)
    table.EPLB_POLICIES["default"] = policy
    return policy


def plugin() -> None:
    """What vLLM calls in each of its processes: ``register``, if ``VLLM_PLUGINS`` names this plugin, else nothing.

    vLLM loads every plugin that is installed, and nobody's placement should change because a package is there.

    Raises:
        PlacementError: as ``register``.
    """
    if PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(","):
        register()


def _place(weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int, serving: Any) -> Placement:
    load = as_loads(weight)
    sizes = num_replicas, num_ranks, num_nodes, num_groups
    old = None if serving is None else _as_placement(serving, load.shape, num_replicas, num_ranks, num_nodes)
    if old is None:
        return balance(load, *sizes)
    if old.num_gpus == num_ranks:
        return balance(load, *sizes, current=old)
    return plan_migration(old, balance(load, *sizes)).new


def _as_placement(
    serving: Any, shape: tuple[int, ...], num_replicas: int, num_ranks: int, num_nodes: int
) -> Placement | None:
    """What serves now, on the ranks that were there before; None where that says nothing about this layout."""
    slots = np.asarray(serving.detach().cpu() if is_tensor(serving) else serving)
    if slots.shape != (shape[0], num_replicas) or num_replicas % num_ranks:
        return None
    held = (slots >= 0).any(axis=0)
    room = num_replicas // num_ranks
    ranks = int(held.sum()) // room
    try:
        return Placement(slots[:, : ranks * room], shape[1], ranks, num_nodes if ranks == num_ranks else 1)
    except PlacementError:
        return None


def _as_given(weight: Any, array: Ints) -> Any:
    return weight.new_empty(0).long().new_tensor(array) if is_tensor(weight) else array
