"""Recorded steps served again, under one policy of rebalancing or another: how even, how many moves, how long."""

from __future__ import annotations

import math
import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.balance import balance
from counterflow.experts.loads import Floats, Ints, as_loads
from counterflow.experts.migration import plan_migration
from counterflow.experts.placement import Placement, refuse_sizes, whole_number
from counterflow.experts.published import rebalance_experts
from counterflow.experts.tracker import LoadTracker

POLICIES = {
    "none": "the placement that a server starts with, kept",
    "published": "rebalance_experts at every interval, its GPUs as they come",
    "balance": "balance at every interval, its GPUs exchanged for the fewest moves",
    "current": "balance from the placement that serves, with few moves",
    "hindsight": "as balance, for the very steps that are then served: a perfect prediction at the same interval",
    "oracle": "balance for each single step, for the step itself: a perfect prediction, and moves for nothing",
}
"""What each policy does; the last two know the future, and show what a prediction could gain."""
FORESEEING = ("hindsight", "oracle")

STALL_ASSUMES = (
    "the layers move one after the other; in a layer every GPU receives at the same time, each at the whole "
    "bandwidth, and senders keep up; nothing is served meanwhile"
)
"""What ``Replay.stall_s`` takes for granted."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps there are."""


@dataclass(frozen=True)
class ReplaySettings:
    """When a policy rebalances, and out of what, in vLLM's words.

    Every ``step_interval`` steps a rebalance is due, for the loads of a ``LoadTracker`` of ``window_size`` steps, or
    with ``decay``. It is left out where the placement that serves is at least as balanced for those loads, as the mean
    over layers, as ``skip_above``. ``max_moves`` limits each rebalance of the policy ``"current"``, and no other.

    Raises:
        PlacementError: ``skip_above`` is not above 0 and at most 1; the others are judged where they are used.

    Example:
        >>> from counterflow.experts import ReplaySettings
        >>> ReplaySettings(window_size=100, step_interval=300).skip_above
        1.0
    """

    window_size: int = 1000
    step_interval: int = 3000
    decay: float | None = None
    max_moves: int | None = None
    skip_above: float = 1.0

    def __post_init__(self) -> None:
        try:
            fits = 0 < float(self.skip_above) <= 1
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise PlacementError(
                f"skip_above is {reprlib.repr(self.skip_above)}; it has to be a balancedness, above 0 and at most 1"
            )


@dataclass(frozen=True)
class Rebalance:
    """What was done before ``step``, the first one that its placement served.

    ``layers`` have changed: none where it was skipped, or nothing was to gain. ``moves`` are the experts that GPUs
    newly received; ``in_turn`` those of the GPU that receives most, added up over the layers: what has to arrive one
    after the other. ``policy_s`` is the time on the CPU that deciding took.
    """

    step: int
    layers: int
    moves: int
    in_turn: int
    policy_s: float


@dataclass(frozen=True, eq=False)
class Replay:
    """A recording as a policy would have served it.

    ``balancedness``, float64 [steps, layers], is that of each step's own loads under the placement that served it.
    ``slowdown`` is the time of the experts as a multiple of what even GPUs would take, where a layer takes as long
    as its fullest GPU. ``gpu_loads``, float64 [layers, gpus], is what each GPU had to do in all steps together.
    ``due`` holds every rebalance that came due, those that changed nothing among them; ``last`` served at the end.
    """

    policy: str
    balancedness: Floats
    slowdown: float
    gpu_loads: Floats
    due: tuple[Rebalance, ...]
    last: Placement

    @property
    def rebalances(self) -> tuple[Rebalance, ...]:
        """Those that changed a layer."""
        return tuple(each for each in self.due if each.layers)

    @property
    def moves(self) -> int:
        """The experts that GPUs newly received, in all rebalances."""
        return sum(each.moves for each in self.due)

    @property
    def share(self) -> float:
        """The share of all slots that newly received an expert, in the mean rebalance that changed anything."""
        return self.moves / (max(len(self.rebalances), 1) * self.last.physical_to_logical.size)

    @property
    def policy_s(self) -> float:
        """The time on the CPU that deciding took in the median rebalance that came due; 0 where none did.

        In a process that has just begun, compilation is part of single ones.
        """
        return median(each.policy_s for each in self.due) if self.due else 0.0

    def stall_s(self, expert_bytes: float, bytes_per_s: float) -> float:
        """How long all rebalances together hold up the serving, as ``STALL_ASSUMES`` says.

        ``expert_bytes`` are the weights of one expert in one layer, ``bytes_per_s`` what one GPU receives.

        Raises:
            PlacementError: either is no finite number above 0.

        Example:
            >>> from counterflow.experts.replay import ReplaySettings, replay
            >>> served = replay([[[4, 3, 2, 1]]] * 2 + [[[1, 4, 4, 1]]] * 2, "balance", 4, 2, settings=
            ...     ReplaySettings(window_size=1, step_interval=1))
            >>> [rebalance.in_turn for rebalance in served.due], served.stall_s(44e6, 50e9)
            ([1, 0, 1], 0.00176)
        """
        for name, value in (("expert_bytes", expert_bytes), ("bytes_per_s", bytes_per_s)):
            if not (math.isfinite(value) and value > 0):
                raise PlacementError(f"{name} is {reprlib.repr(value)}; it has to be a finite number above 0")
        return sum(each.in_turn for each in self.due) * expert_bytes / bytes_per_s


