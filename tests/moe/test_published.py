"""The whole decoder against the equations of DeepSeek-V3, written down once more, token by token and head by head.

Numbers in brackets are those of arXiv 2412.19437, section 2.1; the norms of both latents are those of its section 4.2.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from counterflow.moe import MixtureBlock, ModelConfig, mixture_blocks
from moe.models import TINY, whole

CONFIGS = {
    "groups": replace(TINY, layers=2),
    "one group, shared experts": replace(TINY, layers=2, groups=1, top_groups=1, top_k=3, shared_experts=2, value=8),
    "a group for each expert": replace(TINY, layers=1, experts=8, groups=8, top_groups=5, top_k=5, heads=3, rope=6),
}


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """Each pair of neighbours as a point, turned about the origin."""
    out = []
    for i in range(0, len(x), 2):
        angle = position * base ** (-i / len(x))
        sine, cosine = math.sin(angle), math.cos(angle)
        out += [x[i] * cosine - x[i + 1] * sine, x[i] * sine + x[i + 1] * cosine]
    return torch.stack(out)


def feed_forward(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate / (1 + (-gate).exp()) * up)


def attention(block: MixtureBlock, c: ModelConfig, rows: list[Tensor]) -> list[Tensor]:
    of = block.attention
    opening = of.latent_up.weight.view(c.heads, c.nope + c.value, c.latent)
    latents, keys, queries = [], [], []
    for t, h in enumerate(rows):
        latent, key = (of.latent_down.weight @ h).split([c.latent, c.rope])
        latents.append(normed(latent, of.latent_norm.weight, c.norm_eps))  # (1)
        keys.append(turned(key, t, c.rope_base))  # (3)
        small = normed(of.query_down.weight @ h, of.query_norm.weight, c.norm_eps)  # (6)
        queries.append((of.query_up.weight @ small).view(c.heads, -1))  # (7), (8)
    results = []
    for t in range(len(rows)):
        heads = []
        for i in range(c.heads):
            plain, turning = queries[t][i].split([c.nope, c.rope])
            query = torch.cat([plain, turned(turning, t, c.rope_base)])  # (9)
            seen = [torch.cat([opening[i, : c.nope] @ latents[j], keys[j]]) for j in range(t + 1)]  # (2), (4)
            shares = torch.stack([query @ key for key in seen]).div(math.sqrt(c.nope + c.rope)).softmax(0)
            values = torch.stack([opening[i, c.nope :] @ latents[j] for j in range(t + 1)])  # (5)
            heads.append(shares @ values)  # (10)
        results.append(of.out.weight @ torch.cat(heads))  # (11)
    return results


def experts(block: MixtureBlock, c: ModelConfig, u: Tensor) -> Tensor:
    scores = 1 / (1 + (-(block.router.weight @ u)).exp())  # (15)
    biased = (scores + block.router.bias).tolist()
    size = c.experts // c.groups
    best_two = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.groups)]
    open_groups = sorted(range(c.groups), key=best_two.__getitem__)[-c.top_groups :]
    open_experts = [e for e in range(c.experts) if e // size in open_groups]
    chosen = sorted(open_experts, key=biased.__getitem__)[-c.top_k :]  # (16)
    gates = scores[chosen] / scores[chosen].sum() * c.routed_scaling  # (13)
    out = feed_forward(block.shared_expert.gate_up.weight, block.shared_expert.down.weight, u)
    for gate, e in zip(gates, chosen, strict=True):
        out = out + gate * feed_forward(block.routed_experts.gate_up[e], block.routed_experts.down[e], u)
    return out  # (12), without the residual


def logits(model: nn.Sequential, c: ModelConfig, tokens: Tensor) -> Tensor:
    rows = list(model[0].weight[tokens])
    for block in mixture_blocks([model]):
        mixed = attention(block, c, [normed(x, block.attention_norm.weight, c.norm_eps) for x in rows])
        rows = [x + more for x, more in zip(rows, mixed, strict=True)]
        rows = [x + experts(block, c, normed(x, block.experts_norm.weight, c.norm_eps)) for x in rows]
    return torch.stack([model[-1].weight @ normed(x, model[-2].weight, c.norm_eps) for x in rows])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_gradients_are_those_of_the_published_equations(config: ModelConfig) -> None:
    model, generator = whole(config), torch.Generator().manual_seed(3)
    for vector in (*model.parameters(), *model.buffers()):
        if vector.dim() == 1 and vector.is_floating_point():  # where ones and zeros would hide a mistake
            vector.data += 0.3 * torch.rand(vector.shape, generator=generator, dtype=vector.dtype)
    tokens = torch.randint(config.vocabulary, (7,), generator=generator)
    found, wanted = model(tokens[None])[0], logits(model, config, tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(each.sin().sum(), list(model.parameters())) for each in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
