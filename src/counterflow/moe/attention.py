"""Multi-head latent attention: keys and values of all heads come out of one small latent, and that is what is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterflow.moe.causal import causal_attention
from counterflow.moe.config import ModelConfig
from counterflow.moe.decode_attention import mixed_latents
from counterflow.moe.kernels import can_keep
from counterflow.moe.norm import Norm
from counterflow.moe.rotary import kept_rates, turned_behind


class LatentAttention(nn.Module):
    """Attention with a latent in the place of keys and values, and a rotary part beside it.

    ``project`` makes the queries and latents of some tokens. ``attend`` opens the latents into the keys and values of
    every head. ``attend_folded`` gives the same without opening them: the weights that would, are folded into the
    queries (``fold``) and into what comes out, which is less work where one query meets many latents.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        query = config.heads * (config.nope + config.rope)
        self.query_down = nn.Linear(config.hidden, config.query_rank, bias=False)
        self.query_norm = Norm(config.query_rank, config.norm_eps)
        self.query_up = nn.Linear(config.query_rank, query, bias=False)
        self.latent_down = nn.Linear(config.hidden, config.latent_width, bias=False)
        self.latent_norm = Norm(config.latent, config.norm_eps)
        self.latent_up = nn.Linear(config.latent, config.heads * (config.nope + config.value), bias=False)
        self.out = nn.Linear(config.heads * config.value, config.hidden, bias=False)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [..., heads, nope + rope] and latents [..., latent + rope] of ``x`` [..., hidden]."""
        config = self.config
        query = self._queries(x)
        latent, key = self.latent_down(x).split([config.latent, config.rope], dim=-1)
        key = turned_behind(key.unsqueeze(-2), positions, config.rope, config.rope_base).squeeze(-2)
        query = turned_behind(query, positions, config.rope, config.rope_base)
        return query, torch.cat([self.latent_norm(latent), key], dim=-1)

    def attend(self, query: Tensor, latent: Tensor) -> Tensor:
        """Of queries [batch, n, heads, nope + rope] over the m >= n latents [batch, m, latent + rope] that end with
        their own: [batch, n, hidden]."""
        config = self.config
        latent, turned = torch.split(latent, [config.latent, config.rope], dim=-1)
        opened = self.latent_up(latent).unflatten(-1, (config.heads, -1))
        plain, value = torch.split(opened, [config.nope, config.value], dim=-1)
        key = torch.cat([plain, turned.unsqueeze(-2).expand(*plain.shape[:-1], config.rope)], dim=-1)
        mixed = causal_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def fold(self, query: Tensor) -> Tensor:
        """Queries [n, heads, nope + rope] as they meet latents: [n, heads, latent + rope]."""
        plain, turned = torch.split(query, [self.config.nope, self.config.rope], dim=-1)
        weight = self._opening()[:, : self.config.nope]
        return torch.cat([by_head(plain, weight), turned], dim=-1)

    def project_folded(self, x: Tensor, positions: Tensor, latents: Tensor) -> Tensor:
        """Folded queries of ``x`` [n, hidden]; its latents are put at ``positions`` [n] of ``latents`` [n, room, any].

        The same as ``project`` and ``fold``; in bfloat16 on a GPU, without gradient, by fewer kernels.
        """
        config = self.config
        if not can_keep(x, config):
            query, latent = self.project(x, positions)
            latents[torch.arange(len(x), device=x.device), positions] = latent
            return self.fold(query)
        from counterflow.moe.kernels.rotary_kernel import turn_by_kernel
        from counterflow.moe.kernels.rows_kernel import keep_by_kernel

        rates, norm = kept_rates(config.rope, config.rope_base, x.device), self.latent_norm
        keep_by_kernel(self.latent_down(x), norm.weight, norm.eps, positions, rates, latents)
        query = self._queries(x)
        folded = query.new_empty(*query.shape[:2], config.latent_width)
        by_head(query[..., : config.nope], self._opening()[:, : config.nope], folded[..., : config.latent])
        turn_by_kernel(query[..., config.nope :], positions, rates, 1.0, folded[..., config.latent :])
        return folded

    def attend_folded(self, folded: Tensor, latents: Tensor, positions: Tensor) -> Tensor:
        """Of one folded query each [n, heads, latent + rope] over those of its ``latents`` [n, room, latent + rope]
        that stand at its position [n] or before it: [n, hidden]."""
        config = self.config
        mixed = mixed_latents(folded, latents, positions, config.latent, (config.nope + config.rope) ** -0.5)
        value = by_head(mixed, self._opening()[:, config.nope :].mT)
        out: Tensor = self.out(value.flatten(1))
        return out

    def _queries(self, x: Tensor) -> Tensor:
        """Before they are turned."""
        queries: Tensor = self.query_up(self.query_norm(self.query_down(x))).unflatten(-1, (self.config.heads, -1))
        return queries

    def _opening(self) -> Tensor:
        """The weight that opens a latent, by head: [heads, nope + value, latent]."""
        return self.latent_up.weight.view(self.config.heads, -1, self.config.latent)


def by_head(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``x`` [n, heads, in] times the ``weight`` [heads, in, out] of each head: [n, heads, out], in ``out`` if given."""
    if torch.is_grad_enabled():
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
    # Written where it is read next, it need not be copied there.
    out = x.new_empty(*x.shape[:2], weight.shape[2]) if out is None else out
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out
