"""Carry a migration plan out while the model answers: a bounded batch between two steps, swapped in on all ranks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.errors import PeerError, PipelineError, PlacementError
from counterflow.experts import Fetch, MigrationPlan, Placement, Swap
from counterflow.runtime.ballot import NO, YES, vote
from counterflow.runtime.transport import Handle, Lane, Message, ProcessGroupTransport

Weights = Sequence[Tensor]
"""All that belongs to one expert: its tensors, in one order everywhere."""


class Migration:
    """One rank's part in carrying out ``plan``: call ``advance`` on all ranks between steps until ``done``.

    Rank ``r`` of ``group`` (by default the world) is GPU ``r`` of ``plan.new``. ``experts`` maps each of
    ``plan.layers`` to the slots of this rank, and a slot to the tensors of the expert in it: its weights, and whatever
    else has to travel with them. Experts of a layer have equal shapes and strides, and no gaps in memory. There are as
    many slots as the larger of both placements gives to a GPU. What comes is copied into the tensors of its slot, so
    whoever holds them keeps them.

    What is on its way lies in ``extra_bytes`` at most, allocated at once and freed at the end; one expert has to fit,
    and more make fewer, longer interruptions. ``reload`` gives the tensors of an expert, for (layer, expert), that the
    plan takes from nowhere. A wait for a peer fails after ``timeout_s``. ``transport`` carries the messages; a
    subclass can delay or count them. gloo carries experts on the CPU, NCCL those on GPUs, where NCCL's watchdog ends
    a rank whose peer died in a transfer, after the process group's own timeout.

    A layer serves by ``held`` throughout: what it gives changes in ``advance`` only, on all ranks in the same call.
    When a transfer fails, nothing of its batch is swapped in: the old placement of those experts serves on.

    Raises:
        PipelineError: there is no process group of that size, the tensors are not those of the plan, too little
            memory is allowed, or ranks were given different plans.
        PeerError: a rank did not come.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from counterflow import Placement, plan_migration
        >>> from counterflow.runtime import Migration
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> plan = plan_migration(Placement([[0, 1, 0]], 2, 1), Placement([[0, 1, 1]], 2, 1))
        >>> slots = [[torch.full((2,), float(expert))] for expert in (0, 1, 0)]
        >>> migration = Migration(plan, {0: slots}, extra_bytes=8)
        >>> while not migration.done:
        ...     swapped = migration.advance()  # between two steps
        >>> swapped, migration.held(0), slots[2][0].tolist()
        ((0,), ((0, 1, 1),), [1.0, 1.0])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        plan: MigrationPlan,
        experts: Mapping[int, Sequence[Weights]],
        *,
        extra_bytes: int,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = 60.0,
        reload: Callable[[int, int], Weights] | None = None,
        transport: type[ProcessGroupTransport] = ProcessGroupTransport,
    ) -> None:
        if not dist.is_initialized():
            raise PipelineError("a migration needs a process group: call torch.distributed.init_process_group first")
        self.plan, self._experts, self._reload = plan, experts, reload
        device = self._device()
        self._transport = transport(group, (), timeout_s, device)
        # A rank waits twice as long for a vote as for an expert: another one may be waiting for an expert meanwhile.
        self._ballot = transport(group, (), 2 * timeout_s, device)
        self.rank, num_ranks = self._transport.rank, self._transport.num_ranks
        if num_ranks != plan.new.num_gpus:
            raise PipelineError(
                f"the process group has {num_ranks} ranks and the new placement {plan.new.num_gpus} GPUs; "
                f"plan for the group, or make a group of the GPUs that are left"
            )
        self._refuse_wrong_tensors()
        self._batches = self._batched(extra_bytes)
        self._next, self._failed = 0, False
        self._held = {layer: plan.held(layer) for layer in range(plan.new.num_layers)}
        most = max(map(self._bytes_taken, self._batches), default=0)
        self._room = torch.empty(most, dtype=torch.uint8, device=device)
        self._agree_on_the_plan(extra_bytes)

    @property
    def done(self) -> bool:
        """Whether every layer is as in ``plan.new``."""
        return self._next == len(self._batches)

    @property
    def swapped(self) -> tuple[int, ...]:
        """The layers of the plan that are as in ``plan.new`` already."""
        ahead = {swap.layer for batch in self._batches[self._next :] for swap in batch}
        return tuple(layer for layer in self.plan.layers if layer not in ahead)

    def held(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The experts of every rank in ``layer`` as it is now, slot by slot."""
        return self._held[layer]

    @property
    def placement(self) -> Placement:
        """The placement as it is now, in some layers old, in some new, and in one perhaps on the way.

        Raises:
            PipelineError: slots change in number, or GPUs, and not all layers have: ask ``held`` layer by layer.
        """
        if self.done:
            return self.plan.new
        old, new = self.plan.old, self.plan.new
        if self.plan.old_gpus != tuple(range(old.num_gpus)) or old.num_slots != new.num_slots:
            raise PipelineError(
                "between placements of different sizes no one placement holds for all layers: ask held layer by layer"
            )
        rows = [list(chain.from_iterable(self._held[layer])) for layer in range(new.num_layers)]
        return replace(new, physical_to_logical=np.array(rows), certificate=None)

    def advance(self) -> tuple[int, ...]:
        """Move the next batch and swap it in, on all ranks together; the layers that are now as in the new placement.

        Raises:
            PeerError: a rank died or stalled; the message says where each layer is. What is then in ``held`` serves
                on, alike on all ranks that are left (unless a second one fails while they take their vote), and a new
                plan can start from it.
            PipelineError: a rank could not take in its batch, or the migration had failed before.
        """
        if self._failed:
            raise PipelineError("the migration has failed and does not go on; plan a new one from what is held")
        if self.done:
            return ()
        batch = self._batches[self._next]
        staged: dict[tuple[int, int], list[Tensor]] = {}
        problem: Exception | None = None
        try:
            staged = self._fetch(batch)
        except Exception as error:  # whatever it is, the others have to hear that this rank cannot swap
            problem = error
        votes, silence = vote(self._ballot, problem is None)
        before = self.swapped
        if all(each == YES for each in votes):
            self._swap(batch, staged)
        if silence is None and all(each == YES for each in votes):
            return tuple(layer for layer in self.swapped if layer not in before)
        self._failed = True
        where = self._where()
        if isinstance(problem, PeerError) or (problem is None and silence is not None):
            cause = problem or silence
            raise PeerError(f"{cause}; {where}") from cause
        if problem is not None:
            raise PipelineError(f"rank {self.rank} could not take in its experts ({problem}); {where}") from problem
        others = [rank for rank, each in enumerate(votes) if each == NO]
        raise PipelineError(f"rank {others[0]} could not take in its experts; {where}")

    # --- before the first batch -----------------------------------------------------------------------------

    def _refuse_wrong_tensors(self) -> None:
        plan = self.plan
        gpu = plan.old_gpus[self.rank]
        rooms = plan.new.num_slots // plan.new.num_gpus, plan.old.num_slots // plan.old.num_gpus if gpu >= 0 else 0
        for layer in plan.layers:
            slots = self._experts.get(layer, ())
            if len(slots) != max(rooms):
                raise PipelineError(
                    f"layer {layer} got tensors for {len(slots)} slots of rank {self.rank}; give those of {max(rooms)}"
                )
            for slot, tensors in enumerate(slots):
                for tensor in tensors:
                    if not _as_it_lies(tensor).is_contiguous():
                        raise PipelineError(
                            f"slot {slot} of layer {layer} on rank {self.rank} has {_shapes([tensor])}, and to send "
                            f"what has gaps in memory takes more than extra_bytes; give tensors without"
                        )
                if _shapes(tensors) != _shapes(slots[0]):
                    raise PipelineError(
                        f"slot {slot} of layer {layer} on rank {self.rank} has tensors {_shapes(tensors)} and slot 0 "
                        f"{_shapes(slots[0])}; experts of a layer have to be alike"
                    )
        lost = [
            swap.layer for layer in plan.layers for swap in plan.swaps(layer) for f in swap.fetches if f.from_gpu < 0
        ]
        if lost and self._reload is None:
            raise PipelineError(f"experts of layer {lost[0]} have no copy left: say how to load them (reload=)")

    def _device(self) -> torch.device | None:
        """Where the experts are; None where no layer changes."""
        slots = chain.from_iterable(self._experts.get(layer, ()) for layer in self.plan.layers)
        devices = {tensor.device for slot in slots for tensor in slot}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise PipelineError(f"this rank has experts on {names}; have all of a rank on one device")
        return devices.pop() if devices else None

    def _bytes_of_expert(self, layer: int) -> int:
        return sum(tensor.nbytes for tensor in self._experts[layer][0])

    def _batched(self, extra_bytes: int) -> list[list[Swap]]:
        """As many steps of different layers at a time as need no more than ``extra_bytes`` on any rank."""
        batches: list[list[Swap]] = []
        taken: Counter[int] = Counter()
        for layer in self.plan.layers:
            size = self._bytes_of_expert(layer)
            try:
                swaps = self.plan.swaps(layer, extra_bytes // size if size else None)
            except PlacementError as error:
                raise PipelineError(
                    f"extra_bytes is {extra_bytes} and an expert of layer {layer} has {size} bytes: {error}"
                ) from error
            for swap in swaps:
                needs = Counter({gpu: size * number for gpu, number in _coming(swap).items()})
                full = any(taken[gpu] + number > extra_bytes for gpu, number in needs.items())
                if not batches or full or any(layer == other.layer for other in batches[-1]):
                    batches.append([])
                    taken.clear()
                batches[-1].append(swap)
                taken.update(needs)
        return batches

    def _bytes_taken(self, batch: list[Swap]) -> int:
        return sum(_coming(swap)[self.rank] * self._bytes_of_expert(swap.layer) for swap in batch)

    def _agree_on_the_plan(self, extra_bytes: int) -> None:
        shapes = [_shapes(self._experts[layer][0]) for layer in self.plan.layers]
        digest = hashlib.sha256(f"{self.plan.to_json()}{shapes}{extra_bytes}".encode()).digest()
        number = int.from_bytes(digest[:7])
        for other, (theirs,) in enumerate(self._transport.gather([number], "Migration")):
            if theirs != number:
                raise PipelineError(
                    f"rank {other} has another plan, other tensors or other extra_bytes than rank {self.rank}; "
                    f"give all ranks the same"
                )

    # --- a batch --------------------------------------------------------------------------------------------

    def _fetch(self, batch: list[Swap]) -> dict[tuple[int, int], list[Tensor]]:
        """Every expert that comes to this rank, by layer and expert, beside the slots; the others get theirs."""
        fetches = [(swap.layer, fetch) for swap in batch for fetch in _once(swap)]
        staged = self._stage([(layer, fetch.expert) for layer, fetch in fetches if fetch.to_gpu == self.rank])
        handles: list[Handle | None] = []
        problem: Exception | None = None
        # All ranks post in one order, so that on channels that are queues no two wait for each other.
        for layer, fetch in fetches:
            try:
                handles.append(self._post(layer, fetch, staged))
            except Exception as error:  # the others still get theirs, or they would wait in vain and blame this rank
                problem = problem or error
        if problem is not None:
            raise problem
        for handle in handles:
            if handle is not None:
                handle.wait()
        for layer, fetch in fetches:
            if fetch.to_gpu == self.rank and fetch.from_gpu < 0:
                _copy(staged[layer, fetch.expert], self._reloaded(layer, fetch.expert))
        if self._room.is_cuda:  # there a wait is the stream's, and a vote has to mean that the experts are here
            torch.cuda.current_stream(self._room.device).synchronize()
        return staged

    def _post(self, layer: int, fetch: Fetch, staged: dict[tuple[int, int], list[Tensor]]) -> Handle | None:
        """This rank's side of a fetch, if it has one."""
        what = f"expert {fetch.expert} of layer {layer} from rank {fetch.from_gpu} to {fetch.to_gpu}"
        message = Message(Lane.EXPERTS, fetch.from_gpu, fetch.to_gpu, what)
        here = fetch.from_gpu == self.rank
        if here and fetch.to_gpu == self.rank:
            _copy(staged[layer, fetch.expert], self._experts[layer][fetch.from_slot])
        elif here:
            tensors = self._experts[layer][fetch.from_slot]
            return self._transport.send(message, [_as_it_lies(tensor.detach()) for tensor in tensors])
        elif fetch.to_gpu == self.rank and fetch.from_gpu >= 0:
            return self._transport.receive(message, [_as_it_lies(tensor) for tensor in staged[layer, fetch.expert]])
        return None

    def _reloaded(self, layer: int, expert: int) -> Weights:
        """As ``reload`` gives it; of another shape a copy would be made as well, over and over."""
        assert self._reload is not None, "seen to at the start"
        tensors, like = self._reload(layer, expert), self._experts[layer][0]
        if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in like]:
            raise PipelineError(
                f"reload gave {_shapes(tensors)} for expert {expert} of layer {layer}; give {_shapes(like)}"
            )
        return tensors

    def _stage(self, coming: list[tuple[int, int]]) -> dict[tuple[int, int], list[Tensor]]:
        """Room for the experts: the largest elements first, so that all are aligned without a gap."""
        like = [(key, at, tensor) for key in coming for at, tensor in enumerate(self._experts[key[0]][0])]
        start, views = 0, dict[tuple[tuple[int, int], int], Tensor]()
        for key, at, tensor in sorted(like, key=lambda it: -it[2].element_size()):
            end = start + tensor.nbytes
            views[key, at] = self._room[start:end].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
            start = end
        return {key: [views[key, at] for at in range(len(self._experts[key[0]][0]))] for key in coming}

    def _swap(self, batch: list[Swap], staged: dict[tuple[int, int], list[Tensor]]) -> None:
        for swap in batch:
            for fetch in swap.fetches:
                if fetch.to_gpu == self.rank:
                    _copy(self._experts[swap.layer][fetch.to_slot], staged[swap.layer, fetch.expert])
            self._held[swap.layer] = swap.held
        self._next += 1
        if self.done:
            self._room = self._room.new_empty(0)

    def _where(self) -> str:
        begun = {swap.layer for batch in self._batches[: self._next] for swap in batch}
        names = {
            "new": self.swapped,
            "partly new": [layer for layer in self.plan.layers if layer in begun and layer not in self.swapped],
            "old": [layer for layer in self.plan.layers if layer not in begun],
        }
        parts = [f"{name}: {', '.join(map(str, layers))}" for name, layers in names.items() if layers]
        return f"the placement of the layers is {'; '.join(parts)}"


def _once(swap: Swap) -> Iterator[Fetch]:
    """The fetches that bring an expert to a GPU for the first time."""
    seen = set()
    for fetch in swap.fetches:
        if (fetch.to_gpu, fetch.expert) not in seen:
            seen.add((fetch.to_gpu, fetch.expert))
            yield fetch


def _coming(swap: Swap) -> Counter[int]:
    """How many experts have to be kept beside their slots on each GPU."""
    return Counter(fetch.to_gpu for fetch in _once(swap))


def _shapes(tensors: Weights) -> str:
    """Types and shapes, and how tensors that are not contiguous lie in memory."""
    return ", ".join(
        f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        f"{'' if tensor.is_contiguous() else f' with strides {list(tensor.stride())}'}"
        for tensor in tensors
    )


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The same memory, its dimensions in the order they have there: contiguous without a copy, if it has no gaps."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


@torch.inference_mode()  # in which also weights that were made in it may change
def _copy(targets: Weights, sources: Weights) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
