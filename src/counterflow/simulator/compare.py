"""Schedules side by side: simulated truth, the published closed form, and what no schedule could beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from counterflow.errors import ScheduleError, SimulatorError
from counterflow.schedule import GENERATORS, STAGES_PER_RANK, Schedule, generate
from counterflow.simulator.bounds import least_step_ns, least_step_of_ns
from counterflow.simulator.costs import Costs
from counterflow.simulator.engine import simulate
from counterflow.simulator.formulas import FORMULAS, Case, bubble_formula_ns, why_no_formula
from counterflow.simulator.memory import peak_activations

CHUNKS = {"interleaved-1f1b": (2, 4), "interleaved-1f1b-overlap": (2, 4)}
"""Where the stages of a rank are for choice: those that are compared on equal devices."""


@dataclass(frozen=True)
class Row:
    """One schedule of a comparison; durations in microseconds, lists with one entry for each rank.

    ``bubble_formula_us`` is None where no closed form is for it; ``formula_exact`` says whether it equals the
    largest simulated bubble, and ``formula_reason`` why it does not, or why there is none.

    ``peak_activations`` and ``parameters_per_rank`` count the schedule's own stages, which are smaller where the
    model is cut finer. ``activation_shares`` and ``parameter_shares`` are the same in one unit for all, the R-th
    part of the model that a rank would hold if every parameter stood on one rank.

    ``bound_us`` is the least step for the costs on so many ranks, whatever the schedule; ``own_bound_us`` the
    least step for this schedule's placement and actions, whatever their order.
    """

    name: str
    num_ranks: int
    num_stages: int
    makespan_us: float
    bubble_us: list[float]
    bubble_formula: str | None
    bubble_formula_us: float | None
    formula_exact: bool | None
    formula_reason: str | None
    peak_activations: list[int]
    parameters_per_rank: int
    activation_shares: list[float]
    parameter_shares: float
    bound_us: float
    own_bound_us: float

    @property
    def label(self) -> str:
        """The name, and where its stages on a rank are for choice their number.

        Example:
            >>> from counterflow import compare
            >>> compare(2, 4, names=["interleaved-1f1b"]).equal_devices[-1].label
            'interleaved-1f1b ×4'
        """
        return label(self.name, self.parameters_per_rank)


def label(name: str, stages_on_each: int) -> str:
    """What a row is called in tables and plots."""
    return f"{name} ×{stages_on_each}" if name in CHUNKS else name


@dataclass(frozen=True)
class Comparison:
    """The rows, once on equal stages and once on equal devices, and why a schedule is missing among them."""

    schedules: list[Row]
    skipped: dict[str, str]
    equal_devices: list[Row]
    equal_devices_skipped: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what ``counterflow compare --json`` prints."""
        return asdict(self)


def compare(
    num_stages: int,
    num_microbatches: int,
    costs: Costs | None = None,
    names: Iterable[str] = tuple(GENERATORS),
    *,
    first_stage_weight: float = 1.0,
    last_stage_weight: float = 1.0,
) -> Comparison:
    """The schedules ``names`` for the same model and micro-batches, on equal stages and on equal devices.

    ``costs`` are those of a model cut into ``num_stages``; its first and last stage take ``first_stage_weight``
    and ``last_stage_weight`` times as long (embedding, head).

    ``schedules`` is the published comparison: as many stages for each, whatever number of ranks that makes. One
    that puts two stages on each rank and has no twins then runs on half as many. ``equal_devices`` gives
    ``num_stages`` ranks to each, and where ranks hold several stages cuts the model finer, so that the rank's
    share stays the same (``Costs.cut``).

    Raises:
        ScheduleError: an unknown name.
        SimulatorError: the costs do not cover any of the schedules; those that they do not cover are skipped.

    Example:
        >>> from counterflow import Costs, compare
        >>> comparison = compare(8, 16, Costs(1, 2, None, 1, 2.4), ["1f1b", "dualpipe", "dualpipev"])
        >>> for row in comparison.schedules:
        ...     print(row.name, row.num_ranks, row.makespan_us, max(row.bubble_us), row.formula_exact)
        1f1b 8 69.0 21.0 True
        dualpipe 8 48.0 4.2 True
        dualpipev 4 86.4 4.2 True
        >>> for row in comparison.equal_devices:
        ...     print(row.name, row.num_stages, row.makespan_us, row.bound_us, row.parameter_shares)
        1f1b 8 69.0 43.2 1.0
        dualpipe 8 48.0 43.2 2.0
        dualpipev 16 48.4 43.2 1.0

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", table 2; README of the published DualPipe.
    """
    model = Model(num_stages, Costs() if costs is None else costs, first_stage_weight, last_stage_weight)
    names = tuple(names)
    schedules, skipped = _rows(
        model, ((name, partial(_with_stages, name, num_stages, num_microbatches)) for name in names)
    )
    equal, missing = _rows(model, on_equal_devices(names, num_stages, num_microbatches))
    return Comparison(schedules, skipped, equal, missing)


