"""How good a placement is, and what keeps it from being better: lower bounds that no placement of its kind can beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from counterflow.experts.loads import Floats
from counterflow.experts.search import EVEN

HOT_EXPERT, NODE_GROUPS, SLOTS, NOTHING = "hot expert", "node groups", "slots", "nothing"


@dataclass(frozen=True, eq=False)
class Certificate:
    """The largest GPU load of every layer against a bound that no placement of the same kind can go below.

    Of the same kind are those of the same sizes, and where groups are kept on nodes those that keep them there as well,
    but for the ``node_spill`` allowed.
    ``max_load`` and ``max_load_bound`` are float64 [layers], in the unit of the loads. ``limited_by`` says for each
    layer what keeps the largest load above the mean: ``"hot expert"`` (its smallest possible share is larger than a
    GPU's mean load), ``"node groups"`` (the groups cannot be dealt to the nodes more evenly), ``"slots"`` (no way was
    found to fill equal slots that evenly), or ``"nothing"``. ``co_located`` lists (layer, slot) wherever a slot holds
    an expert that its GPU holds already.
    """

    max_load: Floats
    max_load_bound: Floats
    limited_by: tuple[str, ...]
    co_located: tuple[tuple[int, int], ...]

    @property
    def gap(self) -> Floats:
        """How far the largest load lies above its bound, as a share of the bound, float64 [layers]."""
        return relative_gap(self.max_load, self.max_load_bound)


def relative_gap(max_load: Floats, bound: Floats) -> Floats:
    """``max_load / bound - 1``, never negative, and 0 where there is no load."""
    ratio = np.divide(max_load, bound, out=np.ones_like(bound), where=bound > 0)
    return np.maximum(ratio - 1.0, 0.0)


def limits(max_load: Floats, bound: Floats, mean: Floats, least: Floats) -> tuple[str, ...]:
    """What limits each layer; ``least`` [layers] is the bound that holds without groups."""
    at_bound = relative_gap(max_load, bound) <= EVEN * (1 + 1e-6)
    by_groups = bound > least * (1 + EVEN)
    by_expert = least > mean * (1 + EVEN)
    names = np.where(by_groups, NODE_GROUPS, np.where(by_expert, HOT_EXPERT, NOTHING))
    return tuple(np.where(at_bound, names, SLOTS).tolist())
