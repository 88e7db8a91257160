"""Hypothesis strategies that several tests share: actions, schedules that run and that need not, costs, timelines."""

import random

from hypothesis import strategies as st

from counterflow import Action, Costs, Schedule, Timeline
from counterflow.schedule import GENERATORS, Kind, generate
from counterflow.timeline import COMPUTE, Span

# --- actions and any schedules ------------------------------------------------------------------------------

numbers = st.integers(0, 30) | st.integers(0, 999_999)


@st.composite
def overlapped_actions(draw: st.DrawFn) -> Action:
    forward, backward = draw(st.lists(numbers, min_size=2, max_size=2, unique=True))
    return Action.overlap(
        Action(Kind.F, draw(numbers), forward),
        Action(draw(st.sampled_from([Kind.B, Kind.I])), draw(numbers), backward),
    )


simple_actions = st.builds(Action, st.sampled_from([Kind.F, Kind.B, Kind.I, Kind.W]), numbers, numbers)
actions = simple_actions | overlapped_actions()
names = st.text(max_size=20)

any_rows = st.lists(st.lists(actions, max_size=8), min_size=1, max_size=6).filter(any)
schedules_read_off_rows = st.builds(Schedule.from_rows, any_rows, names)
"""Most of them would not run."""


@st.composite
def any_schedules(draw: st.DrawFn) -> Schedule:
    """Also with more stages and micro-batches than the rows use; most of them would not run."""
    read = draw(schedules_read_off_rows)
    return Schedule(
        rows=read.rows,
        num_stages=read.num_stages + draw(st.integers(0, 3)),
        num_microbatches=read.num_microbatches + draw(st.integers(0, 3)),
        mode=read.mode if read.mode == "train" else draw(st.sampled_from(["train", "forward"])),
        name=read.name,
    )


# --- schedules that run -------------------------------------------------------------------------------------


def legal_sizes(most_ranks: int, most_microbatches: int) -> list[tuple[str, int, int]]:
    """Generator, ranks and micro-batches, wherever the generator exists."""
    return [
        (name, num_ranks, num_microbatches)
        for name in GENERATORS
        for num_ranks in range(1, most_ranks + 1)
        for num_microbatches in range(1, most_microbatches + 1)
        if not name.startswith("dualpipe") or num_microbatches >= 2 * num_ranks
        if name != "dualpipe" or num_ranks % 2 == num_microbatches % 2 == 0
        if not name.startswith("interleaved") or num_microbatches % max(1, num_microbatches // num_ranks) == 0
    ]


def generated_schedules(most_ranks: int = 6, most_microbatches: int = 12) -> st.SearchStrategy[Schedule]:
    return st.sampled_from(legal_sizes(most_ranks, most_microbatches)).map(lambda size: generate(*size))


def random_runnable(
    seed: int, num_ranks: int, num_stages: int, num_microbatches: int, stage_stays: bool = False
) -> Schedule:
    """All actions in a random order in which each comes after what it needs, dealt to random ranks.

    Two that are free at the same time, a forward and a backward of one rank, are sometimes fused. With
    ``stage_stays`` a stage has one rank, otherwise every stage and micro-batch has its own.
    """
    rng = random.Random(seed)
    cells = [(stage, microbatch) for microbatch in range(num_microbatches) for stage in range(num_stages)]
    rank_of_stage = [rng.randrange(num_ranks) for _ in range(num_stages)]
    rank_of = {cell: rank_of_stage[cell[0]] if stage_stays else rng.randrange(num_ranks) for cell in cells}
    backward_of = {cell: rng.choice([Kind.B, Kind.I]) for cell in cells}
    last = num_stages - 1

    def needed(action: Action) -> list[Action]:
        stage, microbatch = action.stage, action.microbatch
        match action.kind:
            case Kind.F:
                return [Action(Kind.F, stage - 1, microbatch)] if stage else []
            case Kind.W:
                return [Action(Kind.I, stage, microbatch)]
        above = (stage + 1, microbatch)
        return [Action(Kind.F, stage, microbatch), *([Action(backward_of[above], *above)] if stage < last else [])]

    todo = [Action(kind, *cell) for cell in cells for kind in (Kind.F, backward_of[cell])]
    todo += [Action(Kind.W, *cell) for cell in cells if backward_of[cell] is Kind.I]
    done: set[Action] = set()
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    while todo:
        free = [action for action in todo if done.issuperset(needed(action))]
        chosen = rng.choice(free)
        rank = rank_of[chosen.stage, chosen.microbatch]
        partners = [
            other
            for other in free
            if other.kind.sends_gradient
            and other.microbatch != chosen.microbatch
            and rank_of[other.stage, other.microbatch] == rank
        ]
        if chosen.kind is Kind.F and partners and rng.random() < 0.7:
            chosen = Action.overlap(chosen, rng.choice(partners))
        rows[rank].append(chosen)
        done.update(chosen.parts)
        todo = [action for action in todo if action not in chosen.parts]
    return Schedule.from_rows(rows, "random")


def random_schedules(most_ranks: int = 4, most_stages: int = 4, most_microbatches: int = 4):
    return st.builds(
        random_runnable,
        seed=st.integers(0, 2**32),
        num_ranks=st.integers(1, most_ranks),
        num_stages=st.integers(1, most_stages),
        num_microbatches=st.integers(1, most_microbatches),
        stage_stays=st.booleans(),
    )


runnable_schedules = generated_schedules() | random_schedules() | random_schedules().map(Schedule.forward_only)


# --- costs --------------------------------------------------------------------------------------------------

# Whole nanoseconds, so that adding them up is exact.
durations_us = st.integers(0, 5_000).map(lambda ns: ns / 1000)


@st.composite
def costs_of(draw: st.DrawFn, num_stages: int) -> Costs:
    """Every duration stated, alike or not from stage to stage; sometimes latency, sometimes bandwidth."""

    def for_stages(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[object]:
        return numbers | st.lists(numbers, min_size=num_stages, max_size=num_stages).map(tuple)

    bytes_ = for_stages(st.integers(0, 5_000))
    return Costs(
        forward_us=draw(for_stages(durations_us)),
        backward_us=draw(for_stages(durations_us)),
        input_us=draw(for_stages(durations_us)),
        weight_us=draw(for_stages(durations_us)),
        overlapped_us=draw(for_stages(durations_us) | st.none()),
        latency_us=draw(st.just(0.0) | durations_us),
        bandwidth_gb_per_s=draw(st.none() | st.sampled_from([0.5, 1, 7])),
        transfer_bytes=draw(bytes_),
        freed_at_input_bytes=draw(bytes_),
        freed_at_weight_bytes=draw(bytes_),
        twins_us=draw(st.just(0.0) | for_stages(durations_us)),
    )


# --- timelines ----------------------------------------------------------------------------------------------


@st.composite
def spans(draw: st.DrawFn, origin_ns: int = 0, longest_ns: int = 50) -> Span:
    start = origin_ns + draw(st.integers(0, longest_ns))
    return Span(
        rank=draw(st.integers(0, 4)),
        name=draw(st.sampled_from(["0F0", "(0F1;7B0)OVERLAP_F_B"]) | names),
        start_ns=start,
        end_ns=start + draw(st.integers(0, longest_ns)),
        lane=draw(st.sampled_from([COMPUTE, "communication"]) | names),
    )


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    origin_ns = draw(st.sampled_from([0, -17, 1_700_000_000_000_000_000]))
    longest_ns = draw(st.sampled_from([10, 10**6, 2**40 * 1000]))
    return Timeline.from_spans(draw(st.lists(spans(origin_ns, longest_ns), max_size=12)))
