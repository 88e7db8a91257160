"""Cases: a schedule, its stages and its data; run plainly, within one process, or by ``ranks/run_cases.py``.

The plain run is the reference: one process, the whole model in a row, ``loss.backward()`` for one micro-batch after
the other, in the order in which the pipeline takes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow import Schedule
from counterflow.runtime import Pipeline
from counterflow.schedule import Kind, generate

Gradients = dict[int, dict[str, Tensor | None]]
"""For each stage those of its parameters, by name."""

FEATURES = 8


def block(stage: int) -> nn.Module:
    """The ordinary stage; equal for equal numbers."""
    torch.manual_seed(stage)
    wide = 2 * FEATURES
    return nn.Sequential(nn.Linear(FEATURES, wide), nn.Tanh(), nn.LayerNorm(wide), nn.Linear(wide, FEATURES)).double()


def random_data(seed: int, count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@dataclass(frozen=True)
class Step:
    """The inputs and targets of all micro-batches."""

    inputs: Sequence[Any]
    targets: Sequence[Any]


def ordinary_step(num_microbatches: int, seed: int = 0, rows: int = 3) -> Step:
    both = random_data(seed, 2 * num_microbatches, rows, 5, FEATURES)
    return Step(both[:num_microbatches], both[num_microbatches:])


@dataclass(frozen=True)
class Case:
    """Gradients are accumulated over ``steps``; the loss is the mean over micro-batches."""

    schedule: Schedule
    steps: Sequence[Step]
    make: Callable[[int], nn.Module] = block
    loss: Callable[[Any, Any], Tensor] = F.mse_loss
    weight_split: str = "linear"
    bucket_bytes: int = 1 << 20

    def loss_fn(self, output: Any, target: Any) -> Tensor:
        return self.loss(output, target) / self.schedule.num_microbatches

    def on(self, device: str) -> "Case":
        """The same there."""
        if device == "cpu":
            return self
        steps = [Step([x.to(device) for x in s.inputs], [y.to(device) for y in s.targets]) for s in self.steps]
        return replace(self, steps=steps, make=lambda stage: self.make(stage).to(device))

    def stages_of(self, rank: int) -> dict[int, nn.Module]:
        return {stage: self.make(stage) for stage in self.schedule.stages_of(rank)}

    def in_process(self, **more: Any) -> Pipeline:
        ranks = [self.stages_of(rank) for rank in range(self.schedule.num_ranks)]
        options = {"weight_split": self.weight_split, "bucket_bytes": self.bucket_bytes, **more}
        return Pipeline.in_process(self.schedule, ranks, self.loss_fn, **options)


def ordinary_case(name: str, num_ranks: int, num_microbatches: int, num_steps: int = 1, **more: Any) -> Case:
    steps = [ordinary_step(num_microbatches, seed) for seed in range(num_steps)]
    return Case(generate(name, num_ranks, num_microbatches), steps, **more)


def named_case(name: str) -> Case:
    """From a text that fits on a command line: ``1f1b/4/8``, or a flow as well: ``zb1p/3/4/views``."""
    generator, num_ranks, num_microbatches, *flow = name.split("/")
    if not flow:
        return ordinary_case(generator, int(num_ranks), int(num_microbatches))
    from runtime.flows import FLOWS

    return FLOWS[flow[0]].case(generate(generator, int(num_ranks), int(num_microbatches)))


# --- in one process, without a pipeline ---------------------------------------------------------------------


def run_plainly(stages: Sequence[nn.Module], value: Any) -> Any:
    for stage in stages:
        value = stage(*value) if type(value) is tuple else stage(value)
    return value


def plain_gradients(case: Case, order: Sequence[tuple[int, int]]) -> Gradients:
    """One ``backward`` after the other for these (step, micro-batch), accumulated by autograd."""
    stages = [case.make(stage) for stage in range(case.schedule.num_stages)]
    for step, m in order:
        data = case.steps[step]
        case.loss_fn(run_plainly(stages, data.inputs[m]), data.targets[m]).backward()
    return {stage: gradients_of(module) for stage, module in enumerate(stages)}


def plain_losses(case: Case) -> list[dict[int, Tensor]]:
    """For each step those of all micro-batches."""
    stages = [case.make(stage) for stage in range(case.schedule.num_stages)]
    with torch.no_grad():
        return [
            {m: case.loss_fn(run_plainly(stages, x), data.targets[m]) for m, x in enumerate(data.inputs)}
            for data in case.steps
        ]


def plain_outputs(case: Case) -> list[Any]:
    """Those of the last stage in the first step."""
    stages = [case.make(stage) for stage in range(case.schedule.num_stages)]
    with torch.no_grad():
        return [run_plainly(stages, x) for x in case.steps[0].inputs]


def whole_batch_gradients(case: Case) -> Gradients:
    """All micro-batches of the first step as one."""
    stages = [case.make(stage) for stage in range(case.schedule.num_stages)]
    inputs, targets = torch.cat(list(case.steps[0].inputs)), torch.cat(list(case.steps[0].targets))
    case.loss(run_plainly(stages, inputs), targets).backward()
    return {stage: gradients_of(module) for stage, module in enumerate(stages)}


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def expected_gradients(case: Case) -> Gradients:
    """What the pipeline has to arrive at, bit for bit.

    A stage with one holder accumulates on and on. Twins accumulate apart in every step, add up, and then
    add what was there before. What I adds follows the row's order of I, a matrix that waits for W that of W.
    """
    schedule = case.schedule
    accumulated = cache(lambda order: plain_gradients(case, order))

    def of(rank: int, stage: int, name: str, steps: Sequence[int]) -> Tensor | None:
        waits = case.weight_split == "graph" or dict(case.make(stage).named_parameters())[name].dim() > 1
        last = Kind.W if waits else Kind.I
        ids = microbatches_of(schedule, rank, stage, (Kind.B, last))
        return accumulated(tuple((step, m) for step in steps for m in ids))[stage][name]

    every_step = range(len(case.steps))
    result: Gradients = {}
    for stage in range(schedule.num_stages):
        holders = schedule.ranks_of(stage)
        result[stage] = {
            name: of(holders[0], stage, name, every_step)
            if len(holders) == 1
            else _sum(_sum(of(rank, stage, name, [step]) for rank in holders) for step in every_step)
            for name, _ in case.make(stage).named_parameters()
        }
    return result


def microbatches_of(schedule: Schedule, rank: int, stage: int, kinds: Sequence[Kind]) -> list[int]:
    parts = (part for action in schedule.rows[rank] for part in action.parts)
    return [part.microbatch for part in parts if part.stage == stage and part.kind in kinds]


def _sum(tensors: Any) -> Tensor | None:
    total: Tensor | None = None
    for tensor in tensors:
        if tensor is not None:
            total = tensor if total is None else total + tensor
    return total


# --- comparing ----------------------------------------------------------------------------------------------


def gradients_by_rank(pipeline: Pipeline) -> dict[int, Gradients]:
    return {
        rank: {stage: gradients_of(module) for stage, module in modules.items()}
        for rank, modules in pipeline.stages.items()
    }


def assert_bitwise(found: Mapping[int, Gradients], expected: Gradients, of: str = "gradients") -> None:
    for rank, stages in found.items():
        for stage, gradients in stages.items():
            for name, gradient in gradients.items():
                wanted = expected[stage][name]
                where = f"{of}: rank {rank}, stage {stage}, {name}"
                assert (gradient is None) == (wanted is None), f"{where}: {gradient} instead of {wanted}"
                if gradient is not None and wanted is not None:
                    furthest = (gradient - wanted).abs().max() if gradient.numel() else 0
                    assert torch.equal(gradient, wanted), f"{where}: off by {furthest}"


def furthest_apart(found: Mapping[int, Gradients], expected: Gradients) -> float:
    return max(
        (float((gradient - expected[stage][name]).abs().max()))
        for stages in found.values()
        for stage, gradients in stages.items()
        for name, gradient in gradients.items()
        if gradient is not None and gradient.numel()
    )
