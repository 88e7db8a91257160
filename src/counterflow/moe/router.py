"""Which experts a token goes to: sigmoid scores, the best groups, the best experts there, a bias that evens out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow.moe.config import ModelConfig
from counterflow.moe.kernels import choosing_pays


class Router(nn.Module):
    """Chooses ``top_k`` experts for each token by score plus ``bias``, and weighs them by their scores alone.

    A group is as good as its two best experts together; experts outside the ``top_groups`` best groups are closed to
    the token. Scores are float32 or finer. With ``balanced`` token t goes to the experts from t·k on, in turn, so
    that all are equally busy, as one profiles; everything else, the choosing too, is still computed.

    ``counts``, int64 [experts], grows by the tokens that are sent to each expert; nobody waits for it.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; the bias is from arXiv 2408.15664.
    """

    bias: Tensor
    counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.balanced = False
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("counts", torch.zeros(config.experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of the experts of ``x`` [tokens, hidden], both [tokens, k]."""
        logits = F.linear(x, self.weight)
        if choosing_pays(logits, self.config):
            from counterflow.moe.kernels.routing_kernel import choose_by_kernel

            return choose_by_kernel(logits, self.bias, self.counts, self.config, x.dtype, balanced=self.balanced)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        chosen = self.choose(scores.detach() + self.bias)
        if self.balanced:
            chosen = in_turn(len(x), self.config.top_k, self.config.experts, x.device)
        self.counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        weights = scores.gather(1, chosen)
        return (weights / weights.sum(1, keepdim=True) * self.config.routed_scaling).to(x.dtype), chosen

    def choose(self, scores: Tensor) -> Tensor:
        """The experts [tokens, k] that ``scores`` [tokens, experts] open."""
        groups = torch.unflatten(scores, 1, (self.config.groups, -1))
        best_two = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2)
        best = best_two.topk(self.config.top_groups, dim=1).indices
        closed = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, best, False)
        opened = groups.masked_fill(closed[..., None], float("-inf")).flatten(1)
        return opened.topk(self.config.top_k, dim=1).indices

    @torch.no_grad()
    def even_out(self, counts: Tensor, speed: float = 0.001) -> None:
        """Lower the bias of the experts with more than the mean of ``counts`` [experts], raise that of the others.

        ``counts`` are those of a whole step: of all micro-batches, and of all ranks that hold this router.
        """
        loads = counts.to(self.bias.dtype)
        self.bias += speed * torch.sign(loads.mean() - loads)


def in_turn(tokens: int, top_k: int, experts: int, device: torch.device | None = None) -> Tensor:
    """Equally many tokens for every expert, as far as they divide: int64 [tokens, k]."""
    return (torch.arange(tokens * top_k, device=device) % experts).view(tokens, top_k)
