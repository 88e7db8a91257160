"""Our CSV is torch pipelining's own: its reader takes what we write, ours takes what its schedules hold."""

import csv
import io
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings

from counterflow import (
    Costs,
    Schedule,
    check,
    dualpipe,
    dualpipev,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    simulate,
    zb1p,
    zbv,
)
from counterflow.schedule import from_csv, read_schedule, to_csv, v_half, v_min, zb2p
from strategies import schedules_read_off_rows


@pytest.fixture(scope="module")
def schedules():
    """torch's module of schedules."""
    return pytest.importorskip("torch.distributed.pipelining.schedules")


def torch_schedule(schedules, name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int):
    """A schedule object of torch's, made without process group or modules: only its order is asked for."""
    stages = [
        SimpleNamespace(
            num_stages=num_ranks * stages_per_rank,
            group_size=num_ranks,
            group_rank=0,
            stage_index=index,
            submod=None,
            is_first=index == 0,
            is_last=False,
        )
        for index in range(stages_per_rank)
    ]
    kind = schedules.get_schedule_class(name)
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    return kind(stages[0] if single else stages, n_microbatches=num_microbatches, loss_fn=lambda: None)


def compute_only_csv(schedules, order) -> str:
    """Written as torch writes its compute-only format, in which it refuses anything but compute actions itself."""
    file = io.StringIO()
    writer = csv.writer(file)
    for rank in sorted(order):
        writer.writerow([action for action in order[rank] if action is None or action.is_compute_op])
    return file.getvalue()


@settings(max_examples=50)
@given(schedule=schedules_read_off_rows)
def test_torch_reads_every_cell_that_we_write_and_writes_it_back(schedules, schedule: Schedule) -> None:
    for row, line in zip(schedule.rows, csv.reader(io.StringIO(to_csv(schedule))), strict=True):
        for action, cell in zip(row, line, strict=False):
            theirs = schedules._Action.from_str(cell)
            assert str(theirs) == str(action)
            for part, sub_action in zip(action.parts, theirs.sub_actions or (theirs,), strict=True):
                assert (sub_action.stage_index, sub_action.computation_type.value, sub_action.microbatch_index) == (
                    part.stage,
                    part.kind.value,
                    part.microbatch,
                )


