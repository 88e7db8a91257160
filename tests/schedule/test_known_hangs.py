"""Pipelines that hung or swapped tensors for somebody else, found again by `check`, and by trying them."""

import re

import pytest

from counterflow import Action, Schedule, check, one_f_one_b
from counterflow.errors import ScheduleError
from counterflow.schedule import (
    CHANNELS,
    GENERATORS,
    Post,
    Run,
    Transfer,
    Transfers,
    Wait,
    check_transfers,
    generate,
    lower,
)
from counterflow.schedule.transfers import Instruction, Program
from schedule.channels import why_programs_fail
from schedule.mutants import in_one_order, plain, schedules_of, waiting_for_sends_at_once


def verdicts(schedule: Schedule, programs: tuple[Program, ...]) -> dict[str, bool]:
    """Whether the programs run under each model: tried, and `check` must say the same."""
    found = {}
    for channels in CHANNELS:
        found[channels] = not why_programs_fail(schedule, programs, channels)
        assert (refusal(schedule, programs, channels) == "") == found[channels], channels
    return found


def refusal(schedule: Schedule, programs: tuple[Program, ...], channels: str) -> str:
    try:
        check_transfers(Transfers(schedule, programs), channels=channels)
    except ScheduleError as error:
        return str(error)
    return ""


RUNS_EVERYWHERE = dict.fromkeys(CHANNELS, True)
ONLY_WITH_QUEUES_IT_HANGS = {**RUNS_EVERYWHERE, "nccl": False, "nccl-pair": False}

# --- programs written in torch's grammar --------------------------------------------------------------------

PLACEMENT = {0: 0, 1: 1, 2: 0, 3: 1}
"""Interleaved: stages 0 and 2 on rank 0, stages 1 and 3 on rank 1."""


def programs_of(text: str) -> tuple[Program, ...]:
    """Rows such as ``0F0 0SEND_F0 2RECV_F0 2F0``: a receive is waited for before its action, sends at the end.

    ``2RECV_F0`` is what stage 2 gets for its forward, ``2RECV_B0`` what it gets for its backward; those joined by
    ``+`` are one batch. The runtime behind this grammar does it so.
    """
    programs = []
    for row in text.strip().splitlines():
        program: list[Instruction] = []
        arrived: dict[str, Transfer] = {}
        for word in row.split():
            if "_" in word:
                batch = [transfer_of(part) for part in word.split("+")]
                arrived |= {part.replace("RECV_", ""): t for part, t in zip(word.split("+"), batch, strict=True)}
                program.append(Post(tuple(batch)))
            else:
                program += [Wait(arrived[word])] if word in arrived else []
                program.append(Run(Action.parse(word)))
        sends = [transfer_of(part) for word in row.split() for part in word.split("+") if "SEND" in part]
        programs.append((*program, *map(Wait, sends)))
    return tuple(programs)


def transfer_of(word: str) -> Transfer:
    match = re.fullmatch(r"(\d+)(SEND|RECV)_([FB])(\d+)", word)
    assert match
    stage, microbatch, forward = int(match[1]), int(match[4]), match[3] == "F"
    if match[2] == "RECV":
        stage += -1 if forward else 1
    other = stage + 1 if forward else stage - 1
    return Transfer("activation" if forward else "gradient", stage, microbatch, PLACEMENT[stage], PLACEMENT[other])


def rows_of(programs: tuple[Program, ...]) -> Schedule:
    return Schedule.from_rows([[one.action for one in program if isinstance(one, Run)] for program in programs])


# --- pytorch#172668 -----------------------------------------------------------------------------------------

# Interleaved 1F1B on two ranks, as the thread prints it: each receive is posted as soon as it could be. A pending
# receive held up the compute behind it on the reporter's cards, which is why he began to move them.
AS_SOON_AS_POSSIBLE = """
0F0 0SEND_F0 2RECV_F0 0F1 0SEND_F1 2RECV_F1 2F0 2SEND_F0 2F1 2SEND_F1 2RECV_B0 2B0 2SEND_B0 2RECV_B1 2B1 2SEND_B1 \
0RECV_B0 0B0 0RECV_B1 0B1
1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 3RECV_F0 3F0 3RECV_F1 3B0 3SEND_B0 1RECV_B0 3F1 3B1 3SEND_B1 1RECV_B1 \
1B0 1SEND_B0 1B1 1SEND_B1
"""

