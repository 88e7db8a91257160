"""Phases where nobody annotated any: what each compute kernel is part of, by its neighbours in order of launch.

A kernel's name hints at a part or a direction, or at nothing (``hints``); in a trace of forwards alone a product's
neighbours tell what it is for (``products``). Along the order in which the kernels were launched, the sequence of
states is found that agrees best with all of this, where every change of state costs: less at what often is an edge (a
norm, a pause in launching, in a graph one of the GPU, another thread, communication that began in between).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import GpuWork, Ints
from counterflow.trace.hints import Hint
from counterflow.trace.products import OF_MLP, OF_ROUTER, UNKNOWN, products_of

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

STATES = ("attention(F)", "attention(B)", "experts(F)", "experts(B)", "W", "other")
"""A gradient of weights is told by its kernels; of which part it is, they do not tell."""

ATTENTION_F, ATTENTION_B, EXPERTS_F, EXPERTS_B, WEIGHTS, OTHER = range(len(STATES))
UNTOLD = -1

_FARTHEST = 96
"""A kernel so many kernels away from the next hint is of no known phase."""

_CHANGE, _EDGE, _LEAST = 3.0, 1.0, 0.5
PAUSE = 4  # times the median between two launches

_PART = {"core": 5.0, "routed": 4.0, "attention": 3.0, "experts": 3.0, "router": 2.0, "other": 3.0}
_DIRECTION = {"B": 4.0, "W": 2.0}
_THREAD = 1.0
_PRODUCT = 2.0
_UNTOLD_BACKWARD = -0.02  # a backward shows itself: a long stretch without a sign of one is none
# Attention is seldom recomputed in a backward, activations sometimes, norms often.
_FORWARD = {"attention": 2.0, "experts": 1.2}
_OTHER_FORWARD = 0.5


def states_of(
    work: GpuWork, hints: Mapping[int, Hint], launched: Ints, thread: Ints, edge: Bools, dispatches: bool
) -> Ints:
    """For each compute kernel, in the order of launch, the index of its state in ``STATES``, UNTOLD where unknown.

    Args:
        work: the kernels, in the order of their launch.
        hints: what each name hints at.
        launched: when each was launched, in ns [kernels]; -1 where not told.
        thread: what launched each [kernels]; -1 where not told.
        edge: whether communication began since the kernel before [kernels].
        dispatches: whether tokens are sent to experts: then the router stands before that, with attention.
    """
    used, place = np.unique(work.name, return_inverse=True)
    own = [hints[one] for one in used.tolist()]
    if not _has_model(own):
        return np.full(len(work), UNTOLD, dtype=np.int64)
    weights = np.array([_weights(hint, dispatches) for hint in own])[place]
    each = [own[one] for one in place.tolist()]
    sure = weights + _of_threads(thread, each)
    if not any(hint.direction == "B" for hint in own):
        sure += _of_products(products_of(work, each), dispatches)
    path = best_path(sure, _costs(each, work, launched, thread, edge))
    hinted = np.abs(weights).max(axis=1) > -_UNTOLD_BACKWARD
    path = np.where(_too_far(hinted), UNTOLD, path)
    return np.asarray(np.where(path == OTHER, UNTOLD, path), dtype=np.int64)


def _has_model(hints: Iterable[Hint]) -> bool:
    """Attention and something like a multi-layer perceptron: else these rules know nothing of the model."""
    parts = {hint.part for hint in hints}
    return {"attention", "experts"} <= parts


def _weights(hint: Hint, dispatches: bool) -> list[float]:
    """How much a kernel speaks for each state."""
    part = hint.part if hint.part != "router" else "attention" if dispatches else "experts"
    size = _PART["core" if hint.core else "routed" if hint.routed else hint.part] if hint.part else 0.0
    way = _FORWARD.get(hint.part, _OTHER_FORWARD) if hint.direction == "F" else _DIRECTION.get(hint.direction, 0.0)
    return [_weight(state, part, size, hint, way) for state in STATES]


def _weight(state: str, part: str, size: float, hint: Hint, way: float) -> float:
    if state == "W":
        return way + size if hint.direction == "W" or hint.prepares else -(size + way + _DIRECTION["W"] * hint.gemm)
    weight = size if state.startswith(part) else -size
    backward = state.endswith("(B)")
    if hint.direction == "W" and backward:
        way = 0.0  # a backward that is not split computes gradients of weights in between
    elif state == "other":
        way = 0.0
    told = way if state.endswith(f"({hint.direction})") else -way
    return weight + told + _UNTOLD_BACKWARD * backward


def _of_threads(thread: Ints, hints: list[Hint]) -> Floats:
    """What it says of a kernel that its thread launches only backward work, as autograd's does, or none at all."""
    told = np.zeros((len(thread), len(STATES)))
    backward = np.array([hint.direction == "B" for hint in hints], dtype=bool)
    forward = np.array([hint.core and hint.direction == "F" for hint in hints], dtype=bool)
    threads, place = np.unique(thread, return_inverse=True)
    runs_backward, runs_forward = (
        np.bincount(place[which], minlength=len(threads)) > 0 for which in (backward, forward)
    )
    only_backward, only_forward = runs_backward & ~runs_forward & (threads >= 0), runs_forward & ~runs_backward
    if only_backward.any():
        told[:, (ATTENTION_F, EXPERTS_F)] -= _THREAD * only_backward[place, None]
        told[:, (ATTENTION_B, EXPERTS_B)] -= _THREAD * only_forward[place, None]
    return told


