"""Schedules side by side: simulated truth, and the published closed form where one exists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from counterflow.errors import ScheduleError
from counterflow.schedule import GENERATORS, Action, Kind, Schedule, generate
from counterflow.simulator.costs import Costs
from counterflow.simulator.engine import simulate
from counterflow.simulator.memory import peak_activations

FORMULAS = {
    "gpipe": "(S-1)(F+B)",
    "1f1b": "(S-1)(F+B)",
    "zb1p": "(S-1)(F+B-2W)",
    "dualpipe": "(S/2-1)(F&B+B-3W)",
    "dualpipev": "(S/2-1)(F&B+B-3W)",
}
"""The published bubbles, S being the number of stages. They hold for the rank with the largest bubble."""


@dataclass(frozen=True)
class Row:
    """One schedule of a comparison; durations in microseconds, lists with one entry for each rank.

    ``bubble_formula_us`` is None where stages differ; ``formula_exact`` says whether it equals the largest
    simulated bubble. ``parameters_per_rank`` counts the stages that a rank holds.
    """

    name: str
    num_ranks: int
    num_stages: int
    makespan_us: float
    bubble_us: list[float]
    bubble_formula: str
    bubble_formula_us: float | None
    formula_exact: bool | None
    peak_activations: list[int]
    parameters_per_rank: int


@dataclass(frozen=True)
class Comparison:
    """The rows, and for each schedule that does not exist at these sizes the reason why."""

    schedules: list[Row]
    skipped: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what ``counterflow compare --json`` prints."""
        return asdict(self)


def compare(
    num_stages: int,
    num_microbatches: int,
    costs: Costs | None = None,
    names: Iterable[str] = tuple(GENERATORS),
) -> Comparison:
    """The schedules ``names`` for the same model, cut into ``num_stages``, and the same micro-batches.

    The number of stages is the published comparison's common measure. It is the number of ranks too, except for
    DualPipeV, which folds two stages onto each and needs half as many.

    Raises:
        ScheduleError: an unknown name.
        SimulatorError: the costs do not cover the stages.

    Example:
        >>> from counterflow import Costs, compare
        >>> for row in compare(8, 20, Costs(1, 2, None, 1, 2.4)).schedules:
        ...     print(row.name, max(row.bubble_us), row.formula_exact, max(row.peak_activations))
        gpipe 21.0 True 20
        1f1b 21.0 True 8
        zb1p 7.0 True 8
        dualpipe 4.2 True 9
        dualpipev 4.2 True 9

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", table 2; README of the published DualPipe.
    """
    costs = Costs() if costs is None else costs
    rows, skipped = [], {}
    for name in names:
        try:
            schedule = _with_stages(name, num_stages, num_microbatches)
        except ScheduleError as error:
            if name not in GENERATORS:
                raise
            skipped[name] = str(error)
            continue
        rows.append(_row(schedule, costs))
    return Comparison(rows, skipped)


def _with_stages(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    if name != "dualpipev":
        return generate(name, num_stages, num_microbatches)
    if num_stages % 2 or num_stages < 2:
        nearest = f"values are {num_stages - 1} and {num_stages + 1}" if num_stages > 2 else "value is 2"
        raise ScheduleError(
            f"dualpipev got {num_stages} stages; it holds two on every rank and needs an even number: "
            f"the nearest legal {nearest}"
        )
    return generate(name, num_stages // 2, num_microbatches)


def _row(schedule: Schedule, costs: Costs) -> Row:
    timeline = simulate(schedule, costs)
    bubble_ns = timeline.bubble_ns()
    formula_ns = bubble_formula_ns(schedule, costs)
    return Row(
        name=schedule.name,
        num_ranks=schedule.num_ranks,
        num_stages=schedule.num_stages,
        makespan_us=timeline.makespan_ns / 1000,
        bubble_us=[bubble / 1000 for bubble in bubble_ns.tolist()],
        bubble_formula=FORMULAS[schedule.name],
        bubble_formula_us=None if formula_ns is None else formula_ns / 1000,
        formula_exact=None if formula_ns is None else formula_ns == int(bubble_ns.max()),
        peak_activations=peak_activations(schedule),
        parameters_per_rank=max(len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks)),
    )


def bubble_formula_ns(schedule: Schedule, costs: Costs) -> int | None:
    """The published closed form for ``schedule``; None where stages differ or it runs forward only."""
    if not costs.uniform() or schedule.mode == "forward":
        return None
    ns, stages = costs.duration_ns, schedule.num_stages
    forward, backward, weight = (Action(kind, 0, 0) for kind in (Kind.F, Kind.B, Kind.W))
    match schedule.name:
        case "gpipe" | "1f1b":
            return (stages - 1) * (ns(forward) + ns(backward))
        case "zb1p":
            return (stages - 1) * (ns(forward) + ns(backward) - 2 * ns(weight))
        case "dualpipe" | "dualpipev":
            overlapped = Action.overlap(forward, Action(Kind.B, 0, 1))
            return (stages // 2 - 1) * (ns(overlapped) + ns(backward) - 3 * ns(weight))
    return None
