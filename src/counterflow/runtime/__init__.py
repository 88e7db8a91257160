"""Run it: any checked schedule on torch, over processes or within one."""

from counterflow.runtime.blocks import Context, OverlapBlock
from counterflow.runtime.clock import VirtualClock
from counterflow.runtime.exchange import Exchange, LocalExchange, ProcessGroupExchange, Rows
from counterflow.runtime.executor import StepResult
from counterflow.runtime.launch import launch
from counterflow.runtime.migration import Migration
from counterflow.runtime.pipeline import Pipeline
from counterflow.runtime.profile import profile

__all__ = [
    "Context",
    "Exchange",
    "LocalExchange",
    "Migration",
    "OverlapBlock",
    "Pipeline",
    "ProcessGroupExchange",
    "Rows",
    "StepResult",
    "VirtualClock",
    "launch",
    "profile",
]
