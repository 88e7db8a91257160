"""Phases inside a CUDA graph by the order of kernels: its streams tell nothing, and all of it is launched at once."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from counterflow import open_trace
from counterflow.trace import Annotations, Rules, Trace
from counterflow.trace.hints import hint_of
from counterflow.trace.kernel_phases import ATTENTION_F, EXPERTS_F, states_of
from counterflow.trace.parts import EXPERTS, SHARED, part_of
from counterflow.trace.phases import Phases, phases_of
from counterflow.trace.transfer_phases import ANY, Block, Transfers, gaps_of
from graph_traces import DECODERS, DECODING_WIRES, Replay, one_micro_batch, two_micro_batches, work_of
from traces import Data, compact, trace

PROFILES = Path(__file__).parents[2] / "profiles"
LAYERS = 5


def read(folder: Path, events: list[Data]) -> Trace:
    path = folder / "trace.json"
    path.write_text(compact(trace(events)))
    return open_trace(path)


def told(found: Trace) -> Phases:
    return phases_of(found, Rules().classify(found.work, found.names, found.sms))


def right(built: Replay, found: Trace) -> tuple[float, Counter]:
    """The part of GPU time that got its true phase, and what got which other one."""
    phases = told(found)
    assert phases.source == "kernel order"
    good, wrong = 0, Counter()
    work = found.work
    for start, end, name, row in zip(work.start_ns, work.end_ns, work.name, phases.rows, strict=True):
        truth = built.truth[int(start) // 1000, found.names[name]]
        label = phases.names[row] if row >= 0 else ""
        good += int(end - start) * (label == truth)
        wrong[truth, label] += int(end - start) * (label != truth)
    return good / int((work.end_ns - work.start_ns).sum()), +wrong


# --- replays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [wire for wire in DECODING_WIRES if wire != "copies"])
@pytest.mark.parametrize("world", DECODERS)
def test_a_decode_of_two_micro_batches_is_told_by_its_kernels(tmp_path: Path, world: str, wire: str) -> None:
    built = Replay(DECODERS[world], wire).steps(two_micro_batches(LAYERS))
    share, wrong = right(built, read(tmp_path, built.events))
    assert share > 0.98, wrong


@pytest.mark.parametrize("lag", [3, 600])
@pytest.mark.parametrize("world", ["latent", "plain"])
def test_both_legs_of_copies_through_the_host_belong_to_one_exchange(tmp_path: Path, world: str, lag: int) -> None:
    built = Replay(DECODERS[world], "copies", lag).steps(two_micro_batches(LAYERS))
    found = read(tmp_path, built.events)
    for one in (found, replace(found, launches=found.launches.empty())):
        share, wrong = right(built, one)
        assert share > 0.98, wrong


@pytest.mark.parametrize("wire", ["low latency", "nccl", "copies"])
@pytest.mark.parametrize("world", DECODERS)
def test_a_decode_that_hides_nothing_is_told_too(tmp_path: Path, world: str, wire: str) -> None:
    built = Replay(DECODERS[world], wire).steps(one_micro_batch(LAYERS))
    share, wrong = right(built, read(tmp_path, built.events))
    assert share > 0.98, wrong


def test_copies_on_a_wire_that_never_rests_are_told_but_for_where_one_exchange_runs_into_the_next(tmp_path) -> None:
    built = Replay(DECODERS["grouped"], "copies").steps(two_micro_batches(LAYERS))
    share, wrong = right(built, read(tmp_path, built.events))
    assert share > 0.85, wrong
    assert set(wrong) == {("combine(F)", "dispatch(F)")}, "known: all compute is right, and every dispatch"


NAMES = (
    *("training", "training-20-ctas", "two-gpus-0", "two-gpus-1"),
    *("prefill", "prefill-20-ctas", "decode", "decode-20-ctas"),
)


@pytest.mark.parametrize("name", NAMES)
def test_our_own_profiles_with_their_annotations_hidden(name: str) -> None:
    profile = open_trace(PROFILES / f"{name}.json.gz")
    truth, hidden = told(profile), told(replace(profile, annotations=Annotations.empty()))
    assert (truth.source, hidden.source) == ("annotations", "kernel order")
    length = profile.work.end_ns - profile.work.start_ns
    known = np.array([_part(truth, row) is not None for row in truth.rows])
    same = np.array([_part(truth, a) == _part(hidden, b) for a, b in zip(truth.rows, hidden.rows, strict=True)])
    assert length[known & same].sum() / length[known].sum() >= 0.95


def _part(phases: Phases, row: int) -> object:
    part = part_of(phases.names[row]) if row >= 0 else None
    return part and part._replace(part=EXPERTS if part.part == SHARED else part.part)


# --- waiting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [1, 3])
def test_another_part_begins_where_the_gpu_of_a_graph_waited(waits: int) -> None:
    names = ["flash_fwd", "gemm", "copy", "copy", "copy", "fused_moe_kernel"]
    place = np.arange(len(names))
    start = 1000 * place + 500 * (place > waits)
    work = replace(work_of(names, [0] * len(names)), start_ns=start, end_ns=start + 990)
    hints = {int(one): hint_of(name) for one, name in zip(work.name, names, strict=True)}
    once, edge = np.zeros(len(names), dtype=np.int64), np.zeros(len(names), dtype=bool)
    states = states_of(work, hints, once, once, edge, dispatches=True)
    assert states.tolist() == [ATTENTION_F if one <= waits else EXPERTS_F for one in place]


# --- halves of attention ----------------------------------------------------------------------------------------


def block(state: int, first: int, routed: bool = False, core: bool = False, projected: bool = False) -> Block:
    return Block(state, first, first + 5, routed, core, projected, None, np.arange(0))


def decoding(layers: int) -> list[Block]:
    """Two micro-batches: each one's attention is cut by the other one's experts."""
    blocks = [block(ATTENTION_F, 0, core=True, projected=True)]
    for place in range(10, 40 * layers, 40):
        for at in (place, place + 20):
            blocks += [block(EXPERTS_F, at), block(ATTENTION_F, at + 6, projected=True)]
            blocks += [block(EXPERTS_F, at + 9, routed=True), block(ATTENTION_F, at + 15, core=True)]
    return blocks


def test_a_dispatch_is_made_by_the_second_half_of_attention_and_a_combine_needed_by_the_first() -> None:
    blocks = decoding(3)
    gaps = gaps_of(blocks)
    dispatches = [gap for gap in gaps if gap.part.part == "dispatch" and gap.needed is not None]
    assert len(dispatches) == 6
    assert all(gap.made is not None and gap.made.core for gap in dispatches)
    combines = [gap for gap in gaps if gap.part.part == "combine" and gap.made is not None and gap.needed is not None]
    assert len(combines) == 5
    for gap in combines:
        assert not gap.needed.core
        # The other micro-batch's second half, and its shared experts, lie between.
        between = [one for one in blocks if gap.made.first < one.first < gap.needed.first]
        assert [one.core for one in between] == [True, False]
    for one, two in pairwise(dispatches):
        assert one.needed.first < two.needed.first


def test_a_transfer_that_waited_for_the_one_before_is_another_exchange() -> None:
    blocks = decoding(2)
    transfers = Transfers(gaps_of(blocks), backward=False)
    assert str(transfers.serve(6, ANY, joined=False).part) == "dispatch(F)"
    experts = blocks[3]
    assert str(transfers.serve(experts.last + 1, ANY, joined=False).part) == "combine(F)"
    attention = blocks[4]
    assert str(transfers.serve(attention.last - 1, ANY, joined=True).part) == "combine(F)"
    assert str(transfers.serve(attention.last + 1, ANY, joined=True).part) == "dispatch(F)"
