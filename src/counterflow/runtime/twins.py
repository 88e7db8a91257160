"""Twins: the copies of a stage start equal and stay equal, because their gradients are summed inside the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from counterflow.runtime.transport import Handle, Lane, Message, Transport


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
        bucket_bytes: int,
    ) -> None:
        self._rank, self._transport, self._bucket_bytes = rank, transport, bucket_bytes
        self._modules = {stage: modules[stage] for stage in sorted(modules) if stage in holders}
        self._holders = holders
        self._before: dict[Tensor, Tensor] = {}

    def align(self) -> Iterator[Handle]:
        """Give every copy the parameters and buffers of the first holder's."""
        for stage, module in self._modules.items():
            tensors = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
            first, *others = self._holders[stage]
            if self._rank == first:
                yield from [self._transport.send(self._message(stage, to=other), tensors) for other in others]
            else:
                yield self._transport.receive(self._message(stage, of=first), tensors)

    def set_aside(self) -> None:
        """Before a step: keep gradients of earlier steps out of it, for they have been summed already."""
        self._before = {}
        for module in self._modules.values():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._before[parameter] = parameter.grad
                    parameter.grad = None

    def reduce(self) -> Iterator[Handle]:
        """After the last W: sum each stage's gradients over its holders, in buckets; then add the earlier ones."""
        for stage, module in self._modules.items():
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            if parameters:
                yield from self._reduce_stage(stage, parameters)
        for parameter, before in self._before.items():
            if parameter.grad is not None:
                before += parameter.grad
            parameter.grad = before
        self._before = {}

    def restore(self) -> None:
        """After a broken step: the gradients are again those of before it."""
        for module in self._modules.values():
            for parameter in module.parameters():
                parameter.grad = self._before.get(parameter)
        self._before = {}

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
        others = [holder for holder in self._holders[stage] if holder != self._rank]
        theirs = {other: torch.empty_like(mine) for other in others}
        sends = [self._transport.send(self._message(stage, to=other), [mine]) for other in others]
        receives = [
            self._transport.receive(self._message(stage, of=other), [tensor]) for other, tensor in theirs.items()
        ]
        yield from (*sends, *receives)
        first, *rest = (mine if holder == self._rank else theirs[holder] for holder in self._holders[stage])
        total = first.clone()
        for tensor in rest:
            total += tensor
        mine.copy_(total)

    def _message(self, stage: int, *, to: int | None = None, of: int | None = None) -> Message:
        source, target = (self._rank if of is None else of), (self._rank if to is None else to)
        return Message(
            Lane.TWINS, source, target, f"the twin of stage {stage} with its weights, from rank {source} to {target}"
        )


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
