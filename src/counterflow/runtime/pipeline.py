"""The face of the runtime: a checked schedule, the stages of a rank, and steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations

import torch.distributed as dist
from torch import nn

from counterflow.errors import PeerError, PipelineError
from counterflow.runtime.batch import Batch, Microbatches
from counterflow.runtime.blocks import OverlapBlock
from counterflow.runtime.clock import Clock, CudaClock, WallClock
from counterflow.runtime.drivers import AllRanks, Driver, OneRank
from counterflow.runtime.executor import StepResult
from counterflow.runtime.graph_split import GraphSplit
from counterflow.runtime.heartbeat import Heartbeat
from counterflow.runtime.rank import Equipment, Rank, device_of, refuse_stages
from counterflow.runtime.stage import LossFn
from counterflow.runtime.transport import Channel, InProcessTransport, Lane, ProcessGroupTransport, Transport
from counterflow.runtime.weights import LinearSplit, Split
from counterflow.runtime.wire import take_apart
from counterflow.schedule import Post, Schedule, Transfers, check, to_csv
from counterflow.timeline import COMPUTE, TWINS, TWINS_OF, Span, Timeline

BUCKET_BYTES = 25 << 20
SPLITS: dict[str, type[Split]] = {"linear": LinearSplit, "graph": GraphSplit}

_CALLS = ("Pipeline", "step", "evaluate", "gather_timeline")
"""What all ranks have to call together."""


class Pipeline:
    """One rank of a pipeline: the stages that ``schedule`` gives to it, trained step by step.

    ``stages`` maps each stage that the rank holds (``schedule.stages_of(rank)``) to its module. Stages are plain
    modules: what one returns the next is called with (a tuple as its arguments); tensors of any shape and dtype, None,
    numbers and strings flow, nested in tuples, lists and dicts. ``loss_fn(output, target)`` turns the last stage's
    output into a scalar; without it the last stage returns the loss. Gradients are summed over the micro-batches:
    divide in ``loss_fn`` for their mean. Copies of a stage (DualPipe's twins) start as the first holder's.

    ``group`` is the process group of the pipeline, rank for rank; by default the world. ``weight_split`` says how I
    and W are cut: "linear" at ``F.linear``, "graph" by a walk over the autograd graph. Twins exchange gradients
    in buckets of ``bucket_bytes``. A wait for a peer fails after ``timeout_s``. ``transport`` carries the messages; a
    subclass can delay or count them.

    Raises:
        ScheduleError: the schedule would not run.
        PipelineError: the stages are not those of the rank or are where the group's backend does not carry tensors, or
            ranks were given different schedules.
        PeerError: a rank did not come.

    Example:
        >>> import torch
        >>> from counterflow import dualpipe
        >>> from counterflow.runtime import Pipeline
        >>> schedule = dualpipe(2, 4)
        >>> ranks = [{s: torch.nn.Linear(8, 8) for s in schedule.stages_of(rank)} for rank in range(2)]
        >>> pipeline = Pipeline.in_process(schedule, ranks, torch.nn.functional.mse_loss)
        >>> data = torch.randn(4, 3, 8)
        >>> result = pipeline.step(inputs=list(data), targets=list(data))
        >>> sorted(result.losses), pipeline.timeline.num_ranks
        ([0, 1, 2, 3], 2)
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, nn.Module],
        loss_fn: LossFn | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        weight_split: str = "linear",
        bucket_bytes: int = BUCKET_BYTES,
        timeout_s: float = 300.0,
        transport: type[ProcessGroupTransport] = ProcessGroupTransport,
    ) -> None:
        if not dist.is_initialized():
            raise PipelineError(
                "a pipeline of several processes needs a process group: start them with torchrun and call "
                "torch.distributed.init_process_group first, or use Pipeline.in_process"
            )
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise PipelineError("this process is not in the process group that was given; only its members build this")
        if num_ranks != schedule.num_ranks:
            raise PipelineError(
                f"the process group has {num_ranks} ranks and the schedule {schedule.num_ranks}; make one for the other"
            )
        self._lower(schedule, {rank: stages})
        carrier = transport(group, _channels(self._transfers["train"]), timeout_s, device_of(stages))
        self._man({rank: stages}, loss_fn, carrier, None, weight_split, bucket_bytes)
        self._meet(OneRank(carrier))

    @classmethod
    def in_process(
        cls,
        schedule: Schedule,
        stages: Sequence[Mapping[int, nn.Module]],
        loss_fn: LossFn | None = None,
        *,
        clock: Clock | None = None,
        weight_split: str = "linear",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> Pipeline:
        """All ranks in this process, on the CPU or on one GPU; ``stages[rank]`` are those of a rank.

        ``clock`` takes the place of the wall's: with a ``VirtualClock`` a step's timeline is the simulator's.

        Raises:
            ScheduleError: the schedule would not run.
            PipelineError: the stages are not those of the ranks.
        """
        if len(stages) != schedule.num_ranks:
            raise PipelineError(f"stages got {len(stages)} entries; give one for each of {schedule.num_ranks} ranks")
        self = cls.__new__(cls)
        self._lower(schedule, dict(enumerate(stages)))
        self._man(dict(enumerate(stages)), loss_fn, InProcessTransport(), clock, weight_split, bucket_bytes)
        self._meet(AllRanks())
        return self

    def _lower(self, schedule: Schedule, stages: Mapping[int, Mapping[int, nn.Module]]) -> None:
        """Prove that the schedule runs, in both modes, and see that its stages are here."""
        self.schedule = schedule
        self._transfers = {"train": check(schedule), "forward": check(schedule.forward_only())}
        for rank, modules in stages.items():
            refuse_stages(schedule, rank, modules)

    def _man(
        self,
        stages: Mapping[int, Mapping[int, nn.Module]],
        loss_fn: LossFn | None,
        transport: Transport,
        clock: Clock | None,
        weight_split: str,
        bucket_bytes: int,
    ) -> None:
        """Set up the ranks of this process."""
        if weight_split not in SPLITS:
            raise PipelineError(f"weight_split is {weight_split!r}; it can be {' or '.join(map(repr, SPLITS))}")
        if clock is None:
            on_gpu = any(device_of(modules).type == "cuda" for modules in stages.values())
            clock = CudaClock() if on_gpu else WallClock()
        self.stages = stages
        self._loss_fn, self._clock, self._transport = loss_fn, clock, transport
        equipment = Equipment(self._transfers, loss_fn, transport, clock, SPLITS[weight_split], bucket_bytes)
        self._ranks = {index: Rank(index, modules, equipment) for index, modules in stages.items()}

    def _meet(self, driver: Driver) -> None:
        """All ranks come together, see that they have one schedule, and make the twins equal."""
        self._driver = driver
        self._last_mode: str = self.schedule.mode
        self._seen: dict[str, str] = {}
        self._broken: str | None = None
        rank = next(iter(self._ranks.values()))
        rank.watch.heartbeat = Heartbeat.of_this_process()
        digest = int.from_bytes(hashlib.sha256(to_csv(self.schedule).encode()).digest()[:7])
        with self._falling_together():
            for other, theirs in enumerate(self._come_together("Pipeline", digest)):
                if theirs != digest:
                    raise PipelineError(
                        f"rank {other} has another schedule than rank {rank.index}; give all ranks the same"
                    )
            driver.drive({index: rank.twins.align() for index, rank in self._ranks.items()})
        rank.watch.between_steps()

    def step(self, inputs: Microbatches = None, targets: Microbatches = None, *, outputs: bool = False) -> StepResult:
        """Train on one batch: every parameter's ``grad`` grows by its gradient, summed over the micro-batches.

        ``inputs`` and ``targets`` have one entry for each micro-batch, in order, or map micro-batches to entries. The
        ranks with the first stage need the inputs, those with the last one the targets, of the micro-batches that start
        or end there; the others may give None. Losses come back where the last stage is, outputs too if asked for.

        Raises:
            PipelineError: an entry is missing, or the schedule is forward-only.
            PeerError: a peer died or stalled; the message names it and the tensor that was waited for.
        """
        if self.schedule.mode != "train":
            raise PipelineError(f"the schedule {self.schedule.name} has mode 'forward' and cannot train; use evaluate")
        return self._run("train", inputs, targets, outputs)

    def evaluate(
        self, inputs: Microbatches = None, targets: Microbatches = None, *, outputs: bool = False
    ) -> StepResult:
        """Run the schedule's forwards alone, in eval mode and without gradients; arguments and result as in ``step``.

        Losses are computed for the micro-batches that have a target.
        """
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return self._run("forward", inputs, targets, outputs)
        finally:
            for module in training:
                module.training = True

    def modules(self) -> Iterator[nn.Module]:
        """Every module of every stage of this process."""
        for modules in self.stages.values():
            for module in modules.values():
                yield from module.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the stages of this process: what its optimiser gets."""
        for modules in self.stages.values():
            for module in modules.values():
                yield from module.parameters()

    @property
    def timeline(self) -> Timeline:
        """When the actions of the last step ran, on the ranks of this process."""
        return Timeline.from_spans(span for rank in self._ranks.values() for span in self._spans(rank))

    def _spans(self, rank: Rank) -> list[Span]:
        return rank.spans(self._last_mode)

    def gather_timeline(self) -> Timeline:
        """The last step's timeline of all ranks, on every rank; all ranks have to call it.

        The ranks' clocks have to be one clock, as those of the processes of one machine are.

        Raises:
            PeerError: a rank did not come.
        """
        if isinstance(self._driver, AllRanks):
            return self.timeline
        schedule = self._transfers[self._last_mode].schedule
        labels = [_labels(schedule, rank) for rank in range(schedule.num_ranks)]
        own = {
            (span.name, span.lane): (span.start_ns, span.end_ns)
            for rank in self._ranks.values()
            for span in self._spans(rank)
        }
        times = [time for rank in self._ranks for label in labels[rank] for time in own.get(label, (0, 0))]
        # All ranks gather lists of one length: as long as the longest one's.
        padded = times + [0] * (2 * max(map(len, labels)) - len(times))
        with self._falling_together():
            self._come_together("gather_timeline", 0)
            every = self._driver.meet(padded, "gather_timeline")
        for state in self._ranks.values():
            state.watch.between_steps()
        spans = (
            Span(rank, name, times[2 * index], times[2 * index + 1], lane)
            for rank, times in enumerate(every)
            for index, (name, lane) in enumerate(labels[rank])
        )
        # A stage without parameters has no gradients to sum.
        return Timeline.from_spans(span for span in spans if span.lane == COMPUTE or span.duration_ns)

    def deferred_weights(self) -> dict[int, float]:
        """For each stage of this process that has done a W, the share of its trainable parameters that waited."""
        shares: dict[int, float] = {}
        for rank in self._ranks.values():
            for index, stage in rank.stages.items():
                sizes = {id(parameter): parameter.numel() for parameter in stage.trainable()}
                if stage.deferred is not None and any(sizes.values()):
                    shares[index] = sum(sizes.get(id_, 0) for id_ in stage.deferred) / sum(sizes.values())
        return shares

    def close(self) -> None:
        """Tell the launcher, if there is one, that no step follows; the process group stays the caller's."""
        for rank in self._ranks.values():
            rank.watch.closed()

    def _run(self, mode: str, inputs: Microbatches, targets: Microbatches, outputs: bool) -> StepResult:
        if self._broken is not None:
            raise PipelineError(f"this pipeline broke in an earlier step ({self._broken}); build a new one")
        needs_targets = mode == "train" and self._loss_fn is not None
        with self._falling_together():
            batches = {
                index: Batch.of(
                    self.schedule, index, inputs, targets, needs_targets=needs_targets, want_outputs=outputs
                )
                for index in self._ranks
            }
            learn, seen = self._agree(mode, batches)
            self._clock.begin()
            self._driver.drive({i: rank.step(mode, batches[i], learn) for i, rank in self._ranks.items()})
        self._seen[mode] = seen
        self._last_mode = mode
        result = StepResult()
        for rank in self._ranks.values():
            rank.twins.settle()
            result.losses |= rank.executors[mode].result.losses
            result.outputs |= rank.executors[mode].result.outputs
        return StepResult(dict(sorted(result.losses.items())), dict(sorted(result.outputs.items())))

    def _agree(self, mode: str, batches: Mapping[int, Batch]) -> tuple[bool, str]:
        """Whether what flows may differ from last time on any rank, so that all ranks learn it anew."""
        inputs = [(m, take_apart(value)[0]) for batch in batches.values() for m, value in batch.inputs.items()]
        seen = str((inputs, [parameter.requires_grad for parameter in self.parameters()]))
        changed = self._come_together("step" if mode == "train" else "evaluate", int(seen != self._seen.get(mode)))
        return any(changed), seen

    def _come_together(self, call: str, number: int) -> list[int]:
        """All ranks make the same call; the numbers that they bring to it."""
        for state in self._ranks.values():
            state.watch.waiting(f"the other ranks to call {call}")
        every = self._driver.meet([_CALLS.index(call), number], call)
        for rank, (theirs, _) in enumerate(every):
            if _CALLS[theirs] != call:
                raise PipelineError(
                    f"rank {rank} called {_CALLS[theirs]} while rank {next(iter(self._ranks))} called {call}; all "
                    "ranks make the same calls in the same order"
                )
        return [theirs for _, theirs in every]

    @contextmanager
    def _falling_together(self) -> Iterator[None]:
        """Whatever fails here leaves the ranks out of step; say so to the launcher, and do not go on."""
        try:
            yield
        except BaseException as error:
            if isinstance(self._driver, AllRanks) and not self._shares_experts():
                self._recover()
            else:
                self._broken = str(error)
            if isinstance(error, PeerError):
                for rank in self._ranks.values():
                    rank.watch.lost(str(error))
            raise

    def _shares_experts(self) -> bool:
        """Whether blocks exchange rows with other processes, which would take those of the next step for this one's."""
        return any(isinstance(module, OverlapBlock) and module.exchange.num_ranks > 1 for module in self.modules())

    def _recover(self) -> None:
        """Within one process everything that was under way is known, and dropped: the next step starts afresh."""
        for rank in self._ranks.values():
            rank.forget()
        if isinstance(self._transport, InProcessTransport):
            self._transport.forget()
        self._seen.clear()


def _channels(transfers: Transfers) -> set[Channel]:
    """What this schedule sends over: from rank to rank, and between twins."""
    holders = transfers.schedule.twins.values()
    channels = {(Lane.TWINS, *pair) for ranks in holders for pair in permutations(ranks, 2)}
    for program in transfers.programs:
        for instruction in program:
            if isinstance(instruction, Post):
                channels |= {(Lane.PIPELINE, t.source, t.target) for t in instruction.transfers}
    return channels


def _labels(schedule: Schedule, rank: int) -> list[tuple[str, str]]:
    """Name and lane of what ``rank`` does in a step."""
    twins = schedule.twins if schedule.mode == "train" else {}
    sums = [(TWINS_OF.format(stage), TWINS) for stage in schedule.stages_of(rank) if stage in twins]
    return [(str(action), COMPUTE) for action in schedule.rows[rank]] + sums
