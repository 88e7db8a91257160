"""Ways to place the experts, side by side: how even each one is, and how many token copies it sends to other nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from counterflow.cli.output import counted, print_table

if TYPE_CHECKING:
    from counterflow.experts import Placement
    from counterflow.experts.loads import Floats, Ints


@dataclass(frozen=True)
class Ways:
    """Placements for the same loads; their copies [layers] are None where no routes were recorded."""

    load: Floats
    ways: dict[str, Placement]
    node_spill: float
    """That of the way called spill."""
    copies: dict[str, Floats] | None
    num_tokens: int

    def as_dict(self) -> dict[str, object]:
        """With keys that others rely on."""
        return {
            name: {"balancedness": float(way.balancedness(self.load).mean()), "copies_per_token": self.copied(name)}
            for name, way in self.ways.items()
        }

    def copied(self, name: str) -> float | None:
        """The mean over the layers that anything was routed in."""
        return None if self.copies is None else mean_copies(self.copies[name])

    def print_table(self) -> None:
        """For people."""
        print("\nToken copies that cross nodes: how many other nodes a token is sent to, in a layer on average.\n")
        rows = []
        for name, way in self.ways.items():
            even = way.balancedness(self.load)
            told = f"spill of {self.node_spill:g}" if name == "spill" else name
            rows.append([told, f"{even.mean():.4f}", f"{even.min():.4f}", told_copies(self.copied(name))])
        print_table(["placement", "balancedness", "worst layer", "copies for each token"], rows)
        if self.copies is None:
            print("\nNo routes were recorded with these loads; give those of some tokens with --routes.")
        else:
            print(f"\nOf {counted(self.num_tokens, 'token')}, taken to be spread over the GPUs in equal blocks.")


def compare_ways(
    load: Floats, like: Placement, num_groups: int, node_spill: float, routes: Ints | None, this_one: bool
) -> Ways:
    """The ways to place ``load`` on the GPUs of ``like``, and, if wanted, that placement itself.

    Raises:
        PlacementError: the routes are of another model.
    """
    from counterflow import experts

    sizes = (like.num_slots, like.num_gpus, like.num_nodes, num_groups)
    ways = experts.alternatives(load, *sizes, node_spill)
    if this_one:
        ways["this one"] = like
    if routes is None:
        return Ways(load, ways, node_spill, None, 0)
    copies = {name: experts.copies_per_token(routes, way) for name, way in ways.items()}
    return Ways(load, ways, node_spill, copies, len(routes))


def mean_copies(copies: Floats) -> float | None:
    """The mean over the layers that anything was routed in; None where it was in none."""
    import numpy as np

    return None if np.isnan(copies).all() else float(np.nanmean(copies))


def told_copies(copies: float | None) -> str:
    """For a cell of a table."""
    return "not known" if copies is None else f"{copies:.3f}"
