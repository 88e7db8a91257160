"""What each action and each transfer costs: given by hand, read from costs.json, or measured."""

from __future__ import annotations

import json
import os
import reprlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from counterflow.errors import ScheduleError, SimulatorError
from counterflow.files import write_text
from counterflow.schedule import Action, Kind, Transfer
from counterflow.timeline import COMPUTE, Timeline

FORMAT = 1
_LARGEST = 1e18  # what is computed from such numbers stays finite
_SLOWEST_GB_PER_S = 1e-9  # a byte a second
PerStage = float | tuple[float | None, ...] | None
"""One number for all stages, or one for each; None where it was not given."""


@dataclass(frozen=True)
class Costs:
    """Durations in microseconds, one for all stages or one for each stage, and what the wire needs.

    ``forward_us``, ``backward_us``, ``input_us`` and ``weight_us`` are F, B, I and W. ``overlapped_us`` is the
    F&B, at the stage of its forward. What is left out follows from the rest: B = I + W, F&B = F + B (no
    gain). Without any duration: F = 1, B = 2, W = 1, F&B = 3.

    A transfer over a channel takes ``transfer_bytes`` (at the stage below the boundary it crosses, both ways)
    over ``bandwidth_gb_per_s``, one after the other, and arrives ``latency_us`` later.
    ``freed_at_input_bytes`` and ``freed_at_weight_bytes`` are what one micro-batch stores at a stage: the
    part that I lets go, and the part that stays until W (B frees both).

    Raises:
        SimulatorError: a number that is negative or not finite, or lists of different lengths.

    Example:
        >>> from counterflow import Action, Costs
        >>> costs = Costs(forward_us=(1, 3), backward_us=(2, 6), weight_us=1, latency_us=0.5)
        >>> [costs.duration_ns(Action.parse(text)) for text in ("1F0", "1I0", "(0F1;1B0)OVERLAP_F_B")]
        [3000, 5000, 7000]
    """

    forward_us: PerStage = None
    backward_us: PerStage = None
    input_us: PerStage = None
    weight_us: PerStage = None
    overlapped_us: PerStage = None
    latency_us: float = 0.0
    bandwidth_gb_per_s: float | None = None
    transfer_bytes: PerStage = 0
    freed_at_input_bytes: PerStage = 0
    freed_at_weight_bytes: PerStage = 0

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in _DURATIONS.values()):
            for name, value in (("forward", 1.0), ("backward", 2.0), ("weight", 1.0), ("overlapped", 3.0)):
                object.__setattr__(self, f"{name}_us", value)
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))
        for name in ("latency_us", "bandwidth_gb_per_s"):
            if isinstance(getattr(self, name), tuple):
                raise SimulatorError(f"{name} got a list; it needs one number, which all channels share")
        if self.latency_us is None:
            raise SimulatorError("latency_us got None; give 0 for a wire without latency")
        lengths = {len(value) for value in vars(self).values() if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise SimulatorError(
                f"costs got lists of {' and '.join(map(str, sorted(lengths)))} stages; "
                "give every list one number for each stage"
            )
        if self.bandwidth_gb_per_s is not None and self.bandwidth_gb_per_s < _SLOWEST_GB_PER_S:
            raise SimulatorError(
                f"costs got a bandwidth of {self.bandwidth_gb_per_s} GB/s; give at least {_SLOWEST_GB_PER_S}, "
                "or none for no limit"
            )

    def duration_ns(self, action: Action) -> int:
        """How long ``action`` computes.

        Raises:
            SimulatorError: the costs neither give its duration nor let it follow, or name too few stages.
        """
        return round(self._us(action) * 1000)

    def _us(self, action: Action) -> float:
        given = self._given(action.kind, action.stage)
        if given is not None:
            return given
        derived = self._derived(action)
        if derived is None:
            raise SimulatorError(
                f"the costs do not say how long {action} takes; give {_DURATIONS[action.kind]} for stage {action.stage}"
            )
        return derived

    def _derived(self, action: Action) -> float | None:
        """F&B = F + B; B = I + W, solved for the one that is missing."""
        if action.pair is not None:
            return sum(self._us(part) for part in action.pair)
        whole, half, other = (self._given(kind, action.stage) for kind in (Kind.B, Kind.I, Kind.W))
        match action.kind:
            case Kind.B if half is not None and other is not None:
                return half + other
            case Kind.I if whole is not None and other is not None:
                return max(whole - other, 0.0)
            case Kind.W if whole is not None and half is not None:
                return max(whole - half, 0.0)
        return None

    def _given(self, kind: Kind, stage: int) -> float | None:
        return _at(getattr(self, _DURATIONS[kind]), stage)

    def wire_ns(self, transfer: Transfer) -> int:
        """How long ``transfer`` occupies its channel."""
        if self.bandwidth_gb_per_s is None:
            return 0
        below = transfer.stage if transfer.payload == "activation" else transfer.stage - 1
        # One GB/s is one byte each nanosecond.
        return round((_at(self.transfer_bytes, below) or 0) / self.bandwidth_gb_per_s)

    @property
    def latency_ns(self) -> int:
        """How long after its channel is free again a transfer arrives."""
        return round(self.latency_us * 1000)

    def stored_bytes(self, stage: int) -> tuple[float, float]:
        """What one micro-batch stores at ``stage``: bytes that I frees, and bytes that W frees."""
        return _at(self.freed_at_input_bytes, stage) or 0, _at(self.freed_at_weight_bytes, stage) or 0

    def uniform(self) -> bool:
        """Whether every stage costs the same."""
        return all(
            not isinstance(value, tuple) or len(set(value)) == 1
            for value in (getattr(self, name) for name in _DURATIONS.values())
        )

    @classmethod
    def from_timeline(cls, timeline: Timeline, **more: Any) -> Costs:
        """Measured costs: for each kind and stage the median duration of its actions; ``more`` as in ``Costs``.

        Raises:
            SimulatorError: no span on the compute lane is named as an action.
        """
        durations = defaultdict[tuple[Kind, int], list[int]](list)
        for span in timeline:
            if span.lane != COMPUTE:
                continue
            try:
                action = Action.parse(span.name)
            except ScheduleError:
                continue
            durations[action.kind, action.stage].append(span.duration_ns)
        if not durations:
            raise SimulatorError(
                "the timeline has no span named as an action (such as 3F12), so no costs can be read from it; "
                "take one that counterflow simulated or its executor measured"
            )
        num_stages = 1 + max(stage for _, stage in durations)
        columns: dict[str, Any] = {}
        for kind, name in _DURATIONS.items():
            column = tuple(_median_us(durations.get((kind, stage))) for stage in range(num_stages))
            if any(value is not None for value in column):
                columns[name] = column
        return cls(**columns, **more)


_DURATIONS = {
    Kind.F: "forward_us",
    Kind.B: "backward_us",
    Kind.I: "input_us",
    Kind.W: "weight_us",
    Kind.F_B: "overlapped_us",
}


def _median_us(durations_ns: list[int] | None) -> float | None:
    return median(durations_ns) / 1000 if durations_ns else None


def _at(values: PerStage, stage: int) -> float | None:
    if not isinstance(values, tuple):
        return values
    if stage >= len(values):
        raise SimulatorError(
            f"the costs name {len(values)} stages and the schedule has a stage {stage}; give one number for each stage"
        )
    return values[stage]


def _checked(name: str, value: object) -> PerStage:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_number(name, item) for item in value)
    return _number(name, value)


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise SimulatorError(
            f"{name} got {reprlib.repr(value)}; it needs a number from 0 to {_LARGEST:g}, "
            "or a list with one for each stage"
        )
    return value


def write_costs(costs: Costs, path: str | os.PathLike[str]) -> None:
    """Write costs.json."""
    write_text(path, json.dumps({"format": FORMAT, **asdict(costs)}, indent=1) + "\n")


def read_costs(path: str | os.PathLike[str]) -> Costs:
    """The costs in a costs.json: ``"format": 1`` and any of the fields of ``Costs``.

    Raises:
        SimulatorError: the file cannot be read, is of another format, or holds a field that is not one of ours.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SimulatorError(f"{path} cannot be read as costs: {error}") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise SimulatorError(f'{path} is no costs.json: it needs an object with "format": {FORMAT}')
    known = [field.name for field in fields(Costs)]
    for key in data:
        if key not in known:
            raise SimulatorError(f"{path} has a field {key!r}; costs have {', '.join(known)}")
    try:
        return Costs(**data)
    except SimulatorError as error:
        raise SimulatorError(f"{path}: {error}") from None
