"""A pipeline's steps out of the traces of its ranks: the schedule that ran, and when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from counterflow.errors import ScheduleError, TraceError
from counterflow.schedule import GENERATORS, Action, Schedule, check, generate
from counterflow.timeline import Span, Timeline
from counterflow.trace.alignment import Alignment
from counterflow.trace.boundaries import boundary_bytes
from counterflow.trace.messages import Message, messages, unheard
from counterflow.trace.needs import align_by_needs
from counterflow.trace.ranges import EXECUTOR, TIMELINE, Ran, Ranges, ranges
from counterflow.trace.read import Trace
from counterflow.trace.rounds import RankRow, actions_of, commonest, whole_rows
from counterflow.trace.rules import Rules
from counterflow.trace.side_by_side import align_ranks, of_ranks, rank_of
from counterflow.trace.sums import Stretch, stretches, sums_after


@dataclass(frozen=True, eq=False)
class MeasuredPipeline:
    """What the ranks of a pipeline did in each of the steps that were recorded whole.

    ``named_by`` says whose ranges these are. ``schedule`` has the rows as they ran; ``problem`` says why ``check``
    refuses it, None where it is whole. ``steps`` are timelines on one clock, see ``alignment``; ``cut`` counts the
    actions outside them. ``files`` and ``ranks`` name the traces, rank by rank; a trace of all ranks stands for each.
    ``boundary_bytes`` is for each stage what its forwards send on, empty where no sizes were recorded. ``sums`` are
    those of gradients over twins behind all steps; a trace of all ranks does not tell whose they are.
    """

    named_by: str
    schedule: Schedule
    problem: str | None
    steps: tuple[Timeline, ...]
    cut: int
    files: tuple[str, ...]
    ranks: tuple[int, ...]
    alignment: Alignment
    boundary_bytes: tuple[float | None, ...] = ()
    sums: tuple[Span, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def every_step(self) -> Timeline:
        """All steps in one timeline, behind one another: what costs are read from."""
        return Timeline.from_spans(span for step in self.steps for span in step)

    @property
    def mean_step(self) -> Timeline:
        """The step whose actions start and end at the means over all steps, each counted from its first action."""
        starts, ends = defaultdict[tuple[int, str], list[int]](list), defaultdict[tuple[int, str], list[int]](list)
        for step in self.steps:
            origin = int(step.start_ns.min())
            for span in step:
                starts[span.rank, span.name].append(span.start_ns - origin)
                ends[span.rank, span.name].append(span.end_ns - origin)
        return Timeline.from_spans(
            Span(*key, round(sum(some) / len(some)), round(sum(ends[key]) / len(some))) for key, some in starts.items()
        )


def measured_pipeline(
    traces: Sequence[Trace], schedule: Schedule | None = None, rules: Rules | None = None
) -> MeasuredPipeline | None:
    """The pipeline that ran under these traces, those of each rank in the pipeline's order; None without named actions.

    Ranges name the actions (see ``counterflow.trace.ranges``), and the order in which they opened is the rank's row.
    Several traces that name the same rank are cycles of its profile.
    A single trace of all ranks in one process, as ``Pipeline.in_process`` gives it, needs the ``schedule`` that ran:
    the ranges alone do not tell which rank was at work. Ranks are put on one clock by the collectives that they share,
    else by what their actions need of each other: nothing is used before it is made. ``rules`` tell which kernels
    communicate.

    Raises:
        TraceError: two traces have the same action, one has no whole step, or the schedule is not what ran.

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow import Costs, one_f_one_b, open_trace, simulate
        >>> from counterflow.timeline import write_chrome
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "step.json"
        >>> write_chrome(simulate(one_f_one_b(2, 4), Costs()), path)
        >>> found = measured_pipeline([open_trace(path)])
        >>> print(found.schedule, found.steps[0].bubble_ns().tolist())
        0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3
        1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3 [3000, 3000]
    """
    rules = rules or Rules()
    recorded = [
        _Recorded(place, trace, said := messages(trace), ranges(trace, said, place, rules), stretches(trace))
        for place, group in enumerate(of_ranks(traces))
        for trace in group
    ]
    found = [one.ranges for one in recorded if one.ranges is not None]
    if not found:
        return None
    lacking = [one.trace.file for one in recorded if one.ranges is None]
    if lacking:
        named = next(one.trace.file for one in recorded if one.ranges is not None)
        raise TraceError(f"{lacking[0]} names no actions and {named} does; give one kind")
    aligned = align_ranks([(one.place, one.trace, one.said) for one in recorded])
    steps = _steps(list(_by_rank(recorded, aligned, schedule)))
    if aligned.basis == "none" and len(aligned.offsets_us) > 1:
        aligned = align_by_needs(steps)
        steps = [[row.shifted(int(aligned.offsets_ns[row.place])) for row in step] for step in steps]
    rows = [[ran.action for ran in row.ran] for row in steps[0]]
    measured = _named(Schedule.from_rows(rows)) if schedule is None else _required(rows, schedule)
    problem = _problem(measured)
    kept = sum(len(row.ran) for step in steps for row in step)
    return MeasuredPipeline(
        named_by=found[0].named_by,
        schedule=measured,
        problem=problem,
        steps=tuple(_timeline(step) for step in steps),
        cut=sum(len(one.ran) for one in found) - kept,
        files=tuple(row.file for row in steps[0]),
        ranks=tuple(row.rank for row in steps[0]),
        alignment=aligned,
        boundary_bytes=boundary_bytes(
            [one.trace for one in recorded], [one.said for one in recorded], found, measured.num_stages
        ),
        sums=tuple(span for step in steps for span in _sums(step, recorded, aligned)),
        warnings=tuple(_warnings([one.trace for one in recorded], found, measured, problem)),
    )


class _Recorded(NamedTuple):
    """A trace with what is in it; ``place`` is its rank's place among the ranks."""

    place: int
    trace: Trace
    said: list[Message]
    ranges: Ranges | None
    sums: list[Stretch]


