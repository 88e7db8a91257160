"""Prompts into a cache: in two micro-batches that cost the same, so that each hides the other's rows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor, nn

from counterflow.errors import ModelError
from counterflow.moe.cache import LatentCache, Part, Prefill
from counterflow.moe.config import ModelConfig
from counterflow.moe.inference.microbatches import Decoder, Microbatch
from counterflow.schedule.chunk_plans import PREFILL

Parts = tuple[Part, ...]


@dataclass(frozen=True)
class PartCost:
    """What one layer computes for a part of a prompt, in floating-point operations.

    A matrix of ``a`` by ``b`` takes 2ab of them for a row. So a token costs, linearly,

    * hidden · (query_rank + latent + rope) + query_rank · heads · (nope + rope) for its query and latent,
    * heads · value · hidden for the output of attention, hidden · experts for the router,
    * 3 · hidden · intermediate for each of its top_k + shared_experts experts,

    each latent that the part sees, those of earlier parts too, latent · heads · (nope + value) to be opened, and each
    pair of a query and a latent that it sees heads · (nope + rope + value): all of it twice.

    Example:
        >>> from counterflow.moe import PRESETS, Part
        >>> from counterflow.moe.inference.prefill import PartCost
        >>> cost = PartCost.of(PRESETS["v3-layer"])
        >>> cost.per_token // 10**6, cost.per_latent // 10**6, cost.per_pair // 10**3
        (1137, 33, 81)
        >>> cost(Part(0, 0, 3)) == 3 * (cost.per_token + cost.per_latent) + 6 * cost.per_pair
        True
    """

    per_token: int
    per_latent: int
    per_pair: int

    @classmethod
    def of(cls, config: ModelConfig) -> PartCost:
        """That of a layer of ``config``."""
        c = config
        query = c.hidden * c.query_rank + c.query_rank * c.heads * (c.nope + c.rope)
        around = c.hidden * c.latent_width + c.heads * c.value * c.hidden + c.hidden * c.experts
        experts = 3 * c.hidden * c.intermediate * (c.top_k + c.shared_experts)
        opening = c.latent * c.heads * (c.nope + c.value)
        return cls(2 * (query + around + experts), 2 * opening, 2 * c.heads * (c.nope + c.rope + c.value))

    def __call__(self, part: Part) -> int:
        """The operations for ``part``."""
        if part.count == 0:
            return 0
        end = part.start + part.count
        pairs = (end * (end + 1) - part.start * (part.start + 1)) // 2
        return self.per_token * part.count + self.per_latent * end + self.per_pair * pairs


def split_prompts(lengths: Sequence[int], config: ModelConfig) -> tuple[Parts, Parts]:
    """Prompts of ``lengths`` tokens in two micro-batches whose costs differ by a token's at most, see ``PartCost``.

    At most one prompt is cut in two; its first part is in the first micro-batch, which stores its latents in each layer
    before the second one looks at them. The dearer micro-batch never costs more than if tokens were counted and halved.
    With one token in all the second micro-batch is empty.

    Raises:
        ModelError: there is no prompt, or one without a token.

    Example:
        >>> from counterflow.moe import PRESETS, split_prompts
        >>> first, second = split_prompts([7000, 1000], PRESETS["v3-layer"])
        >>> first
        (Part(request=0, start=0, count=3469), Part(request=1, start=0, count=1000))
        >>> second
        (Part(request=0, start=3469, count=3531),)
    """
    if not lengths or min(lengths) < 1:
        raise ModelError(f"prompts have {list(lengths)} tokens; give at least one prompt, of at least one token each")
    cost = PartCost.of(config)
    prompts = [Part(request, 0, length) for request, length in enumerate(lengths)]
    cuts = (cut for halves in _shared_out(prompts, cost) for cut in _cuts(*halves, cost))
    best = min(cuts, key=lambda cut: (cut.worst, cut.count))
    return best.parts()


@dataclass(frozen=True)
class _Cut:
    """``count`` tokens of ``prompt``, one of the prompts in ``heavy``, are moved to ``light``."""

    worst: int
    light: list[Part]
    heavy: list[Part]
    prompt: Part
    count: int

    def parts(self) -> tuple[Parts, Parts]:
        """By request; the heavy one comes second, for it has the end of the prompt."""
        moved = Part(self.prompt.request, 0, self.count)
        left = Part(self.prompt.request, self.count, self.prompt.count - self.count)
        first = [*self.light, moved] if self.count else self.light
        second = [left if part is self.prompt else part for part in self.heavy]
        one, other = (tuple(sorted(half, key=lambda part: part.request)) for half in (first, second))
        return (one, other) if one else (other, one)


def _shared_out(prompts: list[Part], cost: PartCost) -> Iterator[tuple[list[Part], list[Part]]]:
    """Whole prompts in two halves: the dearest first, each to the cheaper half; and in order, on both sides of the
    prompt in which a half of all costs ends. Cuts near those are no worse than any other cut in that order."""
    halves: tuple[list[Part], list[Part]] = ([], [])
    sums = [0, 0]
    for prompt in sorted(prompts, key=cost, reverse=True):
        cheaper = int(sums[1] < sums[0])
        halves[cheaper].append(prompt)
        sums[cheaper] += cost(prompt)
    yield halves
    ends = list(accumulate(map(cost, prompts)))
    place = bisect_right(ends, ends[-1], key=lambda end: 2 * end)
    for end in (place, place + 1):
        yield prompts[:end], prompts[end:]


def _cuts(one: list[Part], other: list[Part], cost: PartCost) -> Iterator[_Cut]:
    """The best cuts of each prompt in the dearer half, on both sides of where the costs would be equal."""
    weighed = [(sum(map(cost, half)), half) for half in (one, other)]
    (light_sum, light), (heavy_sum, heavy) = sorted(weighed, key=itemgetter(0))
    for prompt in heavy:
        sums = _sums_by_cut(light_sum, heavy_sum - cost(prompt), prompt, cost)
        equal = bisect_left(range(prompt.count), True, key=partial(_outweighs, sums))
        for count in {max(equal - 1, 0), min(equal, prompt.count - 1)}:
            yield _Cut(max(sums(count)), light, heavy, prompt, count)


def _outweighs(sums: Callable[[int], tuple[int, int]], count: int) -> bool:
    light, heavy = sums(count)
    return light >= heavy


def _sums_by_cut(light: int, rest: int, prompt: Part, cost: PartCost) -> Callable[[int], tuple[int, int]]:
    """What both halves cost when so many tokens of ``prompt`` are moved."""

    def sums(count: int) -> tuple[int, int]:
        moved, left = Part(prompt.request, 0, count), Part(prompt.request, count, prompt.count - count)
        return light + cost(moved), rest + cost(left)

    return sums


@torch.no_grad()
def prefill(
    model: nn.Sequential, prompts: Sequence[Sequence[int] | Tensor], cache: LatentCache, overlap: bool = True
) -> Tensor:
    """The logits [prompts, vocabulary] behind each prompt, whose latents are in the cache then.

    ``model`` is a whole decoder, a prompt a row of tokens; prompt i becomes request i of ``cache``. With ``overlap``
    they go in the two micro-batches of ``split_prompts`` by the PREFILL plan, else in one. Ranks that share experts
    call this together, each with prompts of its own; if one of them cannot make two micro-batches, all make one, and
    if one refuses its prompts, all raise.

    Raises:
        ModelError: the model is not a whole decoder, a prompt is no row of its tokens, or the cache is too small.

    Example:
        >>> import torch
        >>> from counterflow.moe import PRESETS, LatentCache, prefill, stage
        >>> model = stage(PRESETS["tiny"], 0, 1)
        >>> cache = LatentCache(PRESETS["tiny"], requests=2, room=4, dtype=torch.float32)
        >>> prefill(model, [[1, 2, 3, 4], [5, 6]], cache).shape
        torch.Size([2, 256])
    """
    decoder = Decoder.of(model)
    rows: list[Tensor] = []
    whole: Parts = ()
    halves: tuple[Parts, ...] = ((), ())
    refusal = None
    try:
        rows = [decoder.row_of(prompt) for prompt in prompts]
        whole = tuple(Part(request, 0, len(row)) for request, row in enumerate(rows))
        Prefill(cache, whole)  # refuses what does not fit
        halves = split_prompts([part.count for part in whole], decoder.config)
    except ModelError as error:
        refusal = error
    said = decoder.all_say([overlap and bool(halves[1])], refusal)
    if not all(two for (two,) in said):
        halves = (whole,)
    logits = torch.cat(decoder.outputs(PREFILL, [_microbatch(decoder, rows, parts, cache) for parts in halves]))
    order = [part.request for parts in halves for part in parts if _ends(part, rows)]
    by_request = torch.empty_like(logits)
    by_request[order] = logits
    return by_request


def _microbatch(decoder: Decoder, rows: list[Tensor], parts: Parts, cache: LatentCache) -> Microbatch:
    tokens = torch.cat([rows[part.request][part.start : part.start + part.count] for part in parts])
    ends = accumulate(part.count for part in parts)
    last = [end - 1 for end, part in zip(ends, parts, strict=True) if _ends(part, rows)]
    numbers = torch.tensor(last, dtype=torch.int64, device=decoder.device)
    behind = (_Only(numbers), *decoder.chunk.behind)
    return replace(decoder.chunk, behind=behind), tokens.to(decoder.device), Prefill(cache, parts)


def _ends(part: Part, rows: list[Tensor]) -> bool:
    """Whether it has the last token of its prompt."""
    return part.start + part.count == len(rows[part.request])


class _Only(nn.Module):
    """Lets some rows pass, so that the head works for those alone."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self._numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return x[self._numbers]
