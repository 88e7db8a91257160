"""Simulated time against the longest paths through a graph, and what must hold of any timeline."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow import Action, Costs, Schedule, Timeline, dualpipe, dualpipev, gpipe, one_f_one_b, simulate
from counterflow.errors import CounterflowError, ScheduleError, SimulatorError
from counterflow.schedule import Kind, Transfer, from_text
from counterflow.timeline import COMPUTE, TWINS, Span
from strategies import costs_of, runnable_schedules

# --- the slow reference -------------------------------------------------------------------------------------


def messages_of(schedule: Schedule) -> dict[tuple[int, int], list[tuple[Transfer, int, int]]]:
    """For each pair of ranks its messages in the order of their sends, with the steps that make and use them."""
    found = defaultdict(list)
    for source, makers in enumerate(schedule.rows):
        for made, maker in enumerate(makers):
            for part in maker.parts:  # an F&B's forward comes first
                for target, users in enumerate(schedule.rows):
                    for used, user in enumerate(users):
                        for other in user.parts if source != target else ():
                            if part.microbatch != other.microbatch:
                                continue
                            cell = part.stage, part.microbatch, source, target
                            if part.kind is other.kind is Kind.F and other.stage == part.stage + 1:
                                found[source, target].append((Transfer("activation", *cell), made, used))
                            gradient = part.kind.sends_gradient and other.kind.sends_gradient
                            if gradient and other.stage == part.stage - 1:
                                found[source, target].append((Transfer("gradient", *cell), made, used))
    return found


def longest_paths(schedule: Schedule, costs: Costs) -> Timeline:
    """Each event is as late as the latest of what it comes after; raised until nothing changes any more.

    An action ends its duration after the end of the one before it and after its messages have arrived. A message
    starts once its maker has ended, once the receiver has come to the action before the one that uses it or
    a later message of the channel, and once the one before it has left the channel.
    """
    end = {(rank, step): 0 for rank, row in enumerate(schedule.rows) for step in range(-1, len(row))}
    channels = messages_of(schedule)
    changed = True
    while changed:
        changed = False
        arrival: dict[tuple[int, int], int] = defaultdict(int)
        for (source, target), messages in channels.items():
            free = 0
            for index, (transfer, made, used) in enumerate(messages):
                first_use = min(later_use for _, _, later_use in messages[index:])
                receiver_is_there = end[target, max(first_use - 1, 0) - 1]
                free = max(free, end[source, made], receiver_is_there) + costs.wire_ns(transfer)
                arrival[target, used] = max(arrival[target, used], free + costs.latency_ns)
        for rank, row in enumerate(schedule.rows):
            for step, action in enumerate(row):
                later = max(end[rank, step - 1], arrival[rank, step]) + costs.duration_ns(action)
                changed |= later != end[rank, step]
                end[rank, step] = later
    spans = [
        Span(rank, str(action), end[rank, step] - costs.duration_ns(action), end[rank, step])
        for rank, row in enumerate(schedule.rows)
        for step, action in enumerate(row)
    ]
    done = {rank: end[rank, len(row) - 1] for rank, row in enumerate(schedule.rows)}
    for stage in range(schedule.num_stages if schedule.mode == "train" else 0):
        holders = schedule.ranks_of(stage)
        start = max(done[rank] for rank in holders)
        if len(holders) > 1 and costs.twins_ns(stage):
            done |= dict.fromkeys(holders, start + costs.twins_ns(stage))
            spans += [Span(rank, f"twins of stage {stage}", start, done[rank], TWINS) for rank in holders]
    return Timeline.from_spans(spans)


def actions_alone(timeline: Timeline) -> list[Span]:
    return [span for span in timeline if span.lane == COMPUTE]


@st.composite
def schedules_with_costs(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    schedule = draw(runnable_schedules)
    return schedule, draw(costs_of(schedule.num_stages))


@settings(max_examples=200)
@given(schedules_with_costs())
def test_simulated_time_is_that_of_the_longest_paths(case: tuple[Schedule, Costs]) -> None:
    assert simulate(*case) == longest_paths(*case)


# --- any timeline -------------------------------------------------------------------------------------------


@given(schedules_with_costs())
def test_every_action_stands_once_on_the_compute_lane_of_its_rank_for_as_long_as_it_costs(
    case: tuple[Schedule, Costs],
) -> None:
    schedule, costs = case
    timeline = simulate(schedule, costs)
    assert sorted((span.rank, span.name, span.duration_ns) for span in actions_alone(timeline)) == sorted(
        (rank, str(action), costs.duration_ns(action)) for rank, row in enumerate(schedule.rows) for action in row
    )


@given(schedules_with_costs())
def test_a_rank_does_one_thing_at_a_time_in_the_order_of_its_row(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    when = {(span.rank, span.name): span for span in simulate(schedule, costs)}
    for rank, row in enumerate(schedule.rows):
        spans = [when[rank, str(action)] for action in row]
        assert all(later.start_ns >= earlier.end_ns for earlier, later in zip(spans, spans[1:], strict=False))


@given(schedules_with_costs())
def test_nothing_starts_before_what_it_needs_has_ended_and_travelled(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    when = {(span.rank, span.name): span for span in simulate(schedule, costs)}
    for (source, target), messages in messages_of(schedule).items():
        for transfer, made, used in messages:
            maker = when[source, str(schedule.rows[source][made])]
            user = when[target, str(schedule.rows[target][used])]
            assert user.start_ns >= maker.end_ns + costs.wire_ns(transfer) + costs.latency_ns


@given(schedules_with_costs())
def test_a_bubble_is_the_time_of_the_step_in_which_a_rank_computes_nothing(case: tuple[Schedule, Costs]) -> None:
    timeline = simulate(*case)
    busy_ns = [0] * timeline.num_ranks
    spans = actions_alone(timeline)
    for span in spans:
        busy_ns[span.rank] += span.duration_ns
    step_ns = max(span.end_ns for span in spans) - min(span.start_ns for span in spans)
    assert timeline.bubble_ns().tolist() == [step_ns - busy for busy in busy_ns]
    assert timeline.makespan_ns == max(span.end_ns for span in timeline) - min(span.start_ns for span in timeline)


@given(schedules_with_costs(), st.integers(2, 9))
def test_with_all_costs_a_multiple_all_times_are(case: tuple[Schedule, Costs], factor: int) -> None:
    schedule, costs = case
    costs = replace(costs, bandwidth_gb_per_s=None)  # a transfer's time is rounded to nanoseconds

    def times(value: object) -> object:
        if value is None:
            return None
        return tuple(map(times, value)) if isinstance(value, tuple) else value * factor

    durations = ("forward_us", "backward_us", "input_us", "weight_us", "overlapped_us", "latency_us", "twins_us")
    longer = replace(costs, **{name: times(getattr(costs, name)) for name in durations})
    assert list(simulate(schedule, longer)) == [
        span._replace(start_ns=span.start_ns * factor, end_ns=span.end_ns * factor)
        for span in simulate(schedule, costs)
    ]


@given(schedules_with_costs(), st.sampled_from(["latency_us", "forward_us", "weight_us", "transfer_bytes"]))
def test_nothing_ends_earlier_when_something_costs_more(case: tuple[Schedule, Costs], name: str) -> None:
    schedule, costs = case
    value = getattr(costs, name)
    dearer = replace(costs, **{name: tuple(v + 1 for v in value) if isinstance(value, tuple) else value + 1})
    before = {(span.rank, span.name): span.end_ns for span in simulate(schedule, costs)}
    after = {(span.rank, span.name): span.end_ns for span in simulate(schedule, dearer)}
    assert all(after[key] >= before[key] for key in before)


@given(schedules_with_costs())
def test_forward_only_takes_no_longer_than_the_whole_where_transfers_cost_nothing(
    case: tuple[Schedule, Costs],
) -> None:
    schedule, costs = case
    # An F&B that is faster than its forward alone would be the exception.
    costs = replace(costs, overlapped_us=None, latency_us=0, bandwidth_gb_per_s=None)
    assert simulate(schedule.forward_only(), costs).makespan_ns <= simulate(schedule, costs).makespan_ns


# --- channels -----------------------------------------------------------------------------------------------


def starts_us(schedule: Schedule, costs: Costs) -> dict[str, float]:
    return {span.name: span.start_ns / 1000 for span in simulate(schedule, costs)}


def test_messages_of_a_channel_go_one_after_the_other_and_then_fly_together() -> None:
    schedule = from_text("0F0 0F1 0F2\n1F0 1F1 1F2")
    starts = starts_us(schedule, Costs(forward_us=1, latency_us=10, bandwidth_gb_per_s=1, transfer_bytes=3000))
    # The third one is received from the end of 1F0 on, at 15.
    assert [starts[name] for name in ("1F0", "1F1", "1F2")] == [1 + 3 + 10, 4 + 3 + 10, 15 + 3 + 10]


def test_a_receive_that_is_posted_late_starts_late() -> None:
    # Rank 1 posts the receive of 0F1 only when it comes to 1F0, one action ahead: at 1 + 5, not at 2.
    schedule = from_text("0F0 0F1\n1F0 1F1")
    starts = starts_us(schedule, Costs(forward_us=(1, 4), latency_us=0, bandwidth_gb_per_s=1, transfer_bytes=(5000, 0)))
    assert starts == {"0F0": 0, "0F1": 1, "1F0": 6, "1F1": 11}


def test_both_directions_of_a_pair_of_ranks_are_channels_of_their_own() -> None:
    costs = Costs(forward_us=1, bandwidth_gb_per_s=1, transfer_bytes=5000)
    one_way = starts_us(from_text("0F0\n1F0"), costs)
    both_ways = starts_us(from_text("0F0 1F1\n0F1 1F0"), costs)
    assert one_way["1F0"] == both_ways["1F0"] == both_ways["1F1"] == 6


def test_a_transfer_has_the_size_of_the_boundary_that_it_crosses() -> None:
    costs = Costs(forward_us=1, backward_us=1, bandwidth_gb_per_s=1, transfer_bytes=(2000, 5000, 0))
    starts = starts_us(from_text("0F0 0B0\n1F0 1B0\n2F0 2B0"), costs)
    assert starts == {"0F0": 0, "1F0": 3, "2F0": 9, "2B0": 10, "1B0": 16, "0B0": 19}


# --- the published figures ----------------------------------------------------------------------------------

HALF = Costs(forward_us=0.5, backward_us=1, weight_us=0.5, overlapped_us=1.2)
"""Stages half as large: DualPipeV puts two of them on each of as many ranks."""
FULL = Costs(forward_us=1, backward_us=2, weight_us=1, overlapped_us=2.4)


@pytest.mark.parametrize(
    ("schedule", "costs", "makespan_us"),
    [
        (dualpipe(8, 20), FULL, 57.6),
        (dualpipe(8, 20), replace(FULL, latency_us=0.1), 60.2),
        (dualpipev(8, 20), HALF, 58.0),
        (dualpipev(8, 20), replace(HALF, latency_us=0.1), 63.5),
        (dualpipe(8, 16), FULL, 48.0),
        (dualpipev(8, 16), HALF, 48.4),
        (dualpipe(8, 16), replace(FULL, overlapped_us=3), 54.0),
        (dualpipev(8, 16), replace(HALF, overlapped_us=1.5), 55.0),
    ],
)
def test_measured_makespans(schedule: Schedule, costs: Costs, makespan_us: float) -> None:
    assert simulate(schedule, costs).makespan_ns / 1000 == makespan_us


def test_the_zero_bubble_tables_rates() -> None:
    thirds = Costs(forward_us=1, backward_us=2, weight_us=1)
    for num_ranks, num_microbatches in [(4, 8), (8, 24), (8, 100)]:
        timeline = simulate(one_f_one_b(num_ranks, num_microbatches), thirds)
        rate = timeline.bubble_ns().max() / timeline.makespan_ns
        assert rate == (num_ranks - 1) / (num_microbatches + num_ranks - 1)


# --- what is refused ----------------------------------------------------------------------------------------


def test_what_would_not_run_is_not_simulated() -> None:
    with pytest.raises(ScheduleError, match="0B0 stands before its forward 0F0"):
        simulate(from_text("0B0 0F0"), Costs())


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (
            Costs(forward_us=1),
            "the costs do not say how long 0B0 takes; give backward_us for stage 0",
        ),
        (
            Costs(forward_us=(1, None), backward_us=2),
            "the costs do not say how long 1F0 takes; give forward_us for stage 1",
        ),
        (
            Costs(forward_us=(1,), backward_us=(2,)),
            "the costs name 1 stages and the schedule has a stage 1; give one number for each stage",
        ),
    ],
)
def test_costs_that_do_not_cover_the_schedule_are_told(costs: Costs, message: str) -> None:
    with pytest.raises(SimulatorError) as caught:
        simulate(gpipe(2, 2), costs)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "costs",
    [
        Costs(forward_us=1e18, backward_us=1e18),
        Costs(latency_us=1e18),
        Costs(bandwidth_gb_per_s=1e-9, transfer_bytes=1e18),
        Costs(forward_us=3e15, backward_us=0),
    ],
)
def test_times_beyond_the_calendar_are_refused(costs: Costs) -> None:
    with pytest.raises(CounterflowError, match="more than 146 years"):
        simulate(gpipe(2, 2), costs)


def test_actions_are_named_as_in_the_schedule() -> None:
    names = {span.name for span in simulate(dualpipe(4, 8), Costs())}
    assert {Action.parse(name) for name in names} == {action for row in dualpipe(4, 8).rows for action in row}
