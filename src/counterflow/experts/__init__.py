"""Experts in balance: the published placement exactly, a better one, and what a placement costs."""

from counterflow.experts.balance import balance
from counterflow.experts.certificate import Certificate
from counterflow.experts.elastic import Resized, resize
from counterflow.experts.frontier import Frontier, move_frontier
from counterflow.experts.loads import as_loads
from counterflow.experts.migration import Fetch, MigrationPlan, Swap, plan_migration
from counterflow.experts.placement import Placement, read_placement, write_placement
from counterflow.experts.published import rebalance_experts
from counterflow.experts.recordings import read_loads, read_routes
from counterflow.experts.redundancy import Redundancy, sweep_replicas, worthwhile
from counterflow.experts.replay import POLICIES, STALL_ASSUMES, Rebalance, Replay, ReplaySettings, replay, starting
from counterflow.experts.routes import node_copies
from counterflow.experts.scenarios import balance_scenarios
from counterflow.experts.serving import read_served, write_served
from counterflow.experts.tracker import LoadTracker
from counterflow.experts.traffic import SPILL, alternatives, copies_per_token, route_loads

__all__ = [
    "POLICIES",
    "SPILL",
    "STALL_ASSUMES",
    "Certificate",
    "Fetch",
    "Frontier",
    "LoadTracker",
    "MigrationPlan",
    "Placement",
    "Rebalance",
    "Redundancy",
    "Replay",
    "ReplaySettings",
    "Resized",
    "Swap",
    "alternatives",
    "as_loads",
    "balance",
    "balance_scenarios",
    "copies_per_token",
    "move_frontier",
    "node_copies",
    "plan_migration",
    "read_loads",
    "read_placement",
    "read_routes",
    "read_served",
    "rebalance_experts",
    "replay",
    "resize",
    "route_loads",
    "starting",
    "sweep_replicas",
    "worthwhile",
    "write_placement",
    "write_served",
]
