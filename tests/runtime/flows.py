"""What may flow between stages and what may stand in one: a case each, for any schedule of three stages or more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterflow import Schedule
from runtime.cases import FEATURES, Case, Step, block, ordinary_step, random_data

TOKENS = 11


class Around(nn.Module):
    """The ordinary stage, with a function of what comes in before it and one of what it computed behind it."""

    def __init__(
        self, stage: int, *, take: Callable[..., Tensor] = lambda x: x, give: Callable[[Tensor], Any] = lambda x: x
    ) -> None:
        super().__init__()
        self.inner, self.take, self.give = block(stage), take, give

    def forward(self, *values: Any) -> Any:
        return self.give(self.inner(self.take(*values)))


@dataclass(frozen=True)
class Flow:
    """The stages by their place, and the data of each step; the ordinary ones where nothing is said."""

    first: Callable[[int], nn.Module] = block
    middle: Callable[[int], nn.Module] = block
    last: Callable[[int], nn.Module] = block
    steps: Callable[[int], Sequence[Step]] = lambda count: [ordinary_step(count, seed) for seed in range(2)]
    loss: Callable[[Any, Any], Tensor] = F.mse_loss
    inexact: str = ""
    """Why the gradients are not bitwise those of one process, only within 1e-12."""

    def case(self, schedule: Schedule, weight_split: str = "linear") -> Case:
        def make(stage: int) -> nn.Module:
            ends = {0: self.first, schedule.num_stages - 1: self.last}
            return ends.get(stage, self.middle)(stage)

        return Case(schedule, self.steps(schedule.num_microbatches), make, self.loss, weight_split)


def passing(take: Callable[..., Tensor], give: Callable[[Tensor], Any]) -> Flow:
    """All stages give alike, and take alike what they are given."""
    return Flow(
        first=lambda stage: Around(stage, give=give),
        middle=lambda stage: Around(stage, take=take, give=give),
        last=lambda stage: Around(stage, take=take),
    )


def inside(make: Callable[[int], nn.Module]) -> Flow:
    """All stages are of this kind."""
    return Flow(first=make, middle=make, last=make)


# --- stages -------------------------------------------------------------------------------------------------


def frozen(stage: int) -> nn.Module:
    return block(stage).requires_grad_(False)


class Doubled(torch.autograd.Function):
    """A custom Function; its backward is not what autograd would have found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] * weight * 3, (grads[0] * x).sum((0, 1)) * 5


class WithFunction(nn.Module):
    def __init__(self, stage: int) -> None:
        super().__init__()
        self.inner = block(stage)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.inner(x), self.weight)


class SharedTwice(nn.Module):
    """One weight in two places, and between them another one."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.shared, self.other = (nn.Linear(FEATURES, FEATURES, bias=False).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.other(torch.tanh(self.shared(x)))))


class LowRank(nn.Module):
    """The weight of its linear is computed, as under LoRA."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(t) for t in random_data(stage, 2, FEATURES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.eye(FEATURES, dtype=x.dtype) + self.up @ self.down)


class BesideTheInput(nn.Module):
    """A parameter and a function of a weight leave as outputs, without passing where the input does."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.inner = block(stage)
        self.scale = nn.Parameter(torch.full((FEATURES,), 1.5, dtype=torch.float64))

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for other in others:
            x = x * other.mean()
        return self.inner(x), self.scale, (self.inner[0].weight ** 2).sum()


class Partly(nn.Module):
    """A branch that no loss sees, and one that is not taken."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.inner, self.unused = block(stage), nn.Linear(FEATURES, FEATURES).double()

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x.detach())
        return self.inner(x)


class Checkpointed(nn.Module):
    """Blocks that forget what they computed; counts how often each runs."""

    def __init__(self, stage: int, *, reentrant: bool, num_blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(10 * stage + index) for index in range(num_blocks))
        self.reentrant = reentrant
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.blocks:
            x = checkpoint(self._counted, inner, x, use_reentrant=self.reentrant)
        return x

    def _counted(self, inner: nn.Module, x: Tensor) -> Tensor:
        self.runs += 1
        return inner(x)


class Autocast(nn.Module):
    """Half the precision inside, and the same double outside so that losses compare."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.inner = block(stage).float()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x.float())


def attention(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    return nn.TransformerEncoderLayer(FEATURES, 2, 16, dropout=0.0, batch_first=True).double()


class Convolution(nn.Module):
    """No linear, and weights that do not lie in memory as they are counted."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.inner = nn.Conv2d(3, 3, 3, padding=1).double().to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x[None]))[0]


def vector_weight(stage: int) -> nn.Module:
    """F.linear also takes a weight without rows."""

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.weight = block(stage), nn.Parameter(random_data(stage, 1, FEATURES)[0])

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x * F.linear(x, self.weight)[..., None]

    return Vector()


