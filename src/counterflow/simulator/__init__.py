"""What would it take? Costs, simulated time, peak memory, and schedules compared."""

from counterflow.simulator.compare import Comparison, Row, bubble_formula_ns, compare
from counterflow.simulator.costs import Costs, read_costs, write_costs
from counterflow.simulator.engine import simulate
from counterflow.simulator.memory import peak_activation_bytes, peak_activations

__all__ = [
    "Comparison",
    "Costs",
    "Row",
    "bubble_formula_ns",
    "compare",
    "peak_activation_bytes",
    "peak_activations",
    "read_costs",
    "simulate",
    "write_costs",
]