def replay(
    windows: Any,
    policy: str,
    num_replicas: int,
    num_gpus: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    settings: ReplaySettings | None = None,
    progress: Progress | None = None,
) -> Replay:
    """Serve the recorded ``windows`` [steps, layers, experts] again, with one of the ``POLICIES``.

    All begin with the placement of a server that knows nothing yet (``starting``). A step is served, then the tracker
    takes it in, then a rebalance may be due, which serves from the next step on: but for those that are ``FORESEEING``
    no policy knows of a step before it is served. A rebalance after the last step is left out. Groups are kept on
    nodes where there are several nodes and the groups divide over them, by every policy.

    Steps are looked at one at a time, so that beside the recording (a memory map will do) there is memory for the
    window of the tracker, and 8 bytes for each step and layer.

    Raises:
        PlacementError: the windows are no loads or of another shape, the policy is unknown, or the sizes or settings
            do not fit (see ``balance`` and ``LoadTracker``).

    Example:
        >>> from counterflow.experts.replay import ReplaySettings, replay
        >>> windows = [[[4, 3, 2, 1]], [[4, 4, 1, 1]], [[4, 4, 1, 1]]]
        >>> served = replay(windows, "balance", 4, 2, settings=ReplaySettings(window_size=2, step_interval=1))
        >>> served.balancedness.round(3).tolist(), served.moves
        ([[0.714], [1.0], [1.0]], 2)
    """
    sizes = (num_replicas, num_gpus, num_nodes, num_groups)
    return _Run(_as_recording(windows), policy, sizes, settings or ReplaySettings()).served(progress)


