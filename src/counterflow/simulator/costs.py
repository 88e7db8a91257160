"""What each action and each transfer costs: given by hand, read from costs.json, or measured."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from counterflow.errors import SimulatorError
from counterflow.files import write_text
from counterflow.schedule import Action, Kind, Transfer
from counterflow.simulator.measured import DURATIONS, measured_costs
from counterflow.timeline import Timeline

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
    part that I lets go, and the part that stays until W (B frees both). ``twins_us`` is how long the sum of a
    stage's gradients over its twins takes after the last W; a stage that stands on one rank has nothing to sum.

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
    twins_us: PerStage = 0.0

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in DURATIONS.values()):
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
        return round(self.duration_us(action) * 1000)

    def duration_us(self, action: Action) -> float:
        """``duration_ns`` before it is rounded."""
        given = self.given(action.kind, action.stage)
        if given is not None:
            return given
        derived = self._derived(action)
        if derived is None:
            raise SimulatorError(
                f"the costs do not say how long {action} takes; give {DURATIONS[action.kind]} for stage {action.stage}"
            )
        return derived

    def _derived(self, action: Action) -> float | None:
        """F&B = F + B; B = I + W, solved for the one that is missing."""
        if action.pair is not None:
            return sum(self.duration_us(part) for part in action.pair)
        whole, half, other = (self.given(kind, action.stage) for kind in (Kind.B, Kind.I, Kind.W))
        match action.kind:
            case Kind.B if half is not None and other is not None:
                return half + other
            case Kind.I if whole is not None and other is not None:
                return max(whole - other, 0.0)
            case Kind.W if whole is not None and half is not None:
                return max(whole - half, 0.0)
        return None

    def given(self, kind: Kind, stage: int) -> float | None:
        """What is stated for ``kind`` at ``stage``; None where it follows from the rest."""
        return _at(getattr(self, DURATIONS[kind]), stage)

    def wire_ns(self, transfer: Transfer) -> int:
        """How long ``transfer`` occupies its channel."""
        if self.bandwidth_gb_per_s is None:
            return 0
        below = transfer.stage if transfer.payload == "activation" else transfer.stage - 1
        # One GB/s is one byte each nanosecond.
        return round(self.boundary_bytes(below) / self.bandwidth_gb_per_s)

    def boundary_bytes(self, stage: int) -> float:
        """What crosses between ``stage`` and the next, for each micro-batch and way."""
        return _at(self.transfer_bytes, stage) or 0

    @property
    def latency_ns(self) -> int:
        """How long after its channel is free again a transfer arrives."""
        return round(self.latency_us * 1000)

    def twins_ns(self, stage: int) -> int:
        """How long the sum of the gradients of ``stage`` over its twins takes."""
        return round((_at(self.twins_us, stage) or 0) * 1000)

    def stored_bytes(self, stage: int) -> tuple[float, float]:
        """What one micro-batch stores at ``stage``: bytes that I frees, and bytes that W frees."""
        return _at(self.freed_at_input_bytes, stage) or 0, _at(self.freed_at_weight_bytes, stage) or 0

    def uniform(self) -> bool:
        """Whether every stage costs the same."""
        return all(
            not isinstance(value, tuple) or len(set(value)) == 1
            for value in (getattr(self, name) for name in DURATIONS.values())
        )

    def whole(self) -> bool:
        """Whether every stated duration is a whole number of nanoseconds, so that none is rounded."""
        columns = (getattr(self, name) for name in DURATIONS.values())
        stated = [us for column in columns for us in (column if isinstance(column, tuple) else (column,))]
        return all(us is None or abs(us * 1000 - round(us * 1000)) < 1e-6 for us in stated)

    def cut(self, num_stages: int, into: int, first: float = 1.0, last: float = 1.0) -> Costs:
        """The costs of the same model in ``into`` stages, where these are of ``num_stages``, each cut alike.

        A stage cut in two gives two of half its durations, stored bytes and sum over twins; transfers stay as they
        are. ``first`` and ``last`` say how many times as long the first and the last stage of ``num_stages`` take
        for what they compute beside their layers (embedding, head). That surplus cannot be cut: all of it stays
        at the very first and the very last of the new stages.

        Raises:
            SimulatorError: lists of another length, numbers of stages that do not divide, a weight below 1.

        Example:
            >>> Costs(forward_us=1, backward_us=2).cut(2, into=4, first=1.5).forward_us
            (1.0, 0.5, 0.5, 0.5)
        """
        if num_stages < 1 or into < num_stages or into % num_stages:
            raise SimulatorError(
                f"costs of {num_stages} stages got {into} stages to be cut into; give a multiple of their number"
            )
        _check_weights(first, last)
        pieces = into // num_stages
        if pieces == 1 and first == last == 1:
            return self
        changed: dict[str, Any] = {name: self._cut(name, num_stages, pieces) for name in _CUT}
        for name in DURATIONS.values():
            changed[name] = self._cut(name, num_stages, pieces, first, last)
        sizes = self.transfer_bytes  # a cut inside a stage sends what the stage itself sends
        if isinstance(sizes, tuple):
            changed["transfer_bytes"] = tuple(size for size in sizes for _ in range(pieces))
        return replace(self, **changed)

    def _cut(self, name: str, num_stages: int, pieces: int, first: float = 1.0, last: float = 1.0) -> PerStage:
        values = getattr(self, name)
        if not isinstance(values, tuple):
            if values is None or first == last == 1:
                return None if values is None else values / pieces
            values = (values,) * num_stages
        if len(values) != num_stages:
            raise SimulatorError(
                f"{name} names {len(values)} stages and the model has {num_stages}; give one number for each stage"
            )
        cut = [None if value is None else value / pieces for value in values for _ in range(pieces)]
        for end, weight in ((0, first), (-1, last)):
            whole, piece = values[end], cut[end]
            if whole is not None and piece is not None:
                cut[end] = piece + (weight - 1) * whole
        return tuple(cut)

    @classmethod
    def from_timeline(cls, timeline: Timeline, **more: Any) -> Costs:
        """Measured costs: what ``timeline`` says about durations, twins and latency; ``more`` as in ``Costs``.

        Durations are medians, for each kind and stage. The latency is the median time from the end of an action to the
        start of one on another rank that waited for it; ``more`` takes its place where it states one, or a bandwidth.

        Raises:
            SimulatorError: no span on the compute lane is named as an action.
        """
        found = measured_costs(timeline)
        if more.get("bandwidth_gb_per_s") is not None:
            del found["latency_us"]  # the wire's share is in it
        return cls(**{**found, **more})


_CUT = ("freed_at_input_bytes", "freed_at_weight_bytes", "twins_us")
"""What is cut with a stage beside its durations, and knows no surplus at the ends."""


def _check_weights(first: float, last: float) -> None:
    for name, weight in (("first", first), ("last", last)):
        if not 1 <= weight <= _LARGEST:
            raise SimulatorError(
                f"the weight of the {name} stage got {weight}; it needs a number from 1, as long as the others take, "
                f"to {_LARGEST:g}: for a shorter stage give the costs a list, with a number for each stage"
            )


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
        why = error.strerror if isinstance(error, OSError) else error
        raise SimulatorError(
            f"{path} cannot be read as costs ({why}); give one as counterflow trace costs writes it"
        ) from None
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
