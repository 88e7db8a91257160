"""Plan, run and measure pipeline schedules for large Mixture-of-Experts models.

Importing this package loads none of its rooms: a public name brings its room in on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterflow.errors import CounterflowError
    from counterflow.experts import LoadTracker, Placement, balance, plan_migration, rebalance_experts
    from counterflow.schedule import (
        Action,
        Schedule,
        check,
        dualpipe,
        dualpipev,
        gpipe,
        interleaved_1f1b,
        one_f_one_b,
        zb1p,
        zbv,
    )
    from counterflow.simulator import Costs, compare, simulate
    from counterflow.timeline import Timeline
    from counterflow.trace import open_trace

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Costs",
    "CounterflowError",
    "LoadTracker",
    "Placement",
    "Schedule",
    "Timeline",
    "balance",
    "check",
    "compare",
    "dualpipe",
    "dualpipev",
    "gpipe",
    "interleaved_1f1b",
    "one_f_one_b",
    "open_trace",
    "plan_migration",
    "rebalance_experts",
    "simulate",
    "zb1p",
    "zbv",
]

_ROOM_OF = {
    "Action": "schedule",
    "Costs": "simulator",
    "CounterflowError": "errors",
    "LoadTracker": "experts",
    "Placement": "experts",
    "Schedule": "schedule",
    "Timeline": "timeline",
    "balance": "experts",
    "check": "schedule",
    "compare": "simulator",
    "dualpipe": "schedule",
    "dualpipev": "schedule",
    "gpipe": "schedule",
    "interleaved_1f1b": "schedule",
    "one_f_one_b": "schedule",
    "open_trace": "trace",
    "plan_migration": "experts",
    "rebalance_experts": "experts",
    "simulate": "simulator",
    "zb1p": "schedule",
    "zbv": "schedule",
}


if not TYPE_CHECKING:  # or a type checker would take any misspelt name for an object

    def __getattr__(name: str) -> object:
        if name not in _ROOM_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = value  # the next look-up does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
