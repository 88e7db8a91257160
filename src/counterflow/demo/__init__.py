"""The tour: train a real model under a schedule, and hold what it took against what the simulator said."""

from counterflow.demo.tour import Results, Step, run_demo

__all__ = ["Results", "Step", "run_demo"]