def embedding(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    return nn.Sequential(nn.Embedding(TOKENS, FEATURES), *block(stage)).double()


# --- data ---------------------------------------------------------------------------------------------------


def token_steps(count: int) -> list[Step]:
    steps = [ordinary_step(count, seed) for seed in range(2)]
    generator = torch.Generator().manual_seed(3)
    return [Step([torch.randint(TOKENS, (3, 5), generator=generator) for _ in s.inputs], s.targets) for s in steps]


def steps_of_other_shapes(count: int) -> list[Step]:
    """Rows differ from micro-batch to micro-batch, none at all in one, and again from step to step."""

    def rows(step: int, m: int) -> int:
        return (m + 2 * (step // 2)) % 4

    return [
        Step(*([random_data(10 * step + m, 2, rows(step, m), 5, FEATURES)[i] for m in range(count)] for i in (0, 1)))
        for step in range(4)
    ]


def tuple_steps(count: int) -> list[Step]:
    steps = [ordinary_step(count, seed) for seed in range(2)]
    return [Step([{"x": x, "scale": 0.5 + m} for m, x in enumerate(s.inputs)], s.targets) for s in steps]


def total(output: Tensor, target: Tensor) -> Tensor:
    """A loss that an empty micro-batch has as well."""
    return ((output - target) ** 2).sum()


FLOWS: dict[str, Flow] = {
    "tuples with None, integers and booleans": passing(
        lambda x, nothing, order, keep: x[:, order] * keep + (1 if nothing is None else torch.nan),
        lambda x: (x, None, torch.arange(4, -1, -1), torch.tensor([True, False] * (FEATURES // 2))),
    ),
    "a tuple of one": passing(lambda x: x, lambda x: (x,)),
    "nested structures with numbers and strings": passing(
        lambda tree: tree["a"][0] * tree["a"][1]["two"] + tree["b"]["c"][0] + (tree["name"] == "n") + tree["b"]["flag"],
        lambda x: {"a": [x, {"two": 2}], "b": {"c": (x * 0.5, None, []), "flag": True}, "name": "n", "": 1.5},
    ),
    "inputs that are structures": Flow(
        first=lambda stage: Around(stage, take=lambda tree: tree["x"] * tree["scale"]), steps=tuple_steps
    ),
    "mixed precisions": passing(
        lambda x, y, z, i: x + y.double() + z.double() + i,
        lambda x: (x, x.float(), x.to(torch.bfloat16), x.detach().round().to(torch.int8)),
    ),
    "numbers of no dimension": passing(lambda x, y, i: x * y + i, lambda x: (x, x.mean(), torch.tensor(3))),
    "tensors that are not contiguous": replace(
        passing(
            lambda x, y, z: x.transpose(0, 1) + y + z,
            lambda x: (x.transpose(0, 1), torch.cat([x, x], -1)[..., ::2], x[:, :1].expand(-1, 5, -1)),
        ),
        inexact="a message has no strides, and kernels sum in another order without them",
    ),
    "tensors without elements": passing(
        lambda x, y, i: x + y.sum() + i.sum(), lambda x: (x, x[:0], torch.zeros(0, 2, dtype=torch.int64))
    ),
    "outputs that need no gradient": passing(lambda x, y: x + y, lambda x: (x, x.detach() * 2)),
    "an output that the next stage does not use": passing(lambda x, _: x, lambda x: (x, x * 2)),
    "the same tensor twice": passing(lambda x, y: x + 2 * y, lambda x: (x, x)),
    "views": passing(
        lambda x, y, z: x.view(3, 5, FEATURES) + y + z,
        lambda x: (x.view(-1), x[:, 1:2], x.unbind(1)[0][:, None]),
    ),
    "a stage that returns its input": Flow(middle=lambda stage: nn.Identity()),
    "a first stage that returns its input": Flow(first=lambda stage: nn.Identity()),
    "stages that return parameters": replace(
        inside(BesideTheInput),
        last=lambda stage: Around(stage, take=lambda x, scale, square: x * scale.mean() + square),
        inexact="a weight of which I adds one part and W another sums them one after the other",
    ),
    "shapes that differ and change": Flow(steps=steps_of_other_shapes, loss=total),
    "token ids": Flow(first=embedding, steps=token_steps),
    "a frozen first stage": Flow(first=frozen),
    "frozen stages in the middle": Flow(middle=frozen),
    "frozen but for the last": Flow(first=frozen, middle=frozen),
    "a custom Function": inside(WithFunction),
    "a weight shared within the stage": inside(SharedTwice),
    "a computed weight": inside(LowRank),
    "a weight without rows": inside(vector_weight),
    "unused parameters": inside(Partly),
    "autocast": Flow(Autocast, Autocast, Autocast, loss=lambda output, target: F.mse_loss(output.double(), target)),
    "attention": inside(attention),
    "convolutions": inside(Convolution),
    "checkpoints": inside(lambda stage: Checkpointed(stage, reentrant=False)),
    "reentrant checkpoints": Flow(
        middle=lambda stage: Checkpointed(stage, reentrant=True), last=lambda s: Checkpointed(s, reentrant=True)
    ),
}
