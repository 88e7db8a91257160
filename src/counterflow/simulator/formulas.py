"""Closed forms of the bubble, and for which costs each of them holds: the derivation is told in docs/bubble.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from counterflow.schedule import Action, Kind, Schedule
from counterflow.simulator.costs import Costs, PerStage

Relation = Literal["equal", "larger", "smaller", "not smaller", "unknown"]
"""How the largest simulated bubble stands to the formula."""


class Verdict(NamedTuple):
    """What can be said of a formula without simulating, and why."""

    relation: Relation
    reason: str


@dataclass(frozen=True)
class Case:
    """A schedule's sizes and its uniform costs, in nanoseconds: what a formula is asked for."""

    num_ranks: int
    num_stages: int
    num_microbatches: int
    costs: Costs
    has_twins: bool = False

    @classmethod
    def of(cls, schedule: Schedule, costs: Costs) -> Case:
        """The case of ``schedule``."""
        sizes = (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
        return cls(*sizes, costs, bool(schedule.twins))

    def _ns(self, kind: Kind) -> int:
        return self.costs.duration_ns(Action(kind, 0, 0))

    @property
    def f(self) -> int:
        """F."""
        return self._ns(Kind.F)

    @property
    def b(self) -> int:
        """B."""
        return self._ns(Kind.B)

    @property
    def i(self) -> int:
        """I."""
        return self._ns(Kind.I)

    @property
    def w(self) -> int:
        """W."""
        return self._ns(Kind.W)

    @property
    def b_is_i_and_w(self) -> bool:
        """B = I + W, but for what rounding to nanoseconds makes of it."""
        return abs(self.b - self.i - self.w) <= (0 if self.costs.whole() else 1)

    @property
    def fb(self) -> int:
        """F&B."""
        return self.costs.duration_ns(Action.overlap(Action(Kind.F, 0, 0), Action(Kind.B, 0, 1)))


@dataclass(frozen=True)
class Formula:
    """A published bubble: its text, its value in nanoseconds, and a judge of the costs for which it is exact.

    R is the number of ranks, S of stages, and F, B, W and F&B are those of one stage as the schedule cuts the
    model. A formula is of the rank with the largest bubble.
    """

    text: str
    source: str
    value_ns: Callable[[Case], int]
    holds: Callable[[Case], Verdict]

    def judge(self, case: Case) -> Verdict:
        """How the largest bubble stands to the formula for the costs of ``case``, before anything is simulated."""
        if case.has_twins and _any(case.costs.twins_us):
            return Verdict("unknown", "the formula does not count the sum of gradients over twins")
        verdict = self.holds(case)
        if case.num_ranks == 1 or not _has_wire(case.costs):
            return verdict
        relation: Relation = "unknown" if verdict.relation in ("smaller", "unknown") else "not smaller"
        beside = "" if verdict.relation == "equal" else f"; and {verdict.reason}"
        return Verdict(relation, f"transfers take time here, which the formula does not count{beside}")


def _has_wire(costs: Costs) -> bool:
    return costs.latency_ns > 0 or (costs.bandwidth_gb_per_s is not None and _any(costs.transfer_bytes))


def _any(values: PerStage) -> bool:
    return any(values) if isinstance(values, tuple) else bool(values)


_EQUAL = Verdict("equal", "")


def _always(case: Case) -> Verdict:
    return _EQUAL


def _interleaved(case: Case) -> Verdict:
    if case.num_ranks < case.num_stages and case.num_microbatches < case.num_ranks and case.f + case.b:
        return Verdict("larger", "there are fewer micro-batches than ranks, so a chunk waits for the one before it")
    return _EQUAL


def _interleaved_overlap(case: Case) -> Verdict:
    if case.fb < max(case.f, case.b):
        return Verdict(
            "not smaller", "F&B is shorter than F or B: ranks that run pairs wait for one that runs either alone"
        )
    if case.fb > case.f + case.b:
        return Verdict("not smaller", "F&B is longer than F + B, and the formula does not know such a loss")
    return _interleaved(case)


def _zb1p(case: Case) -> Verdict:
    if case.num_ranks == 1:
        return _EQUAL
    if not case.b_is_i_and_w:
        return Verdict("unknown", "B is not I + W here, and the schedule runs the two halves")
    if case.w > case.i:
        return Verdict("larger", "W is longer than I, which is B-W: a rank still computes W when a gradient is due")
    if case.w > case.f:
        return Verdict("larger", "W is longer than F: a rank still computes W when an activation is due")
    if case.w and case.num_microbatches < case.num_ranks:
        return Verdict("larger", "there are fewer micro-batches than ranks, so too few Ws to fill the gaps")
    return _EQUAL


_SHORTER = "B-W is shorter than F, and the formula takes them as equally long"
_LONGER = "B-W is longer than F, and the formula takes them as equally long"


def _dualpipe(case: Case) -> Verdict:
    if case.num_stages <= 2:
        return _EQUAL
    if not case.b_is_i_and_w:
        return Verdict("unknown", "B is not I + W here, and the schedule runs both")
    if case.i < case.f:
        if case.w <= case.i and max(case.f, case.b) <= case.fb <= case.f + case.b:
            return Verdict("larger", f"{_SHORTER}; without that step of its derivation, (S/2-1)(F&B+F-2W), it is exact")
        return Verdict("larger", _SHORTER)
    if case.i == case.f:
        if case.w > case.f:
            return Verdict("larger", "W is longer than F: a W no longer fits beneath an F or I of another rank")
        if case.fb < case.b:
            return Verdict("larger", "F&B is shorter than B: ranks that run pairs wait for ranks that run a B alone")
        if case.fb > case.f + case.b:
            return Verdict("not smaller", "F&B is longer than F + B, and the formula does not know such a loss")
        return _EQUAL
    if case.f and case.w <= case.i and case.b <= case.fb <= case.f + case.b:
        return Verdict("smaller", _LONGER)
    return Verdict("unknown", _LONGER)


_TABLE = "DeepSeek-AI 2024, DeepSeek-V3 Technical Report, table 2"
_DUALPIPE = Formula(
    "(S/2-1)(F&B+B-3W)", _TABLE, lambda case: (case.num_stages // 2 - 1) * (case.fb + case.b - 3 * case.w), _dualpipe
)
_1F1B = Formula("(S-1)(F+B)", _TABLE, lambda case: (case.num_stages - 1) * (case.f + case.b), _always)
_GPIPE = replace(_1F1B, source="Huang et al. 2019, GPipe, section 2.3")


def _interleaved_1f1b(holds: Callable[[Case], Verdict]) -> Formula:
    source = "Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters, section 2.2"
    return Formula("(R-1)(F+B)", source, lambda case: (case.num_ranks - 1) * (case.f + case.b), holds)


def _zb2p(case: Case) -> Verdict:
    if case.num_ranks == 1:
        return _EQUAL
    if not case.b_is_i_and_w:
        return Verdict("unknown", "B is not I + W here, and the schedule runs the two halves")
    if case.w > case.f:
        return Verdict("larger", "W is longer than F: a rank still computes W when an activation is due")
    if case.i < 2 * case.w:
        return Verdict("larger", _RAMP)
    if case.num_microbatches < 2 * case.num_ranks - 1:
        return Verdict("unknown", "there are too few micro-batches to fill the pipeline twice")
    return _EQUAL


def _zbv(case: Case) -> Verdict:
    return Verdict("larger", _RAMP) if case.num_ranks > 1 and case.f else Verdict("not smaller", _RAMP)


_RAMP = "it leaves out the first (R-1)F of the step, in which the last rank waits for its first activation"

FORMULAS = {
    "gpipe": _GPIPE,
    "1f1b": _1F1B,
    "interleaved-1f1b": _interleaved_1f1b(_interleaved),
    "interleaved-1f1b-overlap": _interleaved_1f1b(_interleaved_overlap),
    "zb1p": Formula(
        "(S-1)(F+B-2W)", _TABLE, lambda case: (case.num_stages - 1) * (case.f + case.b - 2 * case.w), _zb1p
    ),
    "zb2p": Formula(
        "(S-1)(F+B-3W)",
        "Qi et al. 2024, Zero Bubble Pipeline Parallelism, section 2 (ZB-H2)",
        lambda case: (case.num_stages - 1) * (case.f + case.b - 3 * case.w),
        _zb2p,
    ),
    "zbv": Formula("0", "Qi et al. 2024, Pipeline Parallelism with Controllable Memory (V-ZB)", lambda case: 0, _zbv),
    "dualpipe": _DUALPIPE,
    "dualpipev": _DUALPIPE,
}
"""By the name of the generator; one that is not in here has no formula that we could cite or prove."""


def why_no_formula(schedule: Schedule, costs: Costs) -> str | None:
    """Why there is no closed form for ``schedule`` with these costs; None if there is one."""
    if schedule.mode == "forward":
        return "closed forms are for training, and the schedule runs forwards only"
    if not costs.uniform():
        return "closed forms are for stages that all take equally long, and these differ"
    if schedule.name not in FORMULAS:
        return "no closed form is published that we could confirm"
    return None


def bubble_formula_ns(schedule: Schedule, costs: Costs) -> int | None:
    """The published closed form for ``schedule``; None where there is none, stages differ or it runs forward only."""
    if why_no_formula(schedule, costs) is not None:
        return None
    return FORMULAS[schedule.name].value_ns(Case.of(schedule, costs))