def _by_rank(
    recorded: Sequence[_Recorded], aligned: Alignment, schedule: Schedule | None
) -> Iterator[tuple[tuple[int, int], RankRow]]:
    """What each rank did in each of its files, on one clock; the first two numbers tell the ranks apart."""
    alone = len(aligned.offsets_us) == 1
    for place, trace, _, read, _ in recorded:
        ran = () if read is None else read.ran
        devices = sorted({one.device for one in ran})
        if devices == [-1] and alone and schedule is not None:
            dealt = _dealt(trace, ran, schedule)
        else:
            dealt = {device: tuple(one for one in ran if one.device == device) for device in devices}
        for part, some in dealt.items():
            rank = rank_of(trace, place) if len(dealt) == 1 else part
            yield (place, part), RankRow(place, rank, trace.file, some).shifted(int(aligned.offsets_ns[place]))


def _dealt(trace: Trace, ran: tuple[Ran, ...], schedule: Schedule) -> dict[int, tuple[Ran, ...]]:
    """What one process did for all ranks, dealt out by the schedule."""
    holder = {action: rank for rank, row in enumerate(schedule.rows) for action in row}
    unknown = next((one.action for one in ran if one.action not in holder), None)
    if unknown is not None:
        raise TraceError(f"{trace.file} has {unknown}, which {schedule.name} has not; give the schedule that ran")
    return {rank: tuple(one for one in ran if holder[one.action] == rank) for rank in range(schedule.num_ranks)}


def _steps(every: list[tuple[tuple[int, int], RankRow]]) -> list[list[RankRow]]:
    """For each step the row of each rank."""
    parts: dict[tuple[int, int], list[RankRow]] = {}
    for key, row in every:
        parts.setdefault(key, []).append(row)
    whole = []
    for files in parts.values():
        rows = [row._replace(ran=some) for row in files for some in whole_rows(row.ran)]
        if not rows:
            raise TraceError(
                f"{files[0].file} holds no whole step: of {len(files[0].ran)} actions no row has every forward "
                "with its backward; profile at least one step from its first action to its last"
            )
        usual = commonest([row.ran for row in rows])
        whole.append([row for row in rows if actions_of(row.ran) == usual])
    _require_one_pipeline(whole)
    numbers = {len(rows) for rows in whole}
    side_by_side = [list(step) for step in zip(*whole, strict=True)] if len(numbers) == 1 else []
    if side_by_side and all(_overlap_ns(step[0], other) > 0 for step in side_by_side for other in step):
        return side_by_side
    # Ranks that take turns in one process may never be at work at the same time.
    steps = _meeting(whole) or side_by_side
    if not steps:
        raise TraceError(
            f"{whole[0][0].file} and the other traces hold no step at the same time; give traces of one run"
        )
    return steps


