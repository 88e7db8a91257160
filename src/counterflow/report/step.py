"""A schedule held against the time of one step: what every picture of it shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import floor, log10
from statistics import median

from counterflow.errors import ReportError
from counterflow.report.text import microseconds
from counterflow.schedule import Action, Kind, Schedule
from counterflow.timeline import COMPUTE, TWINS, Span, Timeline

KINDS = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward for input",
    Kind.W: "backward for weights",
    Kind.F_B: "overlapped forward & backward",
}

SUMS = "sum of gradients over twins"

Row = list[tuple[Action, Span]]


class Step:
    """Rows of actions with their spans, the time they take, and the shade of each.

    Raises:
        ReportError: the timeline does not hold exactly the actions of the schedule.
    """

    def __init__(self, schedule: Schedule, timeline: Timeline) -> None:
        self.schedule = schedule
        self.rows = _rows(schedule, timeline)
        self.sums: list[list[Span]] = [[] for _ in self.rows]
        for span in timeline:
            if span.lane == TWINS and span.rank < len(self.rows):
                self.sums[span.rank].append(span)
        spans = [span for row in self.rows for _, span in row]
        self.origin_ns = min(span.start_ns for span in spans)
        self.last_action_ns = max(span.end_ns for span in spans)
        end_ns = max([self.last_action_ns, *(span.end_ns for row in self.sums for span in row)])
        self.makespan_ns = end_ns - self.origin_ns
        self.unit = "ms" if self.makespan_ns >= 10_000_000 else "µs"
        self.kinds = {action.kind for row in self.rows for action, _ in row}
        self._forward_shares = _forward_shares(self.rows)
        self._entry = {
            part.microbatch: rank
            for rank, row in enumerate(self.rows)
            for action, _ in row
            for part in action.parts
            if part.kind is Kind.F and part.stage == 0
        }
        self.entries = sorted(set(self._entry.values())) if schedule.twins else []
        self._chunk = [{stage: chunk for chunk, stage in enumerate(schedule.stages_of(rank))} for rank in self.ranks]
        self.num_shades = len(self.entries) or max(map(len, self._chunk))

    @property
    def ranks(self) -> range:
        """All of them."""
        return range(len(self.rows))

    def shade(self, rank: int, part: Action) -> int:
        """Which shade tells the part: its direction where stages have twins, else its stage among the rank's."""
        if self.entries:
            entry = self._entry.get(part.microbatch)
            return self.entries.index(entry) if entry is not None else 0
        return self._chunk[rank][part.stage]

    def meaning_of_shades(self) -> list[tuple[str, str]]:
        """For each shade a text for its cell, and what it means, which may stand at the last; nothing for one shade."""
        if self.entries:
            first = {rank: min(m for m, entry in self._entry.items() if entry == rank) for rank in self.entries}
            return [(str(first[rank]), f"entered at rank {rank}") for rank in self.entries]
        if self.num_shades == 2:
            return [("0", "at a rank's first stage"), ("0", "at its second stage")]
        if self.num_shades > 2:
            return [("0", "")] * (self.num_shades - 1) + [
                ("0", f"at a rank's 1st to {_ordinal(self.num_shades)} stage")
            ]
        return []

    def parts(self, action: Action, span: Span) -> list[tuple[Action, int, int]]:
        """The simple actions in it, each with its start and end in nanoseconds from the step's start.

        Nothing tells the two apart inside a pair, so they share it as they do when they stand alone.
        """
        start, end = span.start_ns - self.origin_ns, span.end_ns - self.origin_ns
        if action.pair is None:
            return [(action, start, end)]
        forward, backward = action.pair
        middle = start + round(span.duration_ns * self._forward_shares[backward.kind])
        return [(forward, start, middle), (backward, middle, end)]

    def bubble_ns(self, rank: int) -> int:
        """The time from the first action to the last in which a rank runs none; it does one at a time."""
        return self.last_action_ns - self.origin_ns - sum(span.duration_ns for _, span in self.rows[rank])

    def bubble_share(self, rank: int) -> str:
        """The part of the step that is bubble."""
        return f"{100 * self.bubble_ns(rank) / max(self.makespan_ns, 1):.1f} %"

    def time(self, ns: int) -> str:
        """``ns`` in the step's unit: exactly where that is simulated microseconds, to a tenth in milliseconds."""
        return microseconds(ns) if self.unit == "µs" else f"{ns / 1e6:.1f}".removesuffix(".0")

    def title(self) -> str:
        """Name, mode and sizes."""
        schedule = self.schedule
        name = schedule.name if len(schedule.name) <= 40 else f"{schedule.name[:39]}…"
        mode = ", forward only" if schedule.mode == "forward" else ""
        ranks, ids = schedule.num_ranks, schedule.num_microbatches
        return f"{name}: {ranks} rank{'s' * (ranks > 1)}, {ids} micro-batch{'es' * (ids > 1)}{mode}"

    def figures(self) -> str:
        """The step's length and its bubble."""
        bubbles = [self.bubble_ns(rank) for rank in self.ranks]
        least, most = self.time(min(bubbles)), self.time(max(bubbles))
        bubble = f"{most} {self.unit} on every rank" if least == most else f"{least} to {most} {self.unit}"
        behind_ns = self.makespan_ns - (self.last_action_ns - self.origin_ns)
        sums = f", {self.time(behind_ns)} {self.unit} of it sums over twins behind the last action" if behind_ns else ""
        return f"step {self.time(self.makespan_ns)} {self.unit}{sums}, bubble {bubble}"

    def usual_shortest_ns(self) -> int:
        """A duration that nine of ten parts reach, so that one very short action does not set the scale."""
        durations = sorted(
            end - start
            for row in self.rows
            for action, span in row
            for _, start, end in self.parts(action, span)
            if end > start
        )
        return durations[len(durations) // 10] if durations else 1


def nice(least: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ... that is not below ``least``.

    Example:
        >>> nice(0.3), nice(12), nice(5000)
        (1, 20, 5000)
    """
    unit = int(10 ** max(floor(log10(least)), 0))
    return next(step for step in (unit, 2 * unit, 5 * unit, 10 * unit) if step >= least)


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"


def _rows(schedule: Schedule, timeline: Timeline) -> list[Row]:
    """The schedule's actions with their spans, each rank's in time."""
    actions = {(rank, str(action)): action for rank, row in enumerate(schedule.rows) for action in row}
    spans = [span for span in timeline if span.lane == COMPUTE]
    found = Counter((span.rank, span.name) for span in spans)
    wanted = Counter((rank, str(action)) for rank, row in enumerate(schedule.rows) for action in row)
    if different := (found - wanted) + (wanted - found):
        rank, name = min(different)
        raise ReportError(
            f"the timeline has {name!r} {found[rank, name]} times on rank {rank} and {schedule.name} has it "
            f"{wanted[rank, name]} times; give one step of this very schedule, as simulate returns it"
        )
    rows: list[Row] = [[] for _ in schedule.rows]
    for span in spans:
        rows[span.rank].append((actions[span.rank, span.name], span))
    return rows


def _forward_shares(rows: list[Row]) -> dict[Kind, float]:
    """For an overlapped B or I, the part of the pair that its forward is drawn with."""
    durations = defaultdict[Kind, list[int]](list)
    for row in rows:
        for action, span in row:
            durations[action.kind].append(span.duration_ns)
    shares = {Kind.B: 1 / 3, Kind.I: 1 / 2}
    for kind in shares:
        if durations[Kind.F] and durations[kind]:
            forward, backward = median(durations[Kind.F]), median(durations[kind])
            shares[kind] = forward / (forward + backward) if forward + backward else shares[kind]
    return shares