def starting(num_layers: int, num_experts: int, num_replicas: int, num_gpus: int, num_nodes: int = 1) -> Placement:
    """What a server starts with: expert after expert, and from the first one again in the slots that are left.

    With several nodes each of them gets its own experts, in this way.

    Raises:
        PlacementError: the sizes do not divide as they have to.

    Example:
        >>> from counterflow.experts import starting
        >>> starting(1, 4, 6, 2).physical_to_logical.tolist(), starting(1, 4, 6, 2, 2).physical_to_logical.tolist()
        ([[0, 1, 2, 3, 0, 1]], [[0, 1, 0, 2, 3, 2]])
    """
    sizes = (num_layers, num_experts, num_replicas, num_gpus, num_nodes)
    for name, size in zip(("num_layers", "num_experts", "num_replicas", "num_gpus", "num_nodes"), sizes, strict=True):
        whole_number(name, size)
    refuse_sizes(num_experts, num_replicas, num_gpus, num_nodes, num_nodes)
    node, slot = np.divmod(np.arange(num_replicas), num_replicas // num_nodes)
    own = num_experts // num_nodes
    slots = np.tile(node * own + slot % own, (num_layers, 1))
    return Placement(slots, num_experts, num_gpus, num_nodes)


def _as_recording(windows: Any) -> Any:
    try:
        recording = np.asarray(windows)
    except (ValueError, TypeError) as error:
        raise PlacementError(
            f"the windows are no array ({' '.join(str(error).split())}); give [steps, layers, experts]"
        ) from None
    if recording.ndim != 3 or len(recording) == 0:
        raise PlacementError(
            f"the windows have shape {list(recording.shape)}; they have to be [steps, layers, experts] with at least "
            f"one step"
        )
    return recording


class _Run:
    """One pass over a recording: the placement that serves, and how it is replaced."""

    def __init__(self, recording: Any, policy: str, sizes: tuple[int, int, int, int], settings: ReplaySettings) -> None:
        if policy not in POLICIES:
            raise PlacementError(f"the policy is {reprlib.repr(policy)}; it has to be one of {', '.join(POLICIES)}")
        self.recording, self.policy, self.sizes, self.settings = recording, policy, sizes, settings
        layers, experts = recording.shape[1:]
        replicas, gpus, nodes, _ = sizes
        fits = balance(self._step(0), *sizes)  # says what does not fit, and whether groups stay on nodes
        self.by_node = fits.hierarchy == "node"
        start = starting(layers, experts, replicas, gpus, nodes if self.by_node else 1)
        self.serving = replace(start, num_nodes=nodes, hierarchy=fits.hierarchy)

    def served(self, progress: Progress | None) -> Replay:
        """All steps, one after the other."""
        steps, layers, experts = self.recording.shape
        settings, oracle = self.settings, self.policy == "oracle"
        tracker = LoadTracker(layers, experts, settings.window_size, settings.step_interval, settings.decay)
        even = np.empty((steps, layers))
        gpu_loads = np.zeros((layers, self.serving.num_gpus))
        fullest, due = 0.0, list[Rebalance]()
        for step in range(steps):
            counts = self._step(step)
            if oracle:
                self.serving = balance(counts, *self.sizes)
            loads = self.serving.gpu_loads(counts)
            even[step] = self.serving.balancedness(counts)
            gpu_loads += loads
            fullest += float(loads.max(axis=1).sum())
            tracker.add(counts)
            if tracker.due() and step + 1 < steps and self.policy not in ("none", "oracle"):
                due.append(self._rebalance(step + 1, tracker))
            if progress is not None:
                progress(step + 1, steps)
        mean = float(gpu_loads.mean(axis=1).sum())
        even.setflags(write=False)
        gpu_loads.setflags(write=False)
        slowdown = max(fullest / mean, 1.0) if mean else 1.0
        return Replay(self.policy, even, slowdown, gpu_loads, tuple(due), self.serving)

    def _step(self, step: int) -> Floats:
        try:
            return as_loads(self.recording[step])
        except PlacementError as error:
            raise PlacementError(f"step {step}: {error}") from None

    def _rebalance(self, step: int, tracker: LoadTracker) -> Rebalance:
        """Change what serves from ``step`` on."""
        loads = tracker.loads()
        if self.policy == "hindsight":
            loads = np.sum(self.recording[step : step + tracker.step_interval], axis=0, dtype=np.float64)
        old = self.serving
        started = time.process_time()
        if old.balancedness(loads).mean() < self.settings.skip_above - 1e-12:
            self.serving = self._decide(loads)
        policy_s = time.process_time() - started
        come = arrivals(old, self.serving)
        changed = (old.physical_to_logical != self.serving.physical_to_logical).any(axis=1)
        return Rebalance(step, int(changed.sum()), int(come.sum()), int(come.max(axis=1).sum()), policy_s)

    def _decide(self, loads: Floats) -> Placement:
        replicas, gpus, nodes, groups = self.sizes
        if self.policy == "published":
            sizes = (groups, nodes) if self.by_node else (1, 1)
            slots, _, _ = rebalance_experts(loads, replicas, *sizes, gpus)
            return Placement(slots.astype(np.int64), loads.shape[1], gpus, nodes, self.serving.hierarchy)
        if self.policy == "current":
            new = balance(loads, *self.sizes, current=self.serving, max_moves=self.settings.max_moves)
        else:
            new = balance(loads, *self.sizes)
        return plan_migration(self.serving, new).new


def arrivals(old: Placement, new: Placement) -> Ints:
    """How many experts every GPU of ``new`` receives that it did not hold in ``old``, int64 [layers, gpus].

    GPUs keep their numbers here; a copy that comes beside another one on its GPU is none.

    Example:
        >>> from counterflow import Placement
        >>> arrivals(Placement([[0, 1, 2, 0]], 3, 2), Placement([[2, 0, 1, 1]], 3, 2)).tolist()
        [[1, 1]]
    """
    row = np.arange(new.num_layers * new.num_gpus)[:, None] * new.num_experts
    held, wanted = (np.unique(each.physical_to_logical.reshape(len(row), -1) + row) for each in (old, new))
    come = wanted[~np.isin(wanted, held, assume_unique=True)]
    return np.bincount(come // new.num_experts, minlength=len(row)).reshape(new.num_layers, new.num_gpus)
