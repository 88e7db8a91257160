"""Run it: any checked schedule on torch, over processes or within one."""

from counterflow.runtime.clock import VirtualClock
from counterflow.runtime.executor import StepResult
from counterflow.runtime.launch import launch
from counterflow.runtime.migration import Migration
from counterflow.runtime.pipeline import Pipeline

__all__ = ["Migration", "Pipeline", "StepResult", "VirtualClock", "launch"]
