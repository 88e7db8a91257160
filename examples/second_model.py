"""Another model under the same contract: dense attention and a softmax router, trained under DualPipe in one process.

    python examples/second_model.py

The contract is ``OverlapBlock``: three parts between which rows are away. A stage is a sequence of such blocks and any
other modules; the pipeline sees the blocks and hides their rows under the other micro-batch of an F&B.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow import dualpipe
from counterflow.runtime import Context, OverlapBlock, Pipeline

VOCABULARY, HIDDEN, HEADS, EXPERTS, TOP_K = 32, 32, 4, 8, 2
RANKS, MICROBATCHES, STEPS = 2, 4, 15


class SoftmaxBlock(OverlapBlock):
    """Multi-head attention, then a softmax router that sends each token to its ``TOP_K`` best experts."""

    def __init__(self) -> None:
        super().__init__()  # all experts are here; give a ProcessGroupExchange for those of several processes
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.ModuleList(nn.Linear(HIDDEN, 2 * HIDDEN) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(2 * HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def before(self, x: Tensor, ctx: Context) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Attention and router; a row for each choice of an expert is sent, those for expert 0 first."""
        x = x + self.attended(self.norms[0](x))
        normed = self.norms[1](x).flatten(0, 1)
        weights, chosen = self.router(normed).softmax(-1).topk(TOP_K)
        ctx.notes.order = chosen.flatten().argsort(stable=True)
        ctx.notes.counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
        return (x, weights), normed[ctx.notes.order // TOP_K]

    def experts(self, received: Tensor, ctx: Context) -> Tensor:
        """Each expert's rows through it."""
        parts = received.split(ctx.notes.counts)
        return torch.cat([self.down[e](F.gelu(self.up[e](rows))) for e, rows in enumerate(parts)])

    def after(self, carry: tuple[Tensor, Tensor], returned: Tensor, ctx: Context) -> Tensor:
        """The results back in the order of the tokens, weighed and added."""
        x, weights = carry
        results = returned[ctx.notes.order.argsort()].unflatten(0, weights.shape)
        return x + (weights.unsqueeze(-1) * results).sum(1).view_as(x)

    def attended(self, x: Tensor) -> Tensor:
        """Dense causal attention of ``x`` [sequences, time, hidden]."""
        heads = self.query_key_value(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


def stage(number: int) -> nn.Sequential:
    """One of the two halves of the model; equal for equal numbers, as the two copies under DualPipe are."""
    torch.manual_seed(number)
    blocks = [SoftmaxBlock(), SoftmaxBlock()]
    whole = [nn.Embedding(VOCABULARY, HIDDEN), *blocks] if number == 0 else [*blocks, nn.Linear(HIDDEN, VOCABULARY)]
    return nn.Sequential(*whole).double()


def data(step: int) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens, and the one that is to come behind each: five times as much and three."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (MICROBATCHES, 8, 12), generator=generator)
    return list(tokens), list((5 * tokens + 3) % VOCABULARY)


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over all micro-batches, whose gradients are summed."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()) / MICROBATCHES


def plain_gradients(stages: list[nn.Sequential], inputs: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """Those of plain autograd, one micro-batch after the other."""
    stages = copy.deepcopy(stages)
    for x, target in zip(inputs, targets, strict=True):
        loss_fn(stages[1](stages[0](x)), target).backward()
    return [parameter.grad for part in stages for parameter in part.parameters()]


def main() -> None:
    """Check the gradients of the first step, then train."""
    schedule = dualpipe(RANKS, MICROBATCHES)
    ranks = [{number: stage(number) for number in schedule.stages_of(rank)} for rank in range(RANKS)]
    pipeline = Pipeline.in_process(schedule, ranks, loss_fn)
    optimizers = [torch.optim.AdamW([p for part in held.values() for p in part.parameters()], 1e-2) for held in ranks]

    losses = []
    for step in range(STEPS):
        inputs, targets = data(step)
        result = pipeline.step(inputs, targets)
        losses.append(sum(loss.item() for loss in result.losses.values()))
        if step == 0:
            ours = [p.grad for number in range(2) for p in ranks[0][number].parameters()]
            theirs = plain_gradients([ranks[0][number] for number in range(2)], inputs, targets)
            equal = all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(ours, theirs, strict=True))
            print(f"gradients equal those of plain autograd: {equal}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    print(f"loss before {losses[0]:.3f}, after {STEPS} steps {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
