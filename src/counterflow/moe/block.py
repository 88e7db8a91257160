"""One layer of the decoder, in the parts between which its rows travel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from counterflow.errors import ModelError
from counterflow.experts import Placement
from counterflow.moe.attention import LatentAttention
from counterflow.moe.cache import Decode, Prefill
from counterflow.moe.config import ModelConfig
from counterflow.moe.dispatch import Dispatch, arrived, take
from counterflow.moe.draw import draw
from counterflow.moe.experts import RoutedExperts, SharedExpert
from counterflow.moe.kernels import kernels_run_in_bfloat16
from counterflow.moe.norm import Norm
from counterflow.moe.router import Router
from counterflow.runtime import Context, Exchange, OverlapBlock

Carry = tuple[Tensor, ...]


class MixtureBlock(OverlapBlock):
    """Latent attention, then routed and shared experts, each on a normed residual.

    In training ``x`` is [sequences, time, hidden] and ``ctx.batch`` None; else ``x`` is [tokens, hidden], and
    ``ctx.batch`` a ``Prefill`` or ``Decode``. The rows that travel are hidden vectors, one for each choice of an
    expert, sorted by slot. ``placement`` says which expert is in which slot of which rank of ``exchange``; without one
    the experts are divided evenly. The block is layer ``layer`` of the placement and of a cache; its weights follow
    from ``seed`` and ``layer``.

    With one rank nothing makes the host wait for a GPU in bfloat16, so the block can be captured in a CUDA graph.

    Raises:
        ModelError: the placement is for other experts or ranks.
        PlacementError: the experts do not divide over the ranks.

    Example:
        >>> import torch
        >>> from counterflow.moe import PRESETS, MixtureBlock
        >>> block = MixtureBlock(PRESETS["tiny"], layer=0)
        >>> block(torch.randn(2, 5, 64)).shape, int(block.router.counts.sum())
        (torch.Size([2, 5, 64]), 40)
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        exchange: Exchange | None = None,
        placement: Placement | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(exchange)
        self.config, self.layer = config, layer
        placement = evenly(config, self.exchange.num_ranks) if placement is None else placement
        if placement.num_experts != config.experts or not 0 <= layer < placement.num_layers:
            raise ModelError(
                f"the placement is for {placement.num_layers} layers of {placement.num_experts} experts, and this is "
                f"layer {layer} with {config.experts}; make one for this model"
            )
        self.attention_norm = Norm(config.hidden, config.norm_eps)
        self.attention = LatentAttention(config)
        self.experts_norm = Norm(config.hidden, config.norm_eps)
        self.router = Router(config)
        self.dispatch = Dispatch(placement, layer, self.exchange)
        self.shared_expert = SharedExpert(config)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                draw(weight, seed, layer, name)
        held = placement.physical_to_logical[layer].reshape(self.exchange.num_ranks, -1)[self.exchange.rank]
        self.routed_experts = RoutedExperts(config, held.tolist(), (seed, layer))

    def project(self, x: Tensor, ctx: Context) -> Carry:
        """Norm, queries and latents; the latents are stored if there is a cache."""
        batch = ctx.batch
        if batch is None and x.dim() != 3:
            raise ModelError(
                f"x is {list(x.shape)}; in training give [sequences, time, hidden]: tokens in two dimensions"
            )
        positions = torch.arange(x.shape[1], device=x.device) if batch is None else batch.positions
        if batch is not None and x.shape[:-1] != positions.shape:
            raise ModelError(f"the batch has {len(positions)} tokens and x is {list(x.shape)}; give one row for each")
        normed = self.attention_norm(x)
        if isinstance(batch, Decode):
            return x, self.attention.project_folded(normed, positions, batch.seen(self.layer))
        query, latent = self.attention.project(normed, positions)
        if batch is None:
            return x, query, latent
        batch.store(self.layer, latent)
        return x, query

    def attend(self, projected: Carry, ctx: Context) -> tuple[Carry, Tensor]:
        """Attention, the router, and the rows in the order in which they are sent."""
        x, query, *latent = projected
        x, normed = self.experts_norm.of_sum(x, self._attended(query, latent, ctx))
        tokens = normed.flatten(0, -2)
        weights, chosen = self.router(tokens)
        self.dispatch.sort(chosen, self.router.balanced, ctx)
        return (x, normed, weights), take(tokens, ctx.notes.order, ctx.notes.inverse, self.config.top_k)

    def shared(self, carry: Carry, ctx: Context) -> Carry:
        """The shared expert."""
        x, normed, weights = carry
        return x + self.shared_expert(normed), weights

    def experts(self, received: Tensor, ctx: Context) -> Tensor:
        """The rows that came, sorted by slot, through the experts there, and back into their order."""
        counts = ctx.notes.counts
        if len(counts) == 1:
            ends = counts[0].cumsum(0, dtype=torch.int32)
            results: Tensor = self.routed_experts(received, ends)
            return results
        order, inverse, ends = arrived(counts, len(received))
        return take(self.routed_experts(take(received, order, inverse), ends), inverse, order)

    def after(self, carry: Carry, returned: Tensor, ctx: Context) -> Tensor:
        """The results of each token's experts, weighed and added."""
        x, weights = carry
        if kernels_run_in_bfloat16(returned):
            from counterflow.moe.kernels.rows_kernel import weigh_by_kernel

            return weigh_by_kernel(x, weights, returned, ctx.notes.inverse)
        results = torch.unflatten(take(returned, ctx.notes.inverse, ctx.notes.order), 0, weights.shape)
        return x + torch.bmm(weights.unsqueeze(1), results).view_as(x)

    def _attended(self, query: Tensor, latent: list[Tensor], ctx: Context) -> Tensor:
        match ctx.batch:
            case None:
                return self.attention.attend(query, *latent)
            case Decode() as batch:
                return self.attention.attend_folded(query, batch.seen(self.layer), batch.positions)
            case Prefill() as batch:
                attend = self.attention.attend
                each = [attend(rows[None], batch.seen(self.layer, part)[None])[0] for part, rows in batch.split(query)]
                return torch.cat(each)
        raise ModelError(f"the batch is a {type(ctx.batch).__name__}; give a Prefill, a Decode, or None in training")


def evenly(config: ModelConfig, num_ranks: int) -> Placement:
    """One slot for each expert, the first experts on rank 0."""
    slots = np.tile(np.arange(config.experts), (config.layers, 1))
    return Placement(slots, config.experts, num_ranks)
