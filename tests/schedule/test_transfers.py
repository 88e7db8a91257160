"""The lowering keeps its four rules, for generated schedules and for any other that runs."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, Schedule, Timeline, dualpipe, simulate
from counterflow.errors import ScheduleError
from counterflow.schedule import Action, Kind, Post, Run, Transfer, Transfers, Wait, check, from_text, lower
from counterflow.schedule.transfers import Program
from counterflow.timeline import Span
from strategies import costs_of, runnable_schedules

# --- what should flow, read off the rows alone --------------------------------------------------------------


def places(schedule: Schedule) -> dict[Action, tuple[int, int]]:
    return {
        part: (rank, step)
        for rank, row in enumerate(schedule.rows)
        for step, action in enumerate(row)
        for part in action.parts
    }


def flows(schedule: Schedule) -> dict[Transfer, tuple[int, int]]:
    """For each transfer the step that makes it, on its source, and the step that uses it, on its target."""
    place, found = places(schedule), {}
    for maker, (source, made) in place.items():
        for user, (target, used) in place.items():
            if source == target or maker.microbatch != user.microbatch:
                continue
            if maker.kind is user.kind is Kind.F and user.stage == maker.stage + 1:
                found[Transfer("activation", maker.stage, maker.microbatch, source, target)] = made, used
            if maker.kind.sends_gradient and user.kind.sends_gradient and user.stage == maker.stage - 1:
                found[Transfer("gradient", maker.stage, maker.microbatch, source, target)] = made, used
    return found


def sending_order(transfer: Transfer, made: int) -> tuple[int, bool]:
    """An F&B may send both ways over one channel; its activation then goes first."""
    return made, transfer.payload == "gradient"


def slots(program: Program) -> list[list[Post | Wait]]:
    """What stands before each action, and behind the last."""
    cut: list[list[Post | Wait]] = [[]]
    for instruction in program:
        if isinstance(instruction, Run):
            cut.append([])
        else:
            cut[-1].append(instruction)
    return cut


def slot_of(program: Program, transfer: Transfer, kind: type[Post] | type[Wait]) -> int:
    found = [
        slot
        for slot, instructions in enumerate(slots(program))
        for instruction in instructions
        if isinstance(instruction, kind)
        if transfer in (instruction.transfers if isinstance(instruction, Post) else (instruction.transfer,))
    ]
    assert len(found) == 1
    return found[0]


# --- the rules ----------------------------------------------------------------------------------------------


@given(runnable_schedules)
def test_programs_run_their_rows_and_transfer_what_has_to_flow(schedule: Schedule) -> None:
    programs = lower(schedule).programs
    assert len(programs) == schedule.num_ranks
    expected = flows(schedule)
    for rank, program in enumerate(programs):
        assert tuple(i.action for i in program if isinstance(i, Run)) == schedule.rows[rank]
        posted = [transfer for i in program if isinstance(i, Post) for transfer in i.transfers]
        waited = [i.transfer for i in program if isinstance(i, Wait)]
        mine = {transfer for transfer in expected if rank in (transfer.source, transfer.target)}
        assert sorted(posted) == sorted(waited) == sorted(mine)


@given(runnable_schedules)
def test_between_two_actions_stands_one_batch_of_posts_and_then_the_waits(schedule: Schedule) -> None:
    for program in lower(schedule).programs:
        for instructions in slots(program):
            assert not any(isinstance(instruction, Post) for instruction in instructions[1:])
        assert all(instruction.transfers for instruction in program if isinstance(instruction, Post))


@given(runnable_schedules)
def test_rule_1_a_send_is_posted_right_after_its_action(schedule: Schedule) -> None:
    programs = lower(schedule).programs
    for transfer, (made, _) in flows(schedule).items():
        assert slot_of(programs[transfer.source], transfer, Post) == made + 1


@given(runnable_schedules)
def test_rule_2_a_receive_is_posted_one_action_ahead_unless_a_later_message_is_due_before(schedule: Schedule) -> None:
    programs, expected = lower(schedule).programs, flows(schedule)
    for transfer, (made, used) in expected.items():
        slot = slot_of(programs[transfer.target], transfer, Post)
        assert slot <= max(used - 1, 0)
        due = [
            other_used
            for other, (other_made, other_used) in expected.items()
            if (other.source, other.target) == (transfer.source, transfer.target)
            if sending_order(other, other_made) >= sending_order(transfer, made)
        ]
        assert slot == max(min(due) - 1, 0)


@given(runnable_schedules)
def test_rule_3_receives_are_posted_in_the_order_of_the_sends(schedule: Schedule) -> None:
    sent, received = defaultdict(list), defaultdict(list)
    for rank, program in enumerate(lower(schedule).programs):
        for transfer in (transfer for i in program if isinstance(i, Post) for transfer in i.transfers):
            side = sent if transfer.source == rank else received
            side[transfer.source, transfer.target].append(transfer)
    assert sent == received
    expected = flows(schedule)
    for channel in sent.values():
        order = [sending_order(transfer, expected[transfer][0]) for transfer in channel]
        assert order == sorted(order)


@given(runnable_schedules)
def test_rule_4_a_receive_is_waited_for_right_before_its_action_and_a_send_after_its_post(schedule: Schedule) -> None:
    programs = lower(schedule).programs
    for transfer, (made, used) in flows(schedule).items():
        assert slot_of(programs[transfer.target], transfer, Wait) == used
        assert slot_of(programs[transfer.source], transfer, Wait) >= made + 1
        for rank in (transfer.source, transfer.target):
            assert slot_of(programs[rank], transfer, Post) <= slot_of(programs[rank], transfer, Wait)


# --- a send's wait never stalls -----------------------------------------------------------------------------


def play(transfers: Transfers, costs: Costs) -> Timeline:
    """The programs in simulated time, by going round the ranks until nothing moves."""
    programs = transfers.programs
    at, now = [0] * len(programs), [0] * len(programs)
    posted: dict[tuple[Transfer, bool], int] = {}
    queues: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    spans: list[Span] = []

    def arrival(transfer: Transfer) -> int | None:
        free = 0
        for message in queues[transfer.source, transfer.target]:
            if (message, True) not in posted or (message, False) not in posted:
                return None
            free = max(posted[message, True], posted[message, False], free) + costs.wire_ns(message)
            if message == transfer:
                return free + costs.latency_ns
        return None

    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                instruction = program[at[rank]]
                if isinstance(instruction, Post):
                    for transfer in instruction.transfers:
                        sends = transfer.source == rank
                        posted[transfer, sends] = now[rank]
                        if sends:
                            queues[transfer.source, transfer.target].append(transfer)
                elif isinstance(instruction, Wait):
                    arrived = arrival(instruction.transfer)
                    if arrived is None:
                        break
                    now[rank] = max(now[rank], arrived)
                else:
                    start, now[rank] = now[rank], now[rank] + costs.duration_ns(instruction.action)
                    spans.append(Span(rank, str(instruction.action), start, now[rank]))
                at[rank] += 1
                moved = True
    assert at == [len(program) for program in programs]
    return Timeline.from_spans(spans)


def edited(transfers: Transfers, edit: Callable[[int, Program], Program]) -> Transfers:
    return Transfers(transfers.schedule, tuple(edit(rank, program) for rank, program in enumerate(transfers.programs)))


@given(runnable_schedules, st.data())
def test_rule_4_waits_for_sends_change_no_time(schedule: Schedule, data: st.DataObject) -> None:
    costs = replace(data.draw(costs_of(schedule.num_stages)), twins_us=0)
    transfers = lower(schedule)

    def waits_for_send(rank: int, instruction: object) -> bool:
        return isinstance(instruction, Wait) and instruction.transfer.source == rank

    without = edited(transfers, lambda rank, program: tuple(i for i in program if not waits_for_send(rank, i)))
    at_the_end = edited(transfers, lambda rank, program: tuple(sorted(program, key=lambda i: waits_for_send(rank, i))))
    assert play(transfers, costs) == play(without, costs) == play(at_the_end, costs) == simulate(schedule, costs)


def test_dualpipe_waits_for_most_sends_long_before_the_end() -> None:
    programs = lower(dualpipe(8, 40)).programs
    for rank, program in enumerate(programs):
        sends = [i.transfer for i in program if isinstance(i, Wait) and i.transfer.source == rank]
        at_the_end = [i for i in slots(program)[-1] if isinstance(i, Wait) and i.transfer.source == rank]
        assert len(at_the_end) < len(sends) / 4


# --- what cannot be lowered ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0F0\n0F1 1F0 1F2",
            "stage 0, micro-batch 2 has no action; it needs one F",
        ),
        ("0F0 0B0\n1F0", "stage 1, micro-batch 0 has 1F0; it needs one F, and one B or one I and one W"),
        ("0F0 1F0\n0F0", "rank 1, step 0: 0F0 already stands at rank 0, step 0; remove one"),
        ("0F0 0B0 0I0", "stage 0, micro-batch 0 has 0F0, 0B0, 0I0; it needs one F, and one B or one I and one W"),
    ],
)
def test_a_schedule_in_which_something_is_missing_or_double_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        lower(from_text(text))
    assert str(caught.value) == message


@given(runnable_schedules)
def test_check_returns_the_transfers_that_it_proved(schedule: Schedule) -> None:
    assert check(schedule) == lower(schedule)