# "it gets stuck": every receive moved to right before its use. Rank 0 has sent 0F1 and has yet to post the receive
# of 1F0; rank 1 has sent 1F0 and has yet to post the receive of 0F1.
RECEIVES_PUT_OFF = """
0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 2RECV_B0 2B0 2SEND_B0 2RECV_B1 2B1 2SEND_B1 \
0RECV_B0 0B0 0RECV_B1 0B1
1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 3RECV_F0 3F0 3B0 3SEND_B0 3RECV_F1 3F1 3B1 3SEND_B1 1RECV_B0 1B0 1SEND_B0 \
1RECV_B1 1B1 1SEND_B1
"""

# "I tried swapping the order of RECV and SEND on odd ranks, but the deadlock is still there": rank 1 posts its next
# receive ahead of each send. That of 0F1 is in time now, but 3B0's send comes behind a receive of 2F1 while rank 0
# sends another 0F before it takes the gradient.
ODD_RANK_RECEIVES_FIRST = """
0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 0F2 0SEND_F2 2RECV_B0 2B0 2SEND_B0 2RECV_B1 2B1 \
2SEND_B1 2RECV_F2 2F2 2SEND_F2 0RECV_B0 0B0 0RECV_B1 0B1 2RECV_B2 2B2 2SEND_B2 0RECV_B2 0B2
1RECV_F0 1F0 1RECV_F1 1SEND_F0 1F1 3RECV_F0 1SEND_F1 3F0 3B0 3RECV_F1 3SEND_B0 3F1 3B1 1RECV_F2 3SEND_B1 1F2 \
1RECV_B0 1SEND_F2 1B0 1RECV_B1 1SEND_B0 1B1 3RECV_F2 1SEND_B1 3F2 3B2 1RECV_B2 3SEND_B2 1B2 1SEND_B2
"""

