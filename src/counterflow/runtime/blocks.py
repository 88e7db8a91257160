"""What a model has to look like for its communication to be hidden: a sequence of blocks in three parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.errors import PipelineError
from counterflow.runtime.exchange import Exchange, LocalExchange, Rows

Carry = Any
"""What a block keeps for itself while its rows are away: tensors, None, numbers, in tuples, lists and dicts."""


@dataclass
class Context:
    """What the parts of one block share about one micro-batch.

    ``rows`` says how many rows go where; ``before`` has to set it unless its exchange has one rank. ``batch`` is
    whatever the caller wants all blocks to know of this micro-batch (positions, a cache), None in training. ``notes``
    takes what the block itself wants to remember from one part to the next, without gradient: indices, counts.
    """

    batch: Any = None
    rows: Rows | None = None
    notes: SimpleNamespace = field(default_factory=SimpleNamespace)


class OverlapBlock(nn.Module):
    """One block of a model with experts on several ranks, in parts between which its rows are under way.

    ``before``: norm, attention, router, sorting the rows by where they go. ``experts``: what the ranks do with the rows
    that came to them. ``after``: bring the results back into place, weigh and add them. Between the parts the engine
    moves rows with ``exchange``. All gradients that flow from one part to another have to flow through ``carry`` and
    the rows; what stands in ``ctx`` is constant.

    Two parts more can be given. ``shared`` is work that needs no rows, so that it can hide them (shared experts).
    ``project`` and ``attend`` are the halves of ``before``, for plans that run something else between them.

    Called as a module, a block runs its parts one after the other, in plain autograd.

    Example:
        >>> import torch
        >>> from counterflow.runtime import OverlapBlock
        >>> class Doubling(OverlapBlock):
        ...     def before(self, x, ctx):
        ...         return x, x
        ...     def experts(self, received, ctx):
        ...         return 2 * received
        ...     def after(self, carry, returned, ctx):
        ...         return carry + returned
        >>> Doubling()(torch.ones(1, 2))
        tensor([[3., 3.]])
    """

    def __init__(self, exchange: Exchange | None = None) -> None:
        super().__init__()
        self.exchange: Exchange = LocalExchange() if exchange is None else exchange

    def before(self, x: Tensor, ctx: Context) -> tuple[Carry, Tensor]:
        """From ``x`` to what stays and the rows [rows, ...] that are sent, those for rank 0 first."""
        return self.attend(self.project(x, ctx), ctx)

    def experts(self, received: Tensor, ctx: Context) -> Tensor:
        """The rows that came, those of rank 0 first, to as many results in the same order."""
        raise NotImplementedError

    def after(self, carry: Carry, returned: Tensor, ctx: Context) -> Tensor:
        """What stayed, and the results in the order in which the rows were sent, to the block's output."""
        raise NotImplementedError

    def shared(self, carry: Carry, ctx: Context) -> Carry:
        """What stays, with the work in it that needs no rows."""
        return carry

    def project(self, x: Tensor, ctx: Context) -> Carry:
        """The first half of ``before``."""
        raise NotImplementedError

    def attend(self, projected: Carry, ctx: Context) -> tuple[Carry, Tensor]:
        """The second half of ``before``."""
        raise NotImplementedError

    def forward(self, x: Tensor, batch: Any = None) -> Tensor:
        """All parts, one after the other."""
        ctx = Context(batch)
        carry, send = checked(self, self.before(x, ctx))
        rows = rows_of(self, ctx, send)
        carry = self.shared(carry, ctx)
        received = exchanged(send, self.exchange, rows)
        returned = exchanged(results_of(self, received, ctx), self.exchange, rows.back())
        return self.after(carry, returned, ctx)

    @property
    def has_shared(self) -> bool:
        """Whether ``shared`` does something."""
        return type(self).shared is not OverlapBlock.shared

    @property
    def has_halves(self) -> bool:
        """Whether ``before`` comes in two halves."""
        return type(self).before is OverlapBlock.before


def checked(block: OverlapBlock, result: Any) -> tuple[Carry, Tensor]:
    """What ``before`` gave.

    Raises:
        PipelineError: it is not a carry and rows.
    """
    if type(result) is tuple and len(result) == 2 and isinstance(result[1], Tensor) and result[1].dim() > 0:
        return result
    parts = [type(part).__name__ for part in result] if type(result) is tuple else []
    what = f"({', '.join(parts)})" if parts else f"a {type(result).__name__}"
    raise PipelineError(
        f"{type(block).__name__}.before gave {what}; let it give a tuple of two: what stays, and the rows to send as "
        "one tensor [rows, ...] of at least one dimension"
    )


