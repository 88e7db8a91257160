"""One rank follows its program: the three instructions of ``schedule/transfers.py``, carried out.

The executor never blocks. Where it has to wait it yields the handle, and whoever drives it comes back when that is
ready: with one rank in a process by blocking, with all ranks in one process by letting another one go on.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from counterflow.errors import PipelineError
from counterflow.runtime.batch import Batch
from counterflow.runtime.block_stage import BlockStage, overlapped
from counterflow.runtime.clock import Clock, Mark
from counterflow.runtime.heartbeat import Watch
from counterflow.runtime.stage import LossFn, Stage, describe, is_scalar
from counterflow.runtime.transport import Handle, Lane, Message, Transport
from counterflow.runtime.wire import Leaf, Structure, take_apart
from counterflow.schedule import Action, Kind, Payload, Post, Run, Transfer, Transfers, Wait
from counterflow.timeline import Span


@dataclass
class StepResult:
    """What a step leaves on the ranks that hold the last stage; empty on the others.

    ``losses[microbatch]`` is a detached scalar; ``outputs[microbatch]`` is what the last stage returned, detached, if
    it was asked for.
    """

    losses: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)


class Executor:
    """Runs the program of ``rank`` as often as asked, on the same stages.

    Shapes are learned in the first step, from a header before each activation, and again whenever the caller says that
    they may have changed; the steps between send nothing but tensors.
    """

    def __init__(
        self,
        rank: int,
        transfers: Transfers,
        stages: dict[int, Stage],
        loss_fn: LossFn | None,
        transport: Transport,
        clock: Clock,
        device: torch.device,
        watch: Watch,
    ) -> None:
        self.rank = rank
        self._program = transfers.programs[rank]
        self._last_stage = transfers.schedule.num_stages - 1
        self._train = transfers.schedule.mode == "train"
        self.stages, self._loss_fn, self._transport = stages, loss_fn, transport
        self._clock, self._device, self._watch = clock, device, watch
        row = transfers.schedule.rows[rank]
        parts = [part for action in row for part in action.parts]
        self._halved = {(part.stage, part.microbatch) for part in parts if part.kind is Kind.I}
        here = {(part.stage, part.microbatch) for part in parts if part.kind is Kind.F}
        self._stays = {(stage, m) for stage, m in here if (stage + 1, m) in here}
        self._structures: dict[tuple[int, int], Structure] = {}
        self._reset(Batch({}, {}, False))

    def _reset(self, batch: Batch) -> None:
        self._batch = batch
        self._result = StepResult()
        self._activations: dict[tuple[int, int], Any] = {}
        self._gradients: dict[tuple[int, int], list[Tensor]] = {}
        self._outbox: dict[tuple[Payload, int, int], list[Tensor]] = {}
        self._under_way: dict[Transfer, tuple[list[Handle], list[Tensor]]] = {}
        self._unposted = defaultdict[int, deque[Transfer]](deque)
        self._marks: list[tuple[Action, Mark, Mark]] = []

    def run(self, batch: Batch, learn_shapes: bool) -> Iterator[Handle]:
        """One step; afterwards ``result`` and ``spans`` are its own."""
        self._reset(batch)
        self._learning = learn_shapes
        if learn_shapes:
            self._structures.clear()
        for instruction in self._program:
            match instruction:
                case Post(transfers):
                    for transfer in transfers:
                        self._post(transfer)
                case Wait(transfer):
                    yield from self._wait(transfer)
                case Run(action):
                    self._run(action)

    @property
    def result(self) -> StepResult:
        """Losses and outputs of the last step."""
        return self._result

    def spans(self) -> list[Span]:
        """When each action of the last step ran."""
        starts = self._clock.read_ns([start for _, start, _ in self._marks])
        ends = self._clock.read_ns([end for _, _, end in self._marks])
        actions = (action for action, _, _ in self._marks)
        times = zip(actions, starts, ends, strict=True)
        return [Span(self.rank, str(action), start, end) for action, start, end in times]

    def forget(self) -> None:
        """Drop what a broken step left, shapes included."""
        self._reset(Batch({}, {}, False))
        self._structures.clear()
        for stage in self.stages.values():
            stage.forget()

    # --- computing ------------------------------------------------------------------------------------------

    def _run(self, action: Action) -> None:
        self._watch.computing(str(action))
        start = self._clock.mark(self.rank)
        try:
            with record_function(str(action)), torch.set_grad_enabled(self._train):
                if not (action.pair and self._overlap(*action.pair)):
                    for part in action.parts:
                        self._compute(part)
        except Exception as error:
            error.add_note(f"counterflow: rank {self.rank}, at {action}")
            raise
        self._clock.ran(self.rank, action)
        self._marks.append((action, start, self._clock.mark(self.rank)))

    def _overlap(self, forward: Action, backward: Action) -> bool:
        """An F&B of blocks; without blocks there is nothing to interleave, and it is a forward, then a backward."""
        up, down = self.stages[forward.stage], self.stages[backward.stage]
        if not (isinstance(up, BlockStage) and isinstance(down, BlockStage)):
            return False
        grads = self._gradients.pop((down.index, backward.microbatch), None)
        programs = (
            up.start_forward(forward.microbatch, self._input(up, forward.microbatch)),
            down.start_backward(backward.microbatch, grads, weights=backward.kind is Kind.B),
        )
        overlapped(*programs)
        self._pass_on(up, forward.microbatch, programs[0].take_output())
        self._hand_down(down.index, backward.microbatch, down.end_backward(backward.microbatch))
        return True

    def _compute(self, part: Action) -> None:
        stage, m = self.stages[part.stage], part.microbatch
        match part.kind:
            case Kind.F:
                halved = (stage.index, m) in self._halved
                self._pass_on(stage, m, stage.forward(m, self._input(stage, m), halved=halved))
            case Kind.B:
                self._hand_down(stage.index, m, stage.backward(m, self._gradients.pop((stage.index, m), None)))
            case Kind.I:
                grads = self._gradients.pop((stage.index, m), None)
                self._hand_down(stage.index, m, stage.backward_input(m, grads))
            case Kind.W:
                stage.backward_weight(m)

    def _input(self, stage: Stage, m: int) -> Any:
        return self._batch.inputs[m] if stage.index == 0 else self._activations.pop((stage.index - 1, m))

    def _pass_on(self, stage: Stage, m: int, output: Any) -> None:
        if stage.index == self._last_stage:
            self._finish(stage, m, output)
        else:
            self._hand_up(stage.index, m, output)

    def _finish(self, stage: Stage, m: int, output: Any) -> None:
        """The last stage: the loss, and the output if it was asked for."""
        if self._batch.want_outputs:
            structure, tensors = take_apart(output)
            self._result.outputs[m] = structure.put_together([tensor.detach() for tensor in tensors])
        if self._loss_fn is not None and not self._train and m not in self._batch.targets:
            return
        loss = output if self._loss_fn is None else self._loss_fn(output, self._batch.targets.get(m))
        if self._train:
            stage.loss(m, loss)
        elif not is_scalar(loss):
            if self._loss_fn is None:
                return  # it returned its output, which can be asked for
            raise PipelineError(f"the loss of micro-batch {m} is {describe(loss)}; return a scalar tensor from loss_fn")
        self._result.losses[m] = loss.detach()

    def _hand_up(self, stage: int, m: int, output: Any) -> None:
        """An activation: to the next stage if that is here, else into the outbox."""
        structure, tensors = take_apart(output)
        known = self._structures.setdefault((stage, m), structure)
        if structure != known:
            raise PipelineError(
                f"stage {stage} passed on {structure} for micro-batch {m}, and {known} before; what a stage passes "
                "on may change only with the shapes of the pipeline's inputs or with the parameters that are frozen"
            )
        if (stage, m) in self._stays:
            self._activations[stage, m] = _as_input(structure, [tensor.detach() for tensor in tensors])
        else:
            self._outbox["activation", stage, m] = [tensor.detach() for tensor in tensors]

    def _hand_down(self, stage: int, m: int, grads: list[Tensor]) -> None:
        """The gradients of a stage's inputs: to the stage before if that is here, else into the outbox."""
        if stage == 0:
            return
        if (stage - 1, m) in self._stays:
            self._gradients[stage - 1, m] = grads
        else:
            self._outbox["gradient", stage, m] = grads

    # --- communicating --------------------------------------------------------------------------------------

    def _post(self, transfer: Transfer) -> None:
        self._clock.posted(self.rank, transfer)
        if transfer.source == self.rank:
            tensors = self._outbox.pop((transfer.payload, transfer.stage, transfer.microbatch))
            handles = self._announce(transfer)
            handles.append(self._transport.send(Message.of(transfer), tensors))
            self._under_way[transfer] = handles, tensors
            return
        earlier = self._unposted[transfer.source]
        # Receives match in order, so behind one whose shapes are not known yet this one has to queue as well.
        if earlier or self._leaves(transfer) is None:
            earlier.append(transfer)
        else:
            self._receive(transfer)

    def _receive(self, transfer: Transfer) -> None:
        leaves = self._leaves(transfer)
        assert leaves is not None, f"{transfer}: posted before its shapes are known"
        tensors = [leaf.empty(self._device) for leaf in leaves]
        self._under_way[transfer] = [self._transport.receive(Message.of(transfer), tensors)], tensors

    def _leaves(self, transfer: Transfer) -> Sequence[Leaf] | None:
        """The tensors that a receive is for; a gradient has those of the activation that it answers."""
        activation = transfer.payload == "activation"
        structure = self._structures.get((transfer.stage - (not activation), transfer.microbatch))
        if structure is None:
            return None
        return structure.leaves if activation else structure.gradient_leaves()

    def _wait(self, transfer: Transfer) -> Iterator[Handle]:
        self._watch.waiting(str(transfer))
        while transfer not in self._under_way:
            first = self._unposted[transfer.source].popleft()
            if self._leaves(first) is None:
                yield from self._learn(first)
            self._receive(first)
        handles, tensors = self._under_way.pop(transfer)
        yield from handles
        self._clock.waited(self.rank, transfer)
        if transfer.source == self.rank:
            return
        if transfer.payload == "activation":
            key = transfer.stage, transfer.microbatch
            self._activations[key] = _as_input(self._structures[key], tensors)
        else:
            self._gradients[transfer.stage - 1, transfer.microbatch] = tensors

    def _announce(self, transfer: Transfer) -> list[Handle]:
        """While shapes are being learned an activation is preceded by its structure: a length, then text."""
        if not self._learning or transfer.payload != "activation":
            return []
        data = bytearray(self._structures[transfer.stage, transfer.microbatch].encode())
        header = [torch.tensor([len(data)]), torch.frombuffer(data, dtype=torch.uint8)]
        return [self._transport.send(Message.of(transfer, Lane.HEADER), [part]) for part in header]

    def _learn(self, transfer: Transfer) -> Iterator[Handle]:
        length = torch.zeros(1, dtype=torch.int64)
        yield self._transport.receive(Message.of(transfer, Lane.HEADER), [length])
        data = torch.zeros(int(length), dtype=torch.uint8)
        yield self._transport.receive(Message.of(transfer, Lane.HEADER), [data])
        self._structures[transfer.stage, transfer.microbatch] = Structure.decode(bytes(data.tolist()))


def _as_input(structure: Structure, tensors: list[Tensor]) -> Any:
    """The value that a stage is called with: new leaves of the graph, which collect its gradients."""
    for tensor, leaf in zip(tensors, structure.leaves, strict=True):
        tensor.requires_grad_(leaf.requires_grad)
    return structure.put_together(tensors)