# What the maintainers proposed instead: a send and a receive that follow each other are one batch.
BATCHED = """
0F0 0SEND_F0 0F1 0SEND_F1+2RECV_F0 2F0 2SEND_F0+2RECV_F1 2F1 2SEND_F1+2RECV_B0 2B0 2SEND_B0+2RECV_B1 2B1 \
2SEND_B1+0RECV_B0 0B0 0RECV_B1 0B1
1RECV_F0 1F0 1SEND_F0+1RECV_F1 1F1 1SEND_F1+3RECV_F0 3F0 3B0 3SEND_B0+3RECV_F1 3F1 3B1 3SEND_B1+1RECV_B0 1B0 \
1SEND_B0+1RECV_B1 1B1 1SEND_B1
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(AS_SOON_AS_POSSIBLE, RUNS_EVERYWHERE, id="as soon as possible"),
        pytest.param(RECEIVES_PUT_OFF, ONLY_WITH_QUEUES_IT_HANGS, id="receives put off"),
        pytest.param(ODD_RANK_RECEIVES_FIRST, ONLY_WITH_QUEUES_IT_HANGS, id="odd rank receives first"),
        pytest.param(BATCHED, RUNS_EVERYWHERE, id="batched"),
    ],
)
def test_reordered_p2p_hangs_where_the_thread_says(text: str, expected: dict[str, bool]) -> None:
    programs = programs_of(text)
    assert verdicts(rows_of(programs), programs) == expected


def test_the_two_that_hang_are_told_as_in_the_thread() -> None:
    programs = programs_of(RECEIVES_PUT_OFF)
    told = refusal(rows_of(programs), programs, "nccl")
    assert told.startswith("deadlock: ")
    assert "the activation of 1F0 from rank 1 to 0" in told
    assert "the activation of 0F1 from rank 0 to 1" in told


# --- Megatron-LM#1450 ---------------------------------------------------------------------------------------


def in_megatrons_order(rank: int, program: Program) -> Program:
    """Each batch in the order of the thread: send to the rank before, receive from it, send to the next, receive."""

    def place(transfer: Transfer) -> tuple[bool, bool]:
        with_the_next = (transfer.payload == "activation") == (transfer.source == rank)
        return with_the_next, transfer.target == rank

    return tuple(Post(tuple(sorted(one.transfers, key=place))) if isinstance(one, Post) else one for one in program)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (2, 6), (2, 8)])
def test_activation_and_gradient_between_the_same_two_ranks_are_swapped(num_ranks: int, num_microbatches: int) -> None:
    # The thread: two ranks of two chunks each, batches in a fixed order of before and next. At two ranks both are the
    # same peer: it is sent the gradient, then the activation, and takes the first for the activation. Nothing is
    # tagged, so nobody notices while the sizes are equal; with sizes that vary it got stuck.
    schedule = generate("interleaved-1f1b-overlap", num_ranks, num_microbatches)
    programs = lower(schedule).programs
    assert verdicts(schedule, programs)["rendezvous"]
    swapped = tuple(in_megatrons_order(rank, program) for rank, program in enumerate(programs))
    assert verdicts(schedule, swapped) == dict.fromkeys(CHANNELS, False)
    assert "in its hands" in why_programs_fail(schedule, swapped, "rendezvous")
    for channels in CHANNELS:
        assert re.search(
            r"is sent as the gradient of \w+ from rank (\d) to (\d) and received as the activation of \w+ from rank \1 "
            r"to \2; channels are first-in first-out",
            refusal(schedule, swapped, channels),
        )


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(3, 6), (4, 8)])
def test_with_a_third_rank_the_same_order_of_a_batch_is_harmless(num_ranks: int, num_microbatches: int) -> None:
    schedule = generate("interleaved-1f1b-overlap", num_ranks, num_microbatches)
    programs = lower(schedule).programs
    reordered = tuple(in_megatrons_order(rank, program) for rank, program in enumerate(programs))
    assert reordered != programs
    assert verdicts(schedule, reordered) == verdicts(schedule, programs)


# --- plain sends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", range(1, 5))
@pytest.mark.parametrize("num_microbatches", range(1, 7))
def test_plain_sends_hang_1f1b_from_two_ranks_and_two_microbatches_on(num_ranks: int, num_microbatches: int) -> None:
    # Receive, compute, send, each waited for at once: rank 0 sends its second activation while rank 1 sends the first
    # gradient. Buffers for the sends hide it.
    schedule = one_f_one_b(num_ranks, num_microbatches)
    programs = tuple(waiting_for_sends_at_once(rank, program) for rank, program in enumerate(plain(schedule)))
    runs = num_ranks == 1 or num_microbatches == 1
    assert verdicts(schedule, programs) == {**dict.fromkeys(CHANNELS, runs), "buffered": True}


# --- evaluation of V schedules ------------------------------------------------------------------------------

V_SHAPED = ("zbv", "v-half", "v-min", "dualpipev")


@pytest.mark.parametrize("name", V_SHAPED)
def test_evaluation_of_v_schedules_runs(name: str) -> None:
    # torch 2.13 under eval(): the last rank asserts and the others hang, for at the tip of the V a stage hands its
    # output to the next one on the same rank. Here that is no transfer at all.
    for origin, schedule in schedules_of(name)[::2]:
        evaluation = schedule.forward_only()
        programs = lower(evaluation).programs
        posted = [t for program in programs for one in program if isinstance(one, Post) for t in one.transfers]
        assert all(transfer.source != transfer.target for transfer in posted)
        found = verdicts(evaluation, programs)
        assert found["rendezvous"], origin
        assert found["buffered"], origin
        check(evaluation)
        assert verdicts(evaluation, in_one_order(evaluation)) == RUNS_EVERYWHERE, origin


# --- what runs where ----------------------------------------------------------------------------------------

# Of the sizes from 2 ranks on, up to 4 ranks and 8 micro-batches: do all lowered programs of training, and all those of
# evaluation, run where both directions share a queue, one for each rank (nccl) or one for each pair of ranks
# (nccl-pair)? Where answers come back, an early receive stands before the send that it is the answer to. We use NCCL
# with a communicator for each ordered pair, and so as rendezvous, in which all of them run.
RUN_IN_SHARED_QUEUES = {
    "gpipe": {"training": False, "evaluation": True},
    "1f1b": {"training": False, "evaluation": True},
    "interleaved-1f1b": {"training": False, "evaluation": False},
    "interleaved-1f1b-overlap": {"training": False, "evaluation": False},
    "zb1p": {"training": False, "evaluation": True},
    "zb2p": {"training": False, "evaluation": True},
    "zbv": {"training": False, "evaluation": False},
    "v-half": {"training": False, "evaluation": False},
    "v-min": {"training": False, "evaluation": False},
    "dualpipe": {"training": False, "evaluation": False},
    "dualpipev": {"training": False, "evaluation": False},
}


@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_lowered_runs_with_a_queue_for_each_direction_and_not_with_shared_ones(name: str) -> None:
    training = [schedule for _, schedule in schedules_of(name) if schedule.num_ranks > 1]
    evaluation = [schedule.forward_only() for schedule in training]
    for what, schedules in (("training", training), ("evaluation", evaluation)):
        found = [verdicts(schedule, lower(schedule).programs) for schedule in schedules]
        shared = RUN_IN_SHARED_QUEUES[name][what]
        for channels, expected in {"rendezvous": True, "buffered": True, "nccl": shared, "nccl-pair": shared}.items():
            assert all(verdict[channels] for verdict in found) == expected, (what, channels)