def results_of(block: OverlapBlock, received: Tensor, ctx: Context) -> Tensor:
    """What the experts make of the rows that came.

    Raises:
        PipelineError: it is not one result for each row, or lost the gradient that other ranks wait for.
    """
    name = type(block).__name__
    results: Any = block.experts(received, ctx)
    if not isinstance(results, Tensor) or results.dim() == 0 or len(results) != len(received):
        what = f"{list(results.shape)}" if isinstance(results, Tensor) else f"a {type(results).__name__}"
        raise PipelineError(
            f"{name}.experts made {what} of {len(received)} rows; let it give a result for each, in order"
        )
    if block.exchange.num_ranks > 1 and received.requires_grad and not results.requires_grad:
        raise PipelineError(
            f"{name}.experts made results without gradient of rows that have one, and the other ranks would wait "
            "for it; compute them from the rows, also where none came"
        )
    return results


def refuse_graphs(block: OverlapBlock, ctx: Context) -> None:
    """Of what a part has noted for the others, which are graphs by themselves.

    Raises:
        PipelineError: a note has a gradient, which would not come back to where it was made.
    """
    for name, note in vars(ctx.notes).items():
        items = note if isinstance(note, (tuple, list)) else note.values() if isinstance(note, dict) else (note,)
        if any(isinstance(item, Tensor) and item.requires_grad for item in items if not isinstance(item, nn.Parameter)):
            raise PipelineError(
                f"{type(block).__name__} left a tensor with gradient in ctx.notes.{name}; gradients flow from part to "
                "part through carry and rows only: put it into carry, or note it detached"
            )


def rows_of(block: OverlapBlock, ctx: Context, send: Tensor) -> Rows:
    """How many rows go where.

    Raises:
        PipelineError: the block has not said, or what it said does not add up to what it sends.
    """
    if ctx.rows is None and block.exchange.num_ranks == 1:
        ctx.rows = Rows((len(send),), (len(send),))
    rows: object = ctx.rows
    ranks = block.exchange.num_ranks
    name = type(block).__name__
    if rows is None:
        raise PipelineError(
            f"{name}.before did not say how many rows go to each of {ranks} ranks; let it set ctx.rows = Rows(sent, "
            "received), received from self.exchange.counts"
        )
    if not isinstance(rows, Rows):
        raise PipelineError(f"{name}.before set ctx.rows to a {type(rows).__name__}; give Rows(sent, received)")
    numbers = [*rows.sent, *rows.received]
    if len(rows.sent) != ranks or len(numbers) != 2 * ranks or min(numbers) < 0 or sum(rows.sent) != len(send):
        raise PipelineError(
            f"{name}.before set rows {rows.sent} to and {rows.received} from the ranks, and sends {len(send)} rows to "
            f"{ranks} ranks; give one number for each rank, those sent adding up to the rows"
        )
    own = block.exchange.rank
    if rows.sent[own] != rows.received[own]:
        raise PipelineError(
            f"{name}.before set {rows.sent[own]} rows from this rank to itself, and {rows.received[own]} that come "
            "from it; let those that come be what self.exchange.counts gives for those that go"
        )
    return rows


def exchanged(source: Tensor, exchange: Exchange, rows: Rows) -> Tensor:
    """What arrives when ``source`` is sent, in plain autograd and waited for at once."""
    arrived: Tensor = _Exchanged.apply(source, exchange, rows)  # type: ignore[no-untyped-call]
    return arrived


class _Exchanged(torch.autograd.Function):
    """An exchange; its gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, exchange: Exchange, rows: Rows) -> Tensor:
        ctx.exchange, ctx.rows = exchange, rows
        return _waited(source, exchange, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _waited(grads[0], ctx.exchange, ctx.rows.back()), None, None


def _waited(source: Tensor, exchange: Exchange, rows: Rows) -> Tensor:
    source = source.contiguous()
    target = buffer_for(source, rows)
    exchange.start(source, target, rows, ready_now(source)).wait()
    return target


def buffer_for(source: Tensor, rows: Rows) -> Tensor:
    """Room for what comes when ``source`` is sent."""
    return source.new_empty((sum(rows.received), *source.shape[1:]))


def ready_now(source: Tensor) -> torch.cuda.Event | None:
    """An event behind what has been launched so far; None on the CPU."""
    if not source.is_cuda:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
