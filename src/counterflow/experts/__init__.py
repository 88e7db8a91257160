"""Experts in balance: the published placement exactly, a better one, and what a placement costs."""

from counterflow.experts.balance import balance
from counterflow.experts.certificate import Certificate
from counterflow.experts.loads import as_loads
from counterflow.experts.migration import Fetch, MigrationPlan, Swap, plan_migration
from counterflow.experts.placement import Placement, read_placement, write_placement
from counterflow.experts.published import rebalance_experts
from counterflow.experts.recordings import read_loads
from counterflow.experts.routes import node_copies
from counterflow.experts.scenarios import balance_scenarios
from counterflow.experts.tracker import LoadTracker

__all__ = [
    "Certificate",
    "Fetch",
    "LoadTracker",
    "MigrationPlan",
    "Placement",
    "Swap",
    "as_loads",
    "balance",
    "balance_scenarios",
    "node_copies",
    "plan_migration",
    "read_loads",
    "read_placement",
    "rebalance_experts",
    "write_placement",
]
