"""How much an answer hangs on one cost: the steps of all schedules while latency or the gain of F&B varies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any, Literal

from counterflow.errors import ScheduleError, SimulatorError
from counterflow.schedule import GENERATORS, Action, Kind
from counterflow.simulator.compare import Model, label, on_equal_devices
from counterflow.simulator.costs import Costs
from counterflow.simulator.engine import simulate

Over = Literal["latency", "overlap"]
STEPS = 10
"""Into how many equal steps the usual range of a sweep is cut."""


@dataclass(frozen=True)
class Sweep:
    """The steps of schedules on equal devices, in microseconds, for each of ``values_us``.

    ``over`` is "latency", of every transfer, or "overlap", the duration of an F&B at a stage of mean cost.
    ``best`` names for each value the schedule with the shortest step; of several the first.
    """

    over: Over
    values_us: list[float]
    makespan_us: dict[str, list[float]]
    best: list[str]
    skipped: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what ``counterflow compare --sweep ... --json`` prints."""
        return asdict(self)

    def runs(self) -> list[tuple[str, float, float]]:
        """The best schedules in the order of the values, each with the first and the last value at which it is best.

        Example:
            >>> from counterflow import Costs
            >>> from counterflow.simulator import sweep
            >>> sweep(8, 20, Costs(), "overlap", [3, 2.5, 2], ["1f1b", "zb1p", "dualpipe"]).runs()
            [('dualpipe', 3, 2)]
        """
        runs: list[tuple[str, float, float]] = []
        for name, value in zip(self.best, self.values_us, strict=True):
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1], value)
            else:
                runs.append((name, value, value))
        return runs


def sweep(
    num_ranks: int,
    num_microbatches: int,
    costs: Costs | None = None,
    over: Over = "latency",
    values: Sequence[float] | None = None,
    names: Iterable[str] = tuple(GENERATORS),
    *,
    first_stage_weight: float = 1.0,
    last_stage_weight: float = 1.0,
) -> Sweep:
    """The step of each schedule on ``num_ranks`` ranks, as in ``compare``'s equal devices, for each of ``values``.

    Values are microseconds: of latency, usually from none to half an F; or of an F&B, usually from F + B, which
    gains nothing, down to the longer of the two, which hides the other. Where stages differ the F&B is that of
    a stage of mean cost, and every stage hides the same part of what it could.

    Raises:
        ScheduleError: an unknown name, or sizes for which there is no schedule at all.
        SimulatorError: the costs do not cover the stages, values out of range, or nothing to sweep over.

    Example:
        >>> from counterflow import Costs
        >>> from counterflow.simulator import sweep
        >>> result = sweep(8, 20, Costs(1, 2, None, 1, 2.4), "latency", [0, 0.1], ["dualpipe", "dualpipev"])
        >>> result.makespan_us
        {'dualpipe': [57.6, 60.2], 'dualpipev': [58.0, 63.5]}
    """
    model = Model(num_ranks, Costs() if costs is None else costs, first_stage_weight, last_stage_weight)
    if num_ranks < 1:
        raise ScheduleError(f"a sweep got {num_ranks} ranks; it needs at least 1")
    if over not in ("latency", "overlap"):
        raise SimulatorError(f"a sweep got {over!r} to vary; it varies 'latency' or 'overlap'")
    if values is not None and not len(values):
        raise SimulatorError("a sweep got no values; give at least one, or leave them out for the usual range")
    variants = _latencies(model, values) if over == "latency" else _overlaps(model, values)
    steps: dict[str, list[float]] = {}
    skipped = {}
    unpriced = None
    for name, make in on_equal_devices(tuple(names), num_ranks, num_microbatches):
        try:
            schedule = make()
            steps[label(name, schedule.num_stages // num_ranks)] = [
                simulate(schedule, replace(model, costs=varied).costs_of(schedule)).makespan_ns / 1000
                for varied in variants.values()
            ]
        except ScheduleError as error:
            if name not in GENERATORS:
                raise
            skipped[name] = str(error)
        except SimulatorError as error:
            unpriced = unpriced or error
            skipped[name] = str(error)
    if unpriced and not steps:
        raise unpriced
    if not steps:
        raise ScheduleError(next(iter(skipped.values()), "a sweep got no names; give at least one schedule"))
    best = [min(steps, key=lambda row: steps[row][at]) for at in range(len(variants))]
    return Sweep(over, list(variants), steps, best, skipped)


def _latencies(model: Model, values: Sequence[float] | None) -> dict[float, Costs]:
    """For each latency the costs."""
    if values is None:
        values = _even(0.0, 0.5 * mean(_us(model, Kind.F)))
    return {value: replace(model.costs, latency_us=value) for value in values}


def _overlaps(model: Model, values: Sequence[float] | None) -> dict[float, Costs]:
    """For each F&B of a mean stage the costs; the surplus of the ends hides the same part as their layers."""
    forwards, backwards = _us(model, Kind.F), _us(model, Kind.B)
    most = mean(forwards) + mean(backwards)
    hidden = mean(map(min, forwards, backwards))
    least = most - hidden
    if not hidden:
        raise SimulatorError("an overlap sweep got an F or a B of 0 µs, so a pair hides nothing; give both a duration")
    varied = {}
    for value in _even(most, least) if values is None else values:
        if not least - _NS <= value <= most + _NS:
            raise SimulatorError(
                f"an overlap sweep got an F&B of {value:g} µs; it lies between the longer of F and B, here "
                f"{least:g} µs, and F + B, here {most:g} µs"
            )
        gain = (most - value) / hidden
        overlapped = tuple(f + b - gain * min(f, b) for f, b in zip(forwards, backwards, strict=True))
        varied[value] = replace(model.costs, overlapped_us=overlapped)
    return varied


_NS = 1e-3


def _us(model: Model, kind: Kind) -> list[float]:
    return [model.costs.duration_ns(Action(kind, stage, 0)) / 1000 for stage in range(model.num_stages)]


def _even(first: float, last: float) -> list[float]:
    """From the one to the other, in whole nanoseconds."""
    return [round(first + (last - first) * step / STEPS, 3) for step in range(STEPS + 1)]
