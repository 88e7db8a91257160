"""The chunk engine: forwards and backwards through blocks as programs of steps, issued in the order of a plan.

One thread, two lanes. Compute steps run on the caller's current stream, exchanges on streams of their own. Every
segment of a forward between two transfers is an autograd graph by itself, from detached leaves to the edges of its
outputs, so that a backward can stop wherever rows have to travel; communication takes no part in autograd. Three rules
make the lanes safe, without ``record_stream``:

1. A step waits for its own program's last transfer, never for the end of a lane: the event that an exchange waits for
   is recorded right behind the step that made the rows.
2. That step also allocates the buffer which the rows will arrive in, before it records the event: so whatever used
   the memory before is done when the exchange writes.
3. What is sent is let go only when the lane that allocated it has waited for the arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from counterflow.errors import PipelineError
from counterflow.runtime.blocks import Carry, Context, OverlapBlock, buffer_for, checked, ready_now, results_of, rows_of
from counterflow.runtime.exchange import Arrival, Exchange, Rows
from counterflow.runtime.weights import Roots, Split
from counterflow.runtime.wire import tensors_of, with_tensors
from counterflow.schedule.chunk_plans import ChunkPlan, Program, backward_steps, forward_steps


@dataclass(frozen=True)
class Chunk:
    """A module as blocks: ``before[i]`` stands in front of block i, ``behind`` follows the last one."""

    blocks: tuple[OverlapBlock, ...]
    before: tuple[tuple[nn.Module, ...], ...]
    behind: tuple[nn.Module, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Chunk | None:
        """The blocks of ``module``, an ``nn.Sequential`` of blocks and other modules; None where there are none.

        Raises:
            PipelineError: a block has a forward or hooks of its own, which the engine would pass by.
        """
        blocks: list[OverlapBlock] = []
        before: list[tuple[nn.Module, ...]] = []
        since: list[nn.Module] = []
        for item in _in_sequence(module):
            if isinstance(item, OverlapBlock):
                blocks.append(item)
                before.append(tuple(since))
                since = []
            else:
                since.append(item)
        if not blocks:
            return None
        for part in (*blocks, *_opened(module)):
            _refuse_detours(part)
        return cls(tuple(blocks), tuple(before), tuple(since))

    @property
    def shared(self) -> list[bool]:
        """Which blocks have work that needs no rows."""
        return [block.has_shared for block in self.blocks]


def _opens(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _opened(module: nn.Module) -> Iterator[nn.Module]:
    """The sequentials whose items the engine calls itself."""
    if _opens(module):
        yield module
        for item in module.children():
            yield from _opened(item)


def _in_sequence(module: nn.Module) -> Iterator[nn.Module]:
    if _opens(module):
        for item in module:  # not its children, of which a module that stands twice is one
            yield from _in_sequence(item)
    else:
        yield module


def _refuse_detours(module: nn.Module) -> None:
    name = type(module).__name__
    if isinstance(module, OverlapBlock) and type(module).forward is not OverlapBlock.forward:
        raise PipelineError(
            f"{name} has a forward of its own, which is not called where its parts are; move what it does into before, "
            "shared, experts or after"
        )
    if any(getattr(module, f"_{hooks}_hooks") for hooks in ("forward", "forward_pre", "backward", "backward_pre")):
        raise PipelineError(
            f"{name} has hooks, which are not called where its parts are; put them on modules inside it"
        )


def run(plan: ChunkPlan, *programs: ForwardProgram | BackwardProgram, serial: bool = False) -> None:
    """Issue the steps of ``programs``, which are those of ``plan``, in its order.

    With ``serial`` each step is over before the next one is issued, so nothing is hidden; the results are the same.
    """
    assert plan.programs == tuple(program.steps for program in programs), "the plan is for other programs"
    try:
        for number, place in plan.order:
            program = programs[number]
            with record_function(program.steps[place].name):
                program.issue(place)
            if serial:
                program.wait()
    except BaseException:
        for program in programs:
            program.abandon()
        raise


class _Program:
    """Steps, what each of them does, and the rows that are under way."""

    def __init__(self, steps: Program) -> None:
        self.steps = steps
        # By name: bound methods would be a cycle, and activations would stay until Python looks for those.
        self._do: list[methodcaller] = []
        self._parcel: _Parcel | None = None
        self._arrival: Arrival | None = None

    def issue(self, place: int) -> None:
        """One step, whose needs have been issued."""
        self._do[place](self)

    def wait(self) -> None:
        """For the rows under way, if any; what was sent can go then."""
        if self._arrival is not None:
            assert self._parcel is not None
            self._arrival.wait()
            self._arrival = self._parcel.source = None

    def abandon(self) -> None:
        """After an error: nothing may get the memory of rows that a GPU still moves. Peers are not waited for."""
        if self._arrival is not None and self._parcel is not None and self._parcel.ready is not None:
            self._arrival.wait()
        self._arrival = self._parcel = None

    def _send(self) -> None:
        """The step of every transfer: what the step before has made ready goes off."""
        if self._parcel is not None:
            self._arrival = self._parcel.start()

    def _land(self) -> Tensor | None:
        """The rows that came; None where none were sent."""
        self.wait()
        parcel, self._parcel = self._parcel, None
        return None if parcel is None else parcel.target


class _Parcel:
    """Rows to be sent, with the room for what arrives and the moment from which on both are ready."""

    def __init__(self, source: Tensor, exchange: Exchange, rows: Rows) -> None:
        self.source: Tensor | None = source.contiguous()
        self._exchange, self._rows = exchange, rows
        self.target = buffer_for(self.source, rows)
        self.ready = ready_now(self.source)

    def start(self) -> Arrival:
        """Off they go."""
        assert self.source is not None
        return self._exchange.start(self.source, self.target, self._rows, self.ready)


@dataclass
class _Segment:
    """The graph of one compute step.

    It came from the leaves ``inputs``. Of its outputs it keeps the edges: ``roots`` are those of ``leaves``, which went
    on in the outputs' place, and the last one, if it ``sends``, that of rows, whose memory must not be kept.
    """

    inputs: list[Tensor]
    roots: Roots
    leaves: list[Tensor]
    sends: bool
    split: Split

    def backward(self, of_rows: Tensor | None = None) -> None:
        """Leaves a ``grad`` on each of the inputs, from those on the leaves and ``of_rows``."""
        grads = [leaf.grad for leaf in self.leaves] + ([of_rows] if self.sends else [])
        some = [(root, grad) for root, grad in zip(self.roots, grads, strict=True) if grad is not None]
        self.start([root for root, _ in some], [grad for _, grad in some])

    def start(self, roots: Sequence[Any], grads: list[Tensor]) -> None:
        """A backward from ``roots``."""
        self.leaves = []
        if roots:
            self.split.backward_input(roots, grads, self.inputs)


class ForwardProgram(_Program):
    """One micro-batch's forward; ``output`` is there when all steps have been issued.

    With gradients enabled every step is recorded with a ``split`` of its own, for a ``BackwardProgram`` to follow.
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
        self.segments: dict[tuple[str, int], _Segment] = {}
        self.received: dict[int, Tensor] = {}
        self.returned: dict[int, Tensor] = {}
        self._state: Any = value if type(value) is tuple else (value,)
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
        self._pack(send, block, rows)

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
        self._pack(out, block, self.rows(block).back())

    def _tail(self) -> None:
        last = len(self.chunk.blocks)
        arrived = self._arrived(last)
        if not torch.is_grad_enabled():
            self.output = self._enter(last, *arrived)
            return
        split = self._split()
        with split.recording():
            self.output = self._enter(last, *arrived)  # not cut off, for the loss may start from it
        made = [tensor for tensor in tensors_of(self.output) if tensor.requires_grad]
        self.segments["tail", last] = _Segment(_leaves(arrived), split.roots(made), [], False, split)

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

    def _pack(self, source: Tensor, block: int, rows: Rows) -> None:
        self._rows_have_grad = source.requires_grad
        self._parcel = _Parcel(source.detach(), self.chunk.blocks[block].exchange, rows)

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
        split = self._split()
        with split.recording():
            result = compute(*value)
        kept, rows = result if sends else (result, None)
        made: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            leaf = tensor.detach()
            if tensor.requires_grad:
                made.append(tensor)
                leaves.append(leaf.requires_grad_())
            return leaf

        kept = with_tensors(kept, cut)
        sends = rows is not None and rows.requires_grad
        roots = split.roots(made + tensors_of(rows) if sends else made)
        self.segments[name, block] = _Segment(_leaves(value), roots, leaves, sends, split)
        return kept if rows is None else (kept, rows)


