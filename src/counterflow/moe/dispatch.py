"""Where rows go: from the experts that a router chose to slots, ranks, and the order in which rows are sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from counterflow.errors import ModelError
from counterflow.experts import Placement
from counterflow.moe.kernels import arriving_pays, sorting_pays
from counterflow.moe.router import in_turn
from counterflow.runtime import Context, Exchange, Rows


class Dispatch(nn.Module):
    """One layer of a placement as a rank needs it: rank r of the exchange is GPU r.

    The replicas of an expert serve those who chose it in turn; rank r starts with replica r, so that few tokens do
    not all go to the first ones. ``table`` [experts, width] holds the slots of each expert, ``copies`` [experts] how
    many there are.

    Raises:
        ModelError: the placement has other GPUs than the exchange ranks.
    """

    table: Tensor
    copies: Tensor

    def __init__(self, placement: Placement, layer: int, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.num_slots = placement.num_slots
        self._known: dict[tuple[int, int, torch.device], tuple[Tensor, Rows]] = {}
        table, copies = self._columns(placement, layer)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("copies", copies, persistent=False)

    def place(self, placement: Placement, layer: int) -> None:
        """Go by another placement with as many slots from now on; the experts' weights are moved by others.

        Raises:
            ModelError: it has other slots, experts or GPUs.
        """
        table, copies = self._columns(placement, layer)
        if table.shape != self.table.shape or placement.num_slots != self.num_slots:
            raise ModelError(
                f"the new placement has {placement.num_slots} slots for {placement.num_experts} experts, the model "
                f"{self.num_slots} for {len(self.table)}; make one of the same size"
            )
        self.table.copy_(table)
        self.copies.copy_(copies)
        self._known.clear()

    def sort(self, chosen: Tensor, balanced: bool, ctx: Context) -> None:
        """Note the order in which the rows for ``chosen`` [tokens, k] are sent, and how many come.

        ``notes.order`` says for each row sent which choice it is for, ``notes.inverse`` for each choice its row, and
        ``notes.counts`` [ranks, slots of a rank] how many rows come from each rank for each slot. The host waits for
        the sizes where there are several ranks, unless routing is ``balanced`` and thus known beforehand; all ranks
        have equally many tokens then.
        """
        known = balanced and self.exchange.num_ranks > 1
        ctx.notes.order, ctx.notes.inverse, sent = self._sorted(chosen, counting=not known)
        if known:
            ctx.notes.counts, ctx.rows = self._counts_in_turn(chosen.shape[0], chosen.shape[1], chosen.device)
            return
        assert sent is not None, "they are counted unless they are known"
        sent = sent.view(self.exchange.num_ranks, -1)
        ctx.notes.counts = self.exchange.counts(sent)
        if self.exchange.num_ranks > 1:
            going, coming = torch.stack([sent.sum(1), ctx.notes.counts.sum(1)]).tolist()
            ctx.rows = Rows(tuple(going), tuple(coming))

    def _sorted(self, chosen: Tensor, *, counting: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The order of the rows by slot, its inverse, and where it is asked for how many there are for each slot."""
        if sorting_pays(chosen):
            from counterflow.moe.kernels.routing_kernel import sort_by_kernel

            return sort_by_kernel(chosen, self.table, self.copies, self.exchange.rank, self.num_slots)
        slots = serving_slots(chosen, self.table, self.copies, self.exchange.rank)
        order = slots.argsort(stable=True)
        return order, inverse_of(order), counted(slots, self.num_slots) if counting else None

    def _counts_in_turn(self, tokens: int, top_k: int, device: torch.device) -> tuple[Tensor, Rows]:
        key = tokens, top_k, device
        if key not in self._known:
            ranks, rank = self.exchange.num_ranks, self.exchange.rank
            table, copies = self.table.cpu(), self.copies.cpu()
            chosen = in_turn(tokens, top_k, len(table))
            slots = [serving_slots(chosen, table, copies, source) for source in range(ranks)]
            counts = torch.stack([counted(each, self.num_slots) for each in slots]).view(ranks, ranks, -1)
            going, coming = counts[rank].sum(1).tolist(), counts[:, rank].sum(1).tolist()
            self._known[key] = counts[:, rank].to(device), Rows(tuple(going), tuple(coming))
        return self._known[key]

    def _columns(self, placement: Placement, layer: int) -> tuple[Tensor, Tensor]:
        if placement.num_gpus != self.exchange.num_ranks:
            raise ModelError(
                f"the placement is for {placement.num_gpus} GPUs and the exchange has {self.exchange.num_ranks} ranks; "
                "make one for the other"
            )
        table, copies = placement.logical_to_physical[layer], placement.logical_count[layer]
        return torch.tensor(table.clip(0)), torch.tensor(copies)


def serving_slots(chosen: Tensor, table: Tensor, copies: Tensor, first: int) -> Tensor:
    """The slot for each of ``chosen`` [tokens, k], flat: the n-th choice of an expert goes to its replica n + first."""
    flat = chosen.flatten()
    if table.shape[1] == 1:
        return table[:, 0][flat]
    order = flat.argsort(stable=True)
    ordered = flat[order]
    starts = torch.searchsorted(ordered, torch.arange(len(table), device=flat.device))
    turn = torch.arange(len(flat), device=flat.device) - starts[ordered] + first
    return torch.empty_like(flat).scatter_(0, order, table[ordered, turn % copies[ordered]])


def arrived(counts: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of ``by_slot``, its inverse, and behind which row each slot ends, int32 [slots]."""
    if arriving_pays(counts, rows):
        from counterflow.moe.kernels.routing_kernel import arrive_by_kernel

        return arrive_by_kernel(counts, rows)
    order = by_slot(counts, rows)
    return order, inverse_of(order), counts.sum(0).cumsum(0, dtype=torch.int32)


def by_slot(counts: Tensor, rows: int) -> Tensor:
    """The order that puts ``rows`` rows, sorted by rank and then by slot as in ``counts`` [ranks, slots], by slot."""
    slot = torch.arange(counts.shape[1], device=counts.device).expand_as(counts).flatten()
    return slot.repeat_interleave(counts.flatten(), output_size=rows).argsort(stable=True)


def counted(numbers: Tensor, kinds: int) -> Tensor:
    """How often each of 0 … kinds - 1 is among ``numbers``; unlike bincount it never waits for the GPU."""
    return numbers.new_zeros(kinds).scatter_add_(0, numbers, torch.ones_like(numbers))


def inverse_of(order: Tensor) -> Tensor:
    """The order that undoes ``order``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def take(source: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """Row ``order[i] // copies`` of ``source`` at place i, each row being taken ``copies`` times."""
    taken: Tensor = _Take.apply(source, order, inverse, copies)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    """Its gradient is taken as well, by the inverse: autograd's own would add into zeros, row by row."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return source.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad if ctx.copies == 1 else torch.unflatten(grad, 0, (-1, ctx.copies)).sum(1), None, None, None