INTERLEAVED_SIZES = [
    (num_ranks, num_microbatches)
    for num_ranks in range(1, 7)
    for num_microbatches in range(1, 19)
    if num_microbatches % max(1, num_microbatches // num_ranks) == 0
]
STRAIGHT = [gpipe(4, 8), one_f_one_b(4, 8), zb1p(4, 8), zb1p(3, 2), zb2p(3, 8)]
LOOPED = [interleaved_1f1b(4, 8), interleaved_1f1b(4, 10, chunks=3), interleaved_1f1b(3, 6, overlap=True)]
V_SHAPED = [zbv(4, 11), zbv(3, 2), v_half(4, 8), v_min(5, 8), dualpipev(4, 11)]


@pytest.mark.parametrize("ours", STRAIGHT + LOOPED + V_SHAPED, ids=lambda ours: ours.name)
def test_torchs_runtime_loads_our_file_in_place_of_its_own_order(schedules, ours: Schedule, tmp_path: Path) -> None:
    path, back = tmp_path / "ours.csv", tmp_path / "back.csv"
    path.write_text(to_csv(ours), encoding="utf-8")
    name = "ZBVZeroBubble" if ours in V_SHAPED else "Interleaved1F1B"
    runtime = torch_schedule(schedules, name, ours.num_ranks, ours.num_stages // ours.num_ranks, ours.num_microbatches)
    runtime._load_csv(path)
    runtime._dump_csv(back, format="compute_only")
    assert read_schedule(back) == ours


@pytest.mark.parametrize(
    ("name", "generator", "stages_per_rank", "sizes"),
    [
        ("GPipe", gpipe, 1, [(1, 1), (2, 5), (4, 8)]),
        ("InterleavedZeroBubble", zb1p, 1, [(1, 1), (2, 2), (4, 8), (8, 24)]),
        ("DualPipeV", dualpipev, 2, [(1, 2), (2, 4), (3, 7), (4, 10), (8, 20)]),
        ("Interleaved1F1B", partial(interleaved_1f1b, chunks=1), 1, INTERLEAVED_SIZES),
        ("Interleaved1F1B", interleaved_1f1b, 2, INTERLEAVED_SIZES),
        ("Interleaved1F1B", partial(interleaved_1f1b, chunks=3), 3, INTERLEAVED_SIZES),
    ],
)
def test_where_torch_has_the_same_schedule_it_has_the_same_order(
    schedules, name: str, generator, stages_per_rank: int, sizes
) -> None:
    for num_ranks, num_microbatches in sizes:
        theirs = torch_schedule(schedules, name, num_ranks, stages_per_rank, num_microbatches)
        read = from_csv(compute_only_csv(schedules, theirs.pipeline_order))
        assert read == generator(num_ranks, num_microbatches)


def test_torchs_1f1b_is_ours_but_for_a_slip_on_its_last_rank(schedules) -> None:
    # torch 2.13 counts the last rank's forwards from 1; that order is for display only there, it runs its own loop.
    for num_ranks, num_microbatches in [(2, 2), (4, 8), (8, 20)]:
        theirs = torch_schedule(schedules, "1F1B", num_ranks, 1, num_microbatches)
        read = from_csv(compute_only_csv(schedules, theirs.pipeline_order))
        ours = one_f_one_b(num_ranks, num_microbatches)
        assert read.rows[:-1] == ours.rows[:-1]
        assert str(read.rows[-1][0]) == f"{num_ranks - 1}F1"


def step_ns(schedule: Schedule, costs: Costs) -> int:
    return simulate(schedule, costs).makespan_ns


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_a_step_of_our_zbv_is_never_longer_than_torchs_and_often_shorter(schedules, num_ranks: int) -> None:
    equally_long = Costs(forward_us=1, input_us=1, weight_us=1)
    for num_microbatches in range(1, 3 * num_ranks):
        theirs = torch_schedule(schedules, "ZBVZeroBubble", num_ranks, 2, num_microbatches)
        read = from_csv(compute_only_csv(schedules, theirs.pipeline_order))
        ours = zbv(num_ranks, num_microbatches)
        if 1 < num_microbatches < 2 * num_ranks - 3:
            assert step_ns(ours, equally_long) < step_ns(read, equally_long)
        assert step_ns(ours, equally_long) <= step_ns(read, equally_long)


@pytest.mark.parametrize("costs", [(1, 1.5, 0.5, 0), (1, 0.75, 1.25, 0.125), (1, 1.25, 1, 0.25)], ids=str)
def test_with_enough_microbatches_our_zbv_takes_as_long_as_torchs_whatever_it_costs(
    schedules, costs: tuple[float, float, float, float]
) -> None:
    forward, inputs, weight, latency = costs
    costs_us = Costs(forward_us=forward, input_us=inputs, weight_us=weight, latency_us=latency)
    for num_ranks in range(1, 7):
        for num_microbatches in (2 * num_ranks - 1, 2 * num_ranks, 3 * num_ranks + 1):
            theirs = torch_schedule(schedules, "ZBVZeroBubble", num_ranks, 2, num_microbatches)
            read = from_csv(compute_only_csv(schedules, theirs.pipeline_order))
            assert step_ns(zbv(num_ranks, num_microbatches), costs_us) == step_ns(read, costs_us)


@pytest.mark.parametrize(
    ("name", "stages_per_rank"),
    [
        ("LoopedBFS", 2),
        ("Interleaved1F1B", 1),
        ("Interleaved1F1B", 2),
        ("InterleavedZeroBubble", 2),
        ("ZBVZeroBubble", 2),
        ("DualPipeV", 2),
    ],
)
def test_a_file_that_torch_writes_is_read_and_runs(schedules, name: str, stages_per_rank: int, tmp_path: Path) -> None:
    theirs = torch_schedule(schedules, name, 4, stages_per_rank, 8)
    theirs._dump_csv(tmp_path / "theirs.csv", format="compute_only")
    read = read_schedule(tmp_path / "theirs.csv")
    assert [[str(action) for action in row] for row in read.rows] == [
        [str(action) for action in theirs.pipeline_order[rank] if action is not None] for rank in range(4)
    ]
    assert read.num_stages == 4 * stages_per_rank
    check(read)
    # Its default writes communication and sharding too, which our lowering decides.
    theirs._prepare_schedule_with_comms(theirs.pipeline_order)
    theirs._dump_csv(tmp_path / "with_comms.csv")
    assert "0SEND_F0" in (tmp_path / "with_comms.csv").read_text()
    assert read_schedule(tmp_path / "with_comms.csv") == read


def test_torchs_runtime_reads_dualpipe_but_cannot_place_its_twins(schedules, tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    path.write_text(to_csv(dualpipe(4, 8)), encoding="utf-8")
    runtime = torch_schedule(schedules, "Interleaved1F1B", 4, 1, 8)
    with pytest.raises(AssertionError, match="Stage 1 is assigned to both rank 2 and rank 1"):
        runtime._load_csv(path)
