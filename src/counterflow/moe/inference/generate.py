"""Greedy generation: a prefill, then step by step one more token for all requests, on a GPU in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from counterflow.errors import ModelError
from counterflow.moe.cache import Decode, LatentCache
from counterflow.moe.inference.microbatches import Decoder
from counterflow.moe.inference.prefill import prefill
from counterflow.moe.model import mixture_blocks
from counterflow.schedule.chunk_plans import DECODE


@torch.no_grad()
def generate(
    model: nn.Sequential, prompts: Sequence[Sequence[int] | Tensor], new_tokens: int, overlap: bool = True
) -> Tensor:
    """The ``new_tokens`` likeliest tokens behind each prompt, one after the other: int64 [prompts, new_tokens].

    ``model`` is a whole decoder, a prompt a row of tokens. With ``overlap`` prompts and then requests go in two
    micro-batches that hide each other's rows, else in one; a single request is always one. Ranks that share experts
    call this together, each with prompts of its own; if one has a single request, all decode in one micro-batch. On
    a GPU, where nothing waits for the host (see ``Decoding.replay``), all steps but the first replay one CUDA graph.

    Raises:
        ModelError: the model is not a whole decoder, a prompt is no row of its tokens, fewer than one token was asked
            for, ranks were asked for different numbers of them, or another rank refuses what it was given.

    Example:
        >>> from counterflow.moe import PRESETS, generate, stage
        >>> model = stage(PRESETS["tiny"], 0, 1)
        >>> tokens = generate(model, [[1, 2, 3], [4, 5]], new_tokens=6)
        >>> tokens.shape, bool((tokens == generate(model, [[1, 2, 3], [4, 5]], 6, overlap=False)).all())
        (torch.Size([2, 6]), True)
    """
    decoder = Decoder.of(model)
    refusal, lengths = None, []
    try:
        if type(new_tokens) is not int or new_tokens < 1:
            raise ModelError(f"new_tokens is {new_tokens!r}; it has to be a whole number of at least 1")
        if len(prompts) == 0:
            raise ModelError("there are no prompts; give at least one")
        lengths = [len(decoder.row_of(prompt)) for prompt in prompts]
    except ModelError as error:
        refusal = error
    asked = decoder.all_say([0 if refusal else new_tokens, overlap and len(prompts) > 1], refusal)
    if {tokens for tokens, _ in asked} != {new_tokens}:
        raise ModelError(f"the ranks were asked for {[tokens for tokens, _ in asked]} new tokens; ask all for as many")
    cache = LatentCache(decoder.config, len(prompts), max(lengths) + new_tokens, decoder.dtype, decoder.device)
    first = prefill(model, prompts, cache, overlap).argmax(-1)
    positions = torch.tensor(lengths, device=decoder.device)
    decoding = Decoding(model, cache, first, positions, num_microbatches=2 if all(two for _, two in asked) else 1)
    made, step = [first.clone()], decoding.step
    for number in range(1, new_tokens):
        if number == 2:  # what is made at its first use, such as kernels, cannot be captured
            step = decoding.replay()
        step()
        made.append(decoding.tokens.clone())
    return torch.stack(made, dim=1)


class Decoding:
    """Requests under way: their last ``tokens`` and the ``positions`` at which these stand, both int64 [requests].

    Both stay where they are in memory, and so does all that a step is told, so that a step which has been captured can
    be replayed for every further token.
    """

    def __init__(
        self, model: nn.Sequential, cache: LatentCache, tokens: Tensor, positions: Tensor, num_microbatches: int
    ) -> None:
        self._decoder = Decoder.of(model)
        self._balanced = all(block.router.balanced for block in mixture_blocks([model]))
        self.tokens, self.positions = tokens, positions
        self._shares = tokens.tensor_split(num_microbatches)
        self._batches: list[Decode] = []
        first = 0
        for share in positions.tensor_split(num_microbatches):
            self._batches.append(Decode(cache, first, share))
            first += len(share)

    @torch.no_grad()
    def step(self) -> None:
        """Every request gets one more token: the likeliest one."""
        chunk = self._decoder.chunk
        pairs = zip(self._shares, self._batches, strict=True)
        logits = self._decoder.outputs(DECODE, [(chunk, share, batch) for share, batch in pairs])
        self.tokens.copy_(torch.cat([each.argmax(-1) for each in logits]))
        self.positions.add_(1)

    def replay(self) -> Callable[[], None]:
        """What does a step from now on, after the first one: a CUDA graph where a step can be captured, else ``step``.

        It can in bfloat16, whose experts are one kernel, if the host need not know how many rows go where: there is one
        rank, or routing is balanced.
        """
        host_waits = self._decoder.exchange.num_ranks > 1 and not self._balanced
        if self._decoder.device.type != "cuda" or self._decoder.dtype != torch.bfloat16 or host_waits:
            return self.step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay
