"""The forward of a micro-batch as a program: the parts of its blocks, and what goes from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from counterflow.runtime.blocks import Carry, Context, checked, refuse_graphs, results_of, rows_of
from counterflow.runtime.chunk import Program
from counterflow.runtime.exchange import Rows
from counterflow.runtime.segment import Segment
from counterflow.runtime.sequence import Chunk
from counterflow.runtime.weights import Split
from counterflow.schedule.chunk_plans import forward_steps


class ForwardProgram(Program):
    """One micro-batch's forward; ``output`` is there when all steps have been issued.

    What follows a block's last rows, its ``after``, is in one step with the ``before`` of the next: no rows travel
    between them. With gradients enabled every step is recorded with a ``split`` of its own, for a ``BackwardProgram``
    to follow.
    ``batch`` is what the blocks' contexts say of the micro-batch; ``mark``, ``halves`` and ``receives`` are those of
    ``forward_steps``.
    """

    output: Any = None

    def __init__(
        self,
        chunk: Chunk,
        value: Any,
        split: Callable[[], Split],
        *,
        batch: Any = None,
        mark: str = "(F)",
        halves: bool = False,
        receives: bool = False,
    ) -> None:
        super().__init__(forward_steps(chunk.shared, mark, halves=halves, receives=receives))
        self.chunk, self._split = chunk, split
        self.contexts = [Context(batch) for _ in chunk.blocks]
        self.segments: dict[tuple[str, int], Segment] = {}
        self.received: dict[int, Tensor] = {}
        self.returned: dict[int, Tensor] = {}
        # What the next compute step gets beside rows: the chunk's input as arguments, then a carry, or half a before.
        self._state: Any = value if type(value) is tuple else (value,)
        # Rows arrive without a graph; those that were sent with one will be asked for a gradient.
        self._rows_have_grad = False
        transfer = [methodcaller("_send"), methodcaller("wait")] if receives else [methodcaller("_send")]
        for block, has_shared in enumerate(chunk.shared):
            first = ["_project", "_attend"] if halves else ["_before"]
            self._do += [*(methodcaller(step, block) for step in first), *transfer]
            self._do += [methodcaller("_shared", block)] if has_shared else []
            self._do += [methodcaller("_experts", block), *transfer]
        self._do.append(methodcaller("_tail"))

    def take_output(self) -> Any:
        """The output, which is not kept here any longer."""
        output, self.output = self.output, None
        return output

    def rows(self, block: int) -> Rows:
        """How many rows ``block`` has sent and received."""
        rows = self.contexts[block].rows
        assert rows is not None, "before has been issued"
        return rows

    def _before(self, block: int) -> None:
        def before(*arrived: Any) -> tuple[Carry, Tensor]:
            module = self.chunk.blocks[block]
            return checked(module, module.before(self._enter(block, *arrived), self.contexts[block]))

        self._leave(block, *self._segment("attn", block, before, self._arrived(block), sends=True))

    def _project(self, block: int) -> None:
        def project(*arrived: Any) -> Carry:
            return self.chunk.blocks[block].project(self._enter(block, *arrived), self.contexts[block])

        self._state = self._segment("attn-a", block, project, self._arrived(block))

    def _attend(self, block: int) -> None:
        def attend(projected: Carry) -> tuple[Carry, Tensor]:
            module = self.chunk.blocks[block]
            return checked(module, module.attend(projected, self.contexts[block]))

        self._leave(block, *self._segment("attn-b", block, attend, (self._state,), sends=True))

    def _leave(self, block: int, carry: Carry, send: Tensor) -> None:
        self._state = carry
        rows = rows_of(self.chunk.blocks[block], self.contexts[block], send)
        self._pack_out(send, block, rows)

    def _shared(self, block: int) -> None:
        def shared(carry: Carry) -> Carry:
            return self.chunk.blocks[block].shared(carry, self.contexts[block])

        self._state = self._segment("shared", block, shared, (self._state,))

    def _experts(self, block: int) -> None:
        def experts(received: Tensor) -> tuple[None, Tensor]:
            return None, results_of(self.chunk.blocks[block], received, self.contexts[block])

        received = self._unpack()
        if received.requires_grad:
            self.received[block] = received
        _, out = self._segment("mlp", block, experts, (received,), sends=True)
        self._pack_out(out, block, self.rows(block).back())

    def _tail(self) -> None:
        last = len(self.chunk.blocks)
        leave, arrived = partial(self._enter, last), self._arrived(last)
        if torch.is_grad_enabled():
            self.output, self.segments["tail", last] = Segment.record_last(self._split(), leave, arrived)
        else:
            self.output = leave(*arrived)

    def _arrived(self, block: int) -> tuple[Any, ...]:
        """What goes into a block: the chunk's own input, or what the block before kept and got back."""
        if block == 0:
            return tuple(self._state)
        returned = self._unpack()
        if returned.requires_grad:  # else no gradient comes back for it, and nothing need be kept
            self.returned[block - 1] = returned
        return self._state, returned

    def _enter(self, block: int, *arrived: Any) -> Any:
        """Through the end of the block before, and what stands between the two."""
        if block > 0:
            carry, returned = arrived
            arrived = (self.chunk.blocks[block - 1].after(carry, returned, self.contexts[block - 1]),)
        between = self.chunk.behind if block == len(self.chunk.blocks) else self.chunk.before[block]
        if len(arrived) > 1 and between:  # what came from another stage, a tuple as its arguments
            arrived, between = (between[0](*arrived),), between[1:]
        x = arrived if len(arrived) > 1 else arrived[0]
        for module in between:
            x = module(x)  # as nn.Sequential does
        return x

    def _pack_out(self, source: Tensor, block: int, rows: Rows) -> None:
        self._rows_have_grad = source.requires_grad
        self._pack(source.detach(), self.chunk.blocks[block].exchange, rows)

    def _unpack(self) -> Tensor:
        rows = self._land()
        assert rows is not None
        return rows.requires_grad_(self._rows_have_grad)

    def _segment(
        self, name: str, block: int, compute: Callable[..., Any], value: tuple[Any, ...], *, sends: bool = False
    ) -> Any:
        """Compute, keep the graph, and go on with leaves in the place of its outputs."""
        if not torch.is_grad_enabled():
            return compute(*value)
        result, self.segments[name, block] = Segment.record(self._split(), compute, value, sends=sends)
        refuse_graphs(self.chunk.blocks[block], self.contexts[block])
        return result
