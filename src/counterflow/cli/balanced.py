"""What the verb balance found: as plain data, and as tables for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from counterflow.cli.frontier import frontier_as_dict, print_frontier
from counterflow.cli.output import counted, print_table, printable

if TYPE_CHECKING:
    from counterflow.cli.ways import Ways
    from counterflow.experts import Frontier, MigrationPlan, Placement, Resized
    from counterflow.experts.loads import Floats

_WORST = 5


@dataclass(frozen=True)
class Balanced:
    """A placement beside the one before it and the published one, and the loads that they are measured on."""

    load: Floats
    """Of the one file, or of the mixture of all of them."""
    before: Placement
    published: Placement
    placement: Placement
    plan: MigrationPlan | None
    scenarios: dict[str, Floats] = field(default_factory=dict)
    """Of each file, where there are several."""
    ways: Ways | None = None
    """What is compared by the token copies that cross nodes, where there are several nodes."""
    resized: Resized | None = None
    """The smallest change to other GPUs or slots, where they are others."""
    lost_gpus: tuple[int, ...] = ()
    frontier: Frontier | None = None

    def as_dict(self, output: Path | None) -> dict[str, object]:
        """With keys that others rely on."""
        placement, certificate = self.placement, self.placement.certificate
        data: dict[str, object] = {
            "num_gpus": placement.num_gpus,
            "num_nodes": placement.num_nodes,
            "hierarchy": placement.hierarchy,
            "physical_to_logical": placement.physical_to_logical.tolist(),
            "logical_count": placement.logical_count.tolist(),
            **self._evenness(self.load),
            "max_load": placement.gpu_loads(self.load).max(axis=1).tolist(),
            "max_load_bound": None if certificate is None else certificate.max_load_bound.tolist(),
            "limited_by": None if certificate is None else list(certificate.limited_by),
            "co_located": None if certificate is None else [list(slot) for slot in certificate.co_located],
            "moves": None if self.plan is None else int(self.plan.moves.sum()),
            "placement": None if output is None else str(output),
        }
        if self.scenarios:
            data["scenarios"] = {name: self._evenness(load) for name, load in self.scenarios.items()}
        if self.resized is not None:
            data["lost_gpus"] = list(self.lost_gpus)
            data["fewest_moves"] = int(self.resized.fewest.sum())
            data["reload"] = [list(gone) for gone in self.resized.reload]
        if self.ways is not None:
            data["ways"] = self.ways.as_dict()
        if self.frontier is not None:
            data["frontier"] = frontier_as_dict(self.frontier)
        return data

    def _evenness(self, load: Floats) -> dict[str, object]:
        return {
            "balancedness": self.placement.balancedness(load).tolist(),
            "balancedness_before": self.before.balancedness(load).tolist(),
            "balancedness_published": self.published.balancedness(load).tolist(),
        }

    # --- for people -----------------------------------------------------------------------------------------

    def print_tables(self, num_groups: int) -> None:
        """All that is to be said before the file that was written."""
        if self.scenarios:
            self._print_scenarios()
        else:
            self._print_layers()
            self._print_limits()
        placement = self.placement
        if placement.num_nodes > 1 and num_groups > 1 and num_groups % placement.num_nodes:
            print(f"{num_groups} groups do not divide over {placement.num_nodes} nodes: placed without groups.")
        if placement.hierarchy == "node":
            self._print_homes(num_groups)
        if self.plan is not None:
            slots = placement.num_layers * placement.num_slots
            moves = int(self.plan.moves.sum())
            share = f"into {moves / slots:.1%} of {slots} slots"
            print(f"Moves: {moves} experts come to GPUs that did not hold them, {share}.")
        if self.resized is not None:
            self._print_resized(self.resized)
        if self.frontier is not None:
            print_frontier(self.frontier)
        if self.ways is not None:
            self.ways.print_table()

    @property
    def _name_before(self) -> str:
        return "in order" if self.plan is None else "current"

    def _print_layers(self) -> None:
        certificate = self.placement.certificate
        assert certificate is not None
        even = [each.balancedness(self.load) for each in (self.before, self.published, self.placement)]
        rows = [
            [
                str(layer),
                *(f"{column[layer]:.4f}" for column in even),
                f"{certificate.max_load[layer]:.6g}",
                f"{certificate.max_load_bound[layer]:.6g}",
                f"{certificate.gap[layer]:.2%}",
                certificate.limited_by[layer],
            ]
            for layer in range(self.placement.num_layers)
        ]
        rest = ["", "", f"{certificate.gap.mean():.2%}", ""]
        rows.append(["mean", *(f"{column.mean():.4f}" for column in even), *rest])
        rows.append(["worst", *(f"{column.min():.4f}" for column in even), "", "", f"{certificate.gap.max():.2%}", ""])
        print("Balancedness of every layer, mean GPU load over largest, and the largest load beside its bound:\n")
        heads = ["layer", self._name_before, "published", "balanced", "largest", "bound", "gap", "limited by"]
        print_table(heads, rows)

    def _print_limits(self) -> None:
        certificate = self.placement.certificate
        assert certificate is not None
        even = self.placement.balancedness(self.load)
        worst = sorted(range(self.placement.num_layers), key=lambda layer: (even[layer], layer))[:_WORST]
        told = (f"{layer} ({even[layer]:.4f}, {_why(certificate.limited_by[layer])})" for layer in worst)
        print(f"\nThe worst layers: {', '.join(told)}.")
        limits = Counter(certificate.limited_by).most_common()
        told = (f"{_why(limit)} in {counted(layers, 'layer')}" for limit, layers in limits)
        print(f"What limits the layers: {', '.join(told)}.")
        if certificate.co_located:
            some = ", ".join(f"slot {slot} of layer {layer}" for layer, slot in certificate.co_located[:_WORST])
            more = len(certificate.co_located) - _WORST
            print(f"Beside a copy on its own GPU lies {some}{f', and {more} more' if more > 0 else ''}.")

    def _print_scenarios(self) -> None:
        print("Balancedness, mean GPU load over largest, for each kind of traffic: the mean and the worst layer.")
        print("Published is the published algorithm's placement for the mixture, in which all count alike.\n")
        placements = (self.before, self.published, self.placement)
        rows = []
        for name, load in {**self.scenarios, "mixture": self.load}.items():
            even = [placement.balancedness(load) for placement in placements]
            rows.append([printable(name), *(f"{layers.mean():.4f}" for layers in even)])
            rows[-1].extend(f"{layers.min():.4f}" for layers in even)
        heads = [self._name_before, "published", "balanced"]
        print_table(["scenario", *heads, *(f"{head}, worst" for head in heads)], rows)
        print()

    def _print_homes(self, num_groups: int) -> None:
        placement = self.placement
        away = self._away(num_groups)
        stays = f"Each of the {num_groups} groups stays on one of the {placement.num_nodes} nodes"
        print(f"{stays}, but for {away:.2%} of the load." if away > 1e-9 else f"{stays}.")

    def _away(self, num_groups: int) -> float:
        """The share of the load that is not on the node of most of its group, where an expert is on one node."""
        import numpy as np

        placement, load = self.placement, self.load
        on = np.zeros((placement.num_layers, placement.num_nodes, placement.num_experts), dtype=bool)
        np.put_along_axis(on, placement.physical_to_logical.reshape(*on.shape[:2], -1), True, axis=2)
        there = (on * load[:, None]).reshape(*on.shape[:2], num_groups, -1).sum(axis=3)
        total = load.sum()
        return float((total - there.max(axis=1).sum()) / total) if total else 0.0

    def _print_resized(self, resized: Resized) -> None:
        print(
            f"For all experts to be live on these GPUs takes {int(resized.fewest.sum())} of them: no way takes fewer."
        )
        if resized.reload:
            some = ", ".join(f"{expert} of layer {layer}" for layer, expert in resized.reload[:_WORST])
            more = len(resized.reload) - _WORST
            print(f"No GPU has a copy any more of expert {some}{f', and of {more} others' if more > 0 else ''}:")
            print(f"load {counted(len(resized.reload), 'expert')} from a checkpoint (--json lists them under reload).")


def _why(limit: str) -> str:
    return {"hot expert": "one hot expert", "node groups": "the node groups", "slots": "the slots"}.get(limit, limit)