@dataclass(frozen=True)
class Model:
    """What every schedule of a comparison runs: its costs in ``num_stages``, and the surplus at both ends."""

    num_stages: int
    costs: Costs
    first_stage_weight: float
    last_stage_weight: float

    def costs_of(self, schedule: Schedule) -> Costs:
        """The costs in the stages of ``schedule``."""
        return self.costs.cut(self.num_stages, schedule.num_stages, self.first_stage_weight, self.last_stage_weight)


Wanted = tuple[str, Callable[[], Schedule]]
"""A name, and what makes its schedule or says why there is none."""


def on_equal_devices(names: Iterable[str], num_ranks: int, num_microbatches: int) -> Iterator[Wanted]:
    """Each schedule on ``num_ranks`` ranks; where the stages on a rank are for choice, once for each choice."""
    for name in names:
        for chunks in CHUNKS.get(name, (None,)):
            yield name, partial(generate, name, num_ranks, num_microbatches, chunks)


def _with_stages(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    on_each = STAGES_PER_RANK.get(name, 1)
    whole, rest = divmod(num_stages, on_each)
    if on_each > 1 and (rest or whole < 1):
        below, above = whole * on_each, (whole + 1) * on_each
        nearest = f"values are {below} and {above}" if whole > 0 else f"value is {on_each}"
        raise ScheduleError(
            f"{name} got {num_stages} stages; it holds {on_each} on every rank and needs a multiple of {on_each}: "
            f"the nearest legal {nearest}"
        )
    return generate(name, whole, num_microbatches)


def _rows(model: Model, wanted: Iterable[Wanted]) -> tuple[list[Row], dict[str, str]]:
    rows, skipped = [], {}
    unpriced = None
    for name, make in wanted:
        try:
            schedule = make()
            rows.append(_row(schedule, model.costs_of(schedule)))
        except ScheduleError as error:
            if name not in GENERATORS:
                raise
            skipped[name] = str(error)
        except SimulatorError as error:  # costs measured under one schedule need not cover what another one runs
            unpriced = unpriced or error
            skipped[name] = str(error)
    if unpriced and not rows:
        raise unpriced
    return rows, skipped


def _row(schedule: Schedule, costs: Costs) -> Row:
    timeline = simulate(schedule, costs)
    bubble_ns = timeline.bubble_ns()
    ranks, stages = schedule.num_ranks, schedule.num_stages
    activations = peak_activations(schedule)
    held = max(len(schedule.stages_of(rank)) for rank in range(ranks))
    formula_ns = bubble_formula_ns(schedule, costs)
    exact = None if formula_ns is None else abs(formula_ns - int(bubble_ns.max())) <= _rounding_ns(schedule, costs)
    formula = FORMULAS.get(schedule.name)
    bound_ns = least_step_ns(ranks, stages, schedule.num_microbatches, costs)
    return Row(
        name=schedule.name,
        num_ranks=ranks,
        num_stages=stages,
        makespan_us=timeline.makespan_ns / 1000,
        bubble_us=[bubble / 1000 for bubble in bubble_ns.tolist()],
        bubble_formula=None if formula is None else formula.text,
        bubble_formula_us=None if formula_ns is None else formula_ns / 1000,
        formula_exact=exact,
        formula_reason=_reason(schedule, costs) if not exact else None,
        peak_activations=activations,
        parameters_per_rank=held,
        activation_shares=[count * ranks / stages for count in activations],
        parameter_shares=held * ranks / stages,
        bound_us=bound_ns / 1000,
        own_bound_us=max(bound_ns, least_step_of_ns(schedule, costs)) / 1000,
    )


def _rounding_ns(schedule: Schedule, costs: Costs) -> int:
    """What rounding each duration to a nanosecond can make of a rank's actions."""
    return 0 if costs.whole() else int(np.diff(schedule.rows.first).max())


def _reason(schedule: Schedule, costs: Costs) -> str:
    """Why the formula is not exact, or there is none."""
    missing = why_no_formula(schedule, costs)
    return missing or FORMULAS[schedule.name].judge(Case.of(schedule, costs)).reason