def _meeting(whole: list[list[RankRow]]) -> list[list[RankRow]]:
    """The steps of the rank with the fewest, with what the others did meanwhile; not those where one did nothing."""
    least = min(whole, key=len)
    steps = [[max(rows, key=partial(_overlap_ns, row)) for rows in whole] for row in least]
    return [step for row, step in zip(least, steps, strict=True) if all(_overlap_ns(row, one) > 0 for one in step)]


def _require_one_pipeline(whole: list[list[RankRow]]) -> None:
    holders: dict[Action, str] = {}
    for rows in whole:
        file = rows[0].file
        for one in rows[0].ran:
            other = holders.setdefault(one.action, file)
            if other != file:
                raise TraceError(
                    f"{other} and {file} both have {one.action}; in one pipeline every action runs on one rank: give "
                    "the traces of one of them"
                )


def _overlap_ns(row: RankRow, other: RankRow) -> int:
    return min(row.ran[-1].end_ns, other.ran[-1].end_ns) - max(row.ran[0].start_ns, other.ran[0].start_ns)


def _required(rows: list[list[Action]], schedule: Schedule) -> Schedule:
    """The schedule that was given, in the mode that ran."""
    for known in (schedule, schedule.forward_only()):
        if known.rows == Schedule.from_rows(rows).rows:
            return known
    pairs = ((rank, row, given) for rank, (row, given) in enumerate(zip_longest(rows, schedule.rows, fillvalue=())))
    rank, row, given = next((rank, row, given) for rank, row, given in pairs if tuple(row) != tuple(given))
    step = next(step for step, (one, other) in enumerate(zip_longest(row, given)) if one != other)
    ran, wanted = (str(some[step]) if step < len(some) else "nothing" for some in (row, given))
    raise TraceError(
        f"rank {rank}, step {step}: the traces have {ran} where {schedule.name} has {wanted}; "
        "give the schedule that ran"
    )


def _named(schedule: Schedule) -> Schedule:
    """Under the name of the generator that gives these very rows, if there is one."""
    if schedule.num_ranks * schedule.num_microbatches > schedule.rows.num_actions:
        return schedule  # no generator gives so few actions
    for name in GENERATORS:
        try:
            known = generate(name, schedule.num_ranks, schedule.num_microbatches)
        except ScheduleError:
            continue
        if schedule in (known, known.forward_only()):
            return replace(schedule, name=name)
    return schedule


def _sums(step: list[RankRow], recorded: Sequence[_Recorded], aligned: Alignment) -> Iterator[Span]:
    """The sums over twins that each rank made behind this step, where it has a trace of its own."""
    files = [row.file for row in step]
    by_file = {one.trace.file: one for one in recorded}
    for rank, row in enumerate(step):
        one = by_file[row.file]
        if files.count(row.file) == 1 and one.ranges is not None:
            later = [ran.opened_ns for ran in one.ranges.ran]
            offset = int(aligned.offsets_ns[row.place])
            yield from sums_after(one.sums, row.ran[-1].opened_ns, later, rank, offset)


def _timeline(step: list[RankRow]) -> Timeline:
    return Timeline.from_spans(
        Span(rank, ran.text, ran.start_ns, ran.end_ns) for rank, row in enumerate(step) for ran in row.ran
    )


def _problem(schedule: Schedule) -> str | None:
    try:
        check(schedule)
    except ScheduleError as error:
        return str(error)
    return None


def _warnings(traces: Sequence[Trace], found: list[Ranges], schedule: Schedule, problem: str | None) -> Iterator[str]:
    if problem is not None:
        yield f"the rows are no whole schedule ({problem}): waits for ranks without a trace cannot be named"
    if schedule.num_ranks == 1 and schedule.num_stages > 1:
        yield (
            f"{traces[0].file} has all {schedule.num_stages} stages and is taken for one rank; if several ranks ran in "
            "one process, give the schedule that ran"
        )
    yield from unheard(traces)
    if any(one.on_gpu for one in found) != all(one.on_gpu for one in found):
        yield "some traces have GPU work and some have not: their actions are measured on different clocks"
    if found[0].named_by not in (EXECUTOR, TIMELINE) and not found[0].on_gpu:
        yield (
            "torch's ranges begin with the wait for what an action needs: it is taken off by gloo's receives, and "
            "what else a range does beside computing is not"
        )
