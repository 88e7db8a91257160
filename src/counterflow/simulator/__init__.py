"""What would it take? Costs, simulated time, peak memory, and schedules compared."""

from counterflow.simulator.bounds import least_step_ns, least_step_of_ns
from counterflow.simulator.compare import Comparison, Row, compare
from counterflow.simulator.costs import Costs, read_costs, write_costs
from counterflow.simulator.critical_path import CriticalPath, critical_path
from counterflow.simulator.engine import simulate
from counterflow.simulator.formulas import FORMULAS, Case, Formula, Verdict, bubble_formula_ns
from counterflow.simulator.memory import Held, activations_over_time, peak_activation_bytes, peak_activations
from counterflow.simulator.phases import Phases, bubble_phases
from counterflow.simulator.sweep import Sweep, sweep

__all__ = [
    "FORMULAS",
    "Case",
    "Comparison",
    "Costs",
    "CriticalPath",
    "Formula",
    "Held",
    "Phases",
    "Row",
    "Sweep",
    "Verdict",
    "activations_over_time",
    "bubble_formula_ns",
    "bubble_phases",
    "compare",
    "critical_path",
    "least_step_ns",
    "least_step_of_ns",
    "peak_activation_bytes",
    "peak_activations",
    "read_costs",
    "simulate",
    "sweep",
    "write_costs",
]