class BackwardProgram(_Program):
    """The backward that follows ``forward``, whose graphs it uses up.

    It starts from ``loss`` or, without one, from the gradients ``grads`` of the output's tensors that have one. The
    gradients of weights come with the ``(W)`` steps or, without ``weights``, with ``backward_weight``.
    """

    def __init__(
        self, forward: ForwardProgram, grads: list[Tensor] | None, loss: Tensor | None = None, *, weights: bool = True
    ) -> None:
        super().__init__(backward_steps(forward.chunk.shared, weights=weights))
        self._forward, self._grads, self._loss = forward, grads or [], loss
        self._waiting: dict[tuple[str, int], list[Split]] = {}
        self.deferred: set[int] = set()
        last = len(forward.chunk.blocks)
        self._add("tail", "_tail", last, weights)
        for block in reversed(range(last)):
            self._do.append(methodcaller("_send"))
            if forward.chunk.shared[block]:
                self._add("shared", "_shared", block, weights)
            self._add("mlp", "_experts", block, weights)
            self._do.append(methodcaller("_send"))
            self._add("attn", "_before", block, weights)

    def backward_weight(self) -> None:
        """All of W that no step has done."""
        for name, block in list(self._waiting):
            self._weight(name, block)

    def _add(self, name: str, step: str, block: int, weights: bool) -> None:
        self._do.append(methodcaller(step, block))
        if weights:
            self._do.append(methodcaller("_weight", name, block))

    def _weight(self, name: str, block: int) -> None:
        for split in self._waiting.pop((name, block)):
            split.backward_weight()
            self.deferred |= split.deferred()

    def _tail(self, last: int) -> None:
        segment = self._take("tail", last, "tail")
        if self._loss is None:
            segment.start(segment.roots, self._grads)
        else:
            segment.start([self._loss], [torch.ones_like(self._loss)])
        self._grads, self._loss = [], None
        self._return(last - 1)

    def _return(self, block: int) -> None:
        """The gradient of what a block got back goes to where it was made."""
        self._pack(self._forward.returned.pop(block, None), block, self._forward.rows(block))

    def _shared(self, block: int) -> None:
        self._take("shared", block, "shared").backward()

    def _experts(self, block: int) -> None:
        self._take("mlp", block, "mlp").backward(self._land())
        self._pack(self._forward.received.pop(block, None), block, self._forward.rows(block).back())

    def _before(self, block: int) -> None:
        rows = self._land()
        if ("attn-b", block) in self._forward.segments:
            self._take("attn-b", block, "attn").backward(rows)
            self._take("attn-a", block, "attn").backward()
        else:
            self._take("attn", block, "attn").backward(rows)
        if block > 0:
            self._return(block - 1)
        else:
            del self._forward  # W needs nothing of it but the splits

    def _take(self, name: str, block: int, step: str) -> _Segment:
        segment = self._forward.segments.pop((name, block))
        self._waiting.setdefault((step, block), []).append(segment.split)
        return segment

    def _pack(self, leaf: Tensor | None, block: int, rows: Rows) -> None:
        if leaf is not None:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self._parcel = _Parcel(grad, self._forward.chunk.blocks[block].exchange, rows)
            leaf.grad = None


def _leaves(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(value) if tensor.requires_grad and tensor.is_leaf]
