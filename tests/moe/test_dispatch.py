"""Where rows go, against one choice at a time; and placements that do not fit are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow import CounterflowError, Placement
from counterflow.moe import MixtureBlock
from counterflow.moe.dispatch import Dispatch, arrived, inverse_of, serving_slots, take
from counterflow.runtime import Context, LocalExchange
from moe.models import REPLICAS, TINY, any_placement


class Seat(LocalExchange):
    """One rank of several, for what needs no others."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks


def choices(seed: int, count: int) -> Tensor:
    return torch.randint(TINY.experts, (count, 3), generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 2**32), count=st.integers(0, 20), rank=st.integers(0, 5))
def test_replicas_serve_in_turn_from_the_ranks_own_number_on(seed: int, count: int, rank: int) -> None:
    placement = any_placement(seed, 1)
    dispatch = Dispatch(placement, 0, LocalExchange())
    chosen = choices(seed, count)
    turn = [rank] * TINY.experts
    expected = []
    for expert in chosen.flatten().tolist():
        slots = np.flatnonzero(placement.physical_to_logical[0] == expert)
        expected.append(int(slots[turn[expert] % len(slots)]))
        turn[expert] += 1
    assert serving_slots(chosen, dispatch.table, dispatch.copies, rank).tolist() == expected


@given(seed=st.integers(0, 2**32), count=st.integers(0, 20))
def test_rows_are_sent_by_slot_and_come_back_to_their_choices(seed: int, count: int) -> None:
    dispatch = Dispatch(any_placement(seed, 1), 0, LocalExchange())
    chosen, ctx = choices(seed, count), Context()
    dispatch.sort(chosen, False, ctx)
    slots = serving_slots(chosen, dispatch.table, dispatch.copies, 0)
    sent = slots[ctx.notes.order]
    assert sent.tolist() == sorted(slots.tolist())
    assert torch.equal(sent[ctx.notes.inverse], slots)
    assert ctx.notes.counts.tolist() == [torch.bincount(slots, minlength=REPLICAS).tolist()]


@given(counts=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_rows_that_came_by_rank_are_put_by_slot(counts: list[list[int]]) -> None:
    came = [(slot, rank) for rank, row in enumerate(counts) for slot, count in enumerate(row) for _ in range(count)]
    order, inverse, ends = arrived(torch.tensor(counts), len(came))
    assert [came[place] for place in order.tolist()] == sorted(came)
    assert order[inverse].tolist() == list(range(len(came)))
    assert ends.tolist() == np.cumsum(np.sum(counts, axis=0)).tolist()
    assert ends.dtype == torch.int32


@given(count=st.integers(1, 6), copies=st.integers(1, 3))
def test_the_gradient_of_taken_rows_goes_back_to_where_they_were(count: int, copies: int) -> None:
    order = torch.randperm(count * copies, generator=torch.Generator().manual_seed(count))
    rows = torch.randn(count, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(take(rows, order, inverse_of(order), copies), rows[order // copies])
    assert torch.autograd.gradcheck(lambda source: take(source, order, inverse_of(order), copies), rows)


@pytest.mark.parametrize("rank", range(4))
def test_what_balanced_ranks_know_beforehand_is_what_they_would_have_told(rank: int) -> None:
    placement = any_placement(3, 4)
    chosen = torch.arange(5 * 4).remainder(TINY.experts).view(5, 4)
    sent = [
        torch.bincount(serving_slots(chosen, *_columns(placement, source), source), minlength=REPLICAS).view(4, -1)
        for source in range(4)
    ]
    ctx = Context()
    Dispatch(placement, 0, Seat(rank, 4)).sort(chosen, True, ctx)
    assert torch.equal(ctx.notes.counts, torch.stack([each[rank] for each in sent]))
    assert ctx.rows is not None
    assert ctx.rows.sent == tuple(sent[rank].sum(1).tolist())
    assert ctx.rows.received == tuple(int(each[rank].sum()) for each in sent)


def _columns(placement: Placement, rank: int) -> tuple[Tensor, Tensor]:
    dispatch = Dispatch(placement, 0, Seat(rank, 4))
    return dispatch.table, dispatch.copies


@pytest.mark.parametrize("balanced", [False, True])
def test_another_placement_is_gone_by_from_then_on(balanced: bool) -> None:
    old, new, chosen = any_placement(0, 4), any_placement(1, 4), choices(2, 8)
    moved, fresh = (Dispatch(placement, 0, Told(2, 4)) for placement in (old, new))
    moved.sort(chosen, balanced, Context())
    moved.place(new, 0)
    found, expected = Context(), Context()
    moved.sort(chosen, balanced, found)
    fresh.sort(chosen, balanced, expected)
    assert found.rows == expected.rows
    assert all(torch.equal(value, vars(expected.notes)[name]) for name, value in vars(found.notes).items())


class Told(Seat):
    """Every rank is said to send as many rows as this one sends itself."""

    def counts(self, rows: Tensor) -> Tensor:
        return rows[self.rank].expand_as(rows)


# --- what is refused ----------------------------------------------------------------------------------------


def refusal(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(CounterflowError) as refused:
        call(*arguments, **options)  # type: ignore[operator]
    return str(refused.value)


def test_a_placement_for_another_number_of_gpus_is_refused() -> None:
    assert refusal(MixtureBlock, TINY, 0, placement=any_placement(0, 2, TINY.layers)) == (
        "the placement is for 2 GPUs and the exchange has 1 ranks; make one for the other"
    )


def test_a_placement_of_another_model_is_refused() -> None:
    assert refusal(MixtureBlock, TINY, 3, placement=any_placement(0, 1, layers=2)) == (
        "the placement is for 2 layers of 16 experts, and this is layer 3 with 16; make one for this model"
    )
    assert refusal(MixtureBlock, replace(TINY, experts=32), 0, placement=any_placement(0, 1)) == (
        "the placement is for 2 layers of 16 experts, and this is layer 0 with 32; make one for this model"
    )


def test_a_placement_of_another_size_cannot_take_over() -> None:
    dispatch = Dispatch(any_placement(0, 1), 0, LocalExchange())
    smaller = Placement(np.arange(TINY.experts)[None], TINY.experts, 1)
    assert refusal(dispatch.place, smaller, 0) == (
        "the new placement has 16 slots for 16 experts, the model 24 for 16; make one of the same size"
    )
    assert dispatch.num_slots == REPLICAS


def test_experts_that_do_not_divide_over_the_ranks_are_refused() -> None:
    assert refusal(MixtureBlock, TINY, 0, Seat(0, 3)) == (
        "16 replicas do not divide over 3 GPUs: give 18, or another multiple"
    )