def _of_products(product: Ints, dispatches: bool) -> Floats:
    """What it says of a product of a forward that it stands around an activation, or before a router, or neither."""
    told = np.zeros((len(product), len(STATES)))
    experts = (product == OF_MLP) | ((product == OF_ROUTER) & (not dispatches))
    attention = (product != UNKNOWN) & ~experts
    told[:, (EXPERTS_F, EXPERTS_B)] = _PRODUCT * experts[:, None] - _PRODUCT * attention[:, None]
    told[:, (ATTENTION_F, ATTENTION_B)] = -told[:, (EXPERTS_F, EXPERTS_B)]
    return told


def _costs(hints: list[Hint], work: GpuWork, launched: Ints, thread: Ints, edge: Bools) -> Floats:
    """What a change of state costs before each kernel."""
    opens, closes = (np.array([getattr(hint, which) for hint in hints], dtype=bool) for which in ("opens", "closes"))
    costs = _CHANGE - _EDGE * opens - _EDGE * edge
    costs[1:] -= _EDGE * (closes[:-1] & ~closes[1:])
    if len(hints) > 1 and (launched >= 0).all():
        pause = np.diff(launched)
        # A graph launches all of its work at once: there it counts how long the GPU waited.
        idle = work.start_ns[1:] - np.maximum.accumulate(work.end_ns)[:-1]
        for paused, which in ((pause, pause > 0), (idle, pause == 0)):
            if which.any():
                costs[1:] -= _EDGE * (which & (paused > PAUSE * np.median(paused[which])))
        costs[1:] -= _EDGE * (thread[1:] != thread[:-1])
    return np.asarray(np.maximum(costs, _LEAST))


def best_path(weights: Floats, costs: Floats) -> Ints:
    """The states of the highest sum of weights less the costs of changes (Viterbi, 1967)."""
    score = [0.0] * len(STATES)
    came = np.zeros(weights.shape, dtype=np.int8)
    states = range(len(STATES))
    for row, (own, cost) in enumerate(zip(weights.tolist(), costs.tolist(), strict=True)):
        best = max(states, key=score.__getitem__)
        least = score[best] - cost
        back = [state if score[state] >= least else best for state in states]
        score = [max(score[state], least) + own[state] for state in states]
        came[row] = back
    path = np.zeros(len(weights), dtype=np.int64)
    state = max(states, key=score.__getitem__)
    for row in range(len(weights) - 1, -1, -1):
        path[row] = state
        state = int(came[row, state])
    return path


def _too_far(hinted: Bools) -> Bools:
    rows = np.arange(len(hinted))
    before = np.maximum.accumulate(np.where(hinted, rows, -len(rows) - _FARTHEST))
    after = np.minimum.accumulate(np.where(hinted, rows, 2 * len(rows) + _FARTHEST)[::-1])[::-1]
    return np.asarray(np.minimum(rows - before, after - rows) > _FARTHEST)
