"""Twins: the copies of a stage start equal and stay equal, because their gradients are summed inside the step."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from counterflow.errors import PipelineError
from counterflow.runtime.clock import Clock, Mark
from counterflow.runtime.transport import Handle, Lane, Message, Transport
from counterflow.runtime.wire import Leaf
from counterflow.timeline import TWINS, TWINS_OF, Span


class Twins:
    """The copies that ``rank`` shares with others, ``holders[stage]`` being the ranks with one, in order.

    Every holder adds the same gradients in the same order, so all come to the same sum, bit for bit.
    """

    def __init__(
        self,
        rank: int,
        modules: Mapping[int, nn.Module],
        holders: Mapping[int, tuple[int, ...]],
        transport: Transport,
        clock: Clock,
        bucket_bytes: int,
    ) -> None:
        self._rank, self._transport, self._clock, self._bucket_bytes = rank, transport, clock, bucket_bytes
        self._modules = {stage: modules[stage] for stage in sorted(modules) if stage in holders}
        self._holders = holders
        self._before: dict[Tensor, Tensor] | None = None
        self._marks: list[tuple[int, Mark, Mark]] = []

    def align(self) -> Iterator[Handle]:
        """Give every copy the parameters and buffers of the first holder's.

        Raises:
            PipelineError: the copies do not have the same shapes and dtypes.
        """
        for stage, module in self._modules.items():
            tensors = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
            yield from self._require_alike(stage, tensors)
            first, *others = self._holders[stage]
            if self._rank == first:
                yield from [self._transport.send(self._message(stage, to=other), tensors) for other in others]
            else:
                # A parameter may be strided, a message is not.
                theirs = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
                yield self._transport.receive(self._message(stage, of=first), theirs)
                for tensor, new in zip(tensors, theirs, strict=True):
                    tensor.copy_(new)

    def set_aside(self) -> None:
        """Before a step: keep gradients of earlier steps out of it, for they have been summed already."""
        self._before = {}
        self._marks = []
        for module in self._modules.values():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._before[parameter] = parameter.grad
                    parameter.grad = None

    def reduce(self) -> Iterator[Handle]:
        """After the last W: sum each stage's gradients over its holders, in buckets."""
        done: set[Tensor] = set()
        for stage, module in self._modules.items():
            # A parameter that two stages of this rank share has its whole gradient in one place: sum it once.
            parameters = [p for p in module.parameters() if p.requires_grad and p not in done]
            done.update(parameters)
            if parameters:
                self._clock.comes_to_sum(self._rank, stage)
                yield from _in_ranges(TWINS_OF.format(stage), self._reduce_stage(stage, parameters))
                self._marks.append((stage, *self._clock.summed(self._rank, stage)))

    def spans(self) -> list[Span]:
        """When the sums of the last step were made, but for those that took no time."""
        starts = self._clock.read_ns([start for _, start, _ in self._marks])
        ends = self._clock.read_ns([end for _, _, end in self._marks])
        times = zip((stage for stage, _, _ in self._marks), starts, ends, strict=True)
        return [
            Span(self._rank, TWINS_OF.format(stage), start, end, TWINS) for stage, start, end in times if end > start
        ]

    def settle(self) -> None:
        """When no rank of this process can break any more: add the gradients of earlier steps."""
        for parameter, before in (self._before or {}).items():
            if parameter.grad is not None:
                before += parameter.grad
            parameter.grad = before
        self._before = None

    def restore(self) -> None:
        """After a broken step: the gradients are again those of before it."""
        if self._before is None:
            return
        for module in self._modules.values():
            for parameter in module.parameters():
                parameter.grad = self._before.get(parameter)
        self._before = None

    def _reduce_stage(self, stage: int, parameters: list[nn.Parameter]) -> Iterator[Handle]:
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        anyone = has.to(parameters[0].device)
        yield from self._sum(stage, anyone)
        # A parameter that no holder used keeps no gradient, as in plain autograd.
        used = [parameter for parameter, some in zip(parameters, anyone.tolist(), strict=True) if some]
        for bucket in _buckets(used, self._bucket_bytes):
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
            yield from self._sum(stage, flat)
            pieces = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                parameter.grad = piece.view(parameter.shape)

    def _sum(self, stage: int, mine: Tensor) -> Iterator[Handle]:
        """Replace ``mine`` by the sum of all holders', added in their order."""
        theirs = yield from self._exchange(stage, mine, Lane.TWINS)
        first, *rest = (mine if holder == self._rank else theirs[holder] for holder in self._holders[stage])
        total = first.clone()
        for tensor in rest:
            total += tensor
        mine.copy_(total)

    def _exchange(self, stage: int, mine: Tensor, lane: Lane) -> Generator[Handle, None, dict[int, Tensor]]:
        """What every other holder has in the place of ``mine``."""
        others = [holder for holder in self._holders[stage] if holder != self._rank]
        theirs = {other: torch.empty_like(mine) for other in others}
        sends = [self._transport.send(self._message(stage, lane, to=other), [mine]) for other in others]
        receives = [
            self._transport.receive(self._message(stage, lane, of=other), [tensor]) for other, tensor in theirs.items()
        ]
        yield from (*sends, *receives)
        return theirs

    def _require_alike(self, stage: int, tensors: list[Tensor]) -> Iterator[Handle]:
        shapes = str([str(Leaf.of(tensor)) for tensor in tensors])
        digest = torch.tensor([int.from_bytes(hashlib.sha256(shapes.encode()).digest()[:7])])
        theirs = yield from self._exchange(stage, digest, Lane.HEADER)
        for other, tensor in theirs.items():
            if not torch.equal(tensor, digest):
                one, two = sorted((other, self._rank))
                raise PipelineError(
                    f"stage {stage} has other parameters or buffers on rank {one} than on rank {two}; its "
                    "copies need the same shapes and dtypes in the same order: build them by the same code"
                )

    def _message(self, stage: int, lane: Lane = Lane.TWINS, *, to: int | None = None, of: int | None = None) -> Message:
        source, target = (self._rank if of is None else of), (self._rank if to is None else to)
        return Message(
            lane, source, target, f"the twin of stage {stage} with its weights, from rank {source} to {target}"
        )


def _in_ranges(name: str, work: Iterator[Handle]) -> Iterator[Handle]:
    """The same handles, and for a profiler a range round all that is done between two of them.

    No range spans a wait: other ranks of this process go on in it.
    """
    while True:
        with record_function(name):
            handle = next(work, None)
        if handle is None:
            return
        yield handle


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: list[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype and device, of at most ``limit`` bytes unless a single one has more."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bytes_ = parameter.numel() * parameter.element_size()
        alike = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (size + bytes_ > limit or not alike):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket
