"""Decode in CUDA graphs: two micro-batches that hide each other's rows, beside one of all requests that hides none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deployments import LAYERS, Share
from timing import Stopwatch, in_order, medians

from counterflow.runtime.blocks import ready_now
from counterflow.runtime.chunk import run
from counterflow.runtime.exchange import Exchange, Rows
from counterflow.runtime.loopback import LoopbackExchange

RATIOS = (0.25, 0.5, 1.0, 2.0)
PIECE_BYTES = 1 << 20
ORDERS = ("decode", "prefill")
"""Which of the two published orders is the better one depends on how long the wire takes."""
BYTES_PER_S, FLOPS_PER_S = 4.8e12, 700e12
"""Of the roofline: an H200's memory, and its bf16 matrix products as measured."""


class Captured:
    """Some work in one CUDA graph; on a CPU it is done anew each time."""

    def __init__(self, device: torch.device, work: Callable[[], object]) -> None:
        self._device, self._work = device, work
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            work()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._kept = work()

    def replay(self) -> None:
        """All of it once more."""
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()

    def ms(self) -> float:
        """How long one replay takes."""
        watch = Stopwatch(self._device)
        watch.synchronize()
        return watch.of(self.replay)


def pair_graph(share: Share, exchange: Exchange, mode: str = "decode") -> Captured:
    """Both micro-batches by the published plan of decode, or by that of prefill."""
    return Captured(share.device, lambda: _run(share, exchange, share.pair(mode), lambda p: share.plan(p, mode)))


def decode_figures(share: Share, rounds: int) -> dict[str, Any]:
    """For each ratio of wire to compute: the pair, one micro-batch of all requests, and what a roofline lets expect."""
    everyone, batch = torch.cat(share.inputs), share.decoding(0, 2 * share.deployment.tokens)

    def single(exchange: Exchange) -> Captured:
        programs = (share.forward(everyone, batch, "(F)") for _ in iter(int, 1))
        return Captured(share.device, lambda: _run(share, exchange, (next(programs),), in_order))

    compute = medians({"pair": pair_graph(share, share.still).ms, "single": single(share.still).ms}, rounds)
    rows = []
    for ratio in RATIOS:
        bytes_ = _bytes_for(share, ratio * compute["single"], rounds)
        whole, halves = (_wire(share, bytes_ // parts) for parts in (1, 2))
        wire = medians({"ms": _wire_graph(share, whole).ms}, rounds)["ms"]
        orders = {f"pair_by_{mode}_ms": pair_graph(share, halves, mode).ms for mode in ORDERS}
        took: dict[str, Any] = medians({**orders, "single_ms": single(whole).ms}, rounds)
        took["order"] = min(ORDERS, key=lambda mode: took[f"pair_by_{mode}_ms"])
        took["pair_ms"] = took[f"pair_by_{took['order']}_ms"]
        limit = roofline_gain(share, wire / compute["single"])
        gain = took["single_ms"] / took["pair_ms"]
        found = {"wire_over_compute": wire / compute["single"], "wire_ms": wire, "combine_bytes": bytes_}
        rows.append(found | took | {"gain": gain, "roofline_gain": limit, "of_the_roofline": gain / limit})
    tokens = share.deployment.tokens
    roofs = {f"roofline_of_{n}_ms": LAYERS * roofline_s(share, n) * 1e3 for n in (tokens, 2 * tokens)}
    head = {"pair_compute_ms": compute["pair"], "single_compute_ms": compute["single"]} | roofs
    return head | {"pays_from": crossover(rows), "rows": rows}


def crossover(rows: list[dict[str, Any]]) -> float | None:
    """The least ratio of wire to compute from which on splitting gains, between the measured ones; None beyond them."""
    for one, other in zip(rows, rows[1:], strict=False):
        if one["gain"] < 1 <= other["gain"]:
            part = (1 - one["gain"]) / (other["gain"] - one["gain"])
            return one["wire_over_compute"] + part * (other["wire_over_compute"] - one["wire_over_compute"])
    return 0.0 if rows[0]["gain"] >= 1 else None


def _run(share: Share, exchange: Exchange, programs: Any, plan: Callable[[Any], Any]) -> Any:
    with share.over(exchange):
        run(plan(programs), *programs)
    return programs


def _wire(share: Share, combine_bytes: int) -> LoopbackExchange:
    """A dispatch in fp8 has half the bytes of a combine."""
    return LoopbackExchange(
        combine_bytes // 2, combine_bytes, num_ranks=share.deployment.ranks, piece_bytes=PIECE_BYTES
    )


def _wire_graph(share: Share, exchange: LoopbackExchange) -> Captured:
    """The transfers of one micro-batch of all requests, each waited for, and nothing else."""
    rows = 2 * share.deployment.tokens * share.config.top_k
    source, way = share.random(rows), Rows((rows,), (rows,))

    def send_all() -> None:
        for _ in range(LAYERS):
            for each in (way, way.back()):
                exchange.start(source, torch.empty_like(source), each, ready_now(source)).wait()

    return Captured(share.device, send_all)


def _bytes_for(share: Share, ms: float, rounds: int) -> int:
    """So many bytes of a combine that all transfers take about ``ms``: on the line through two sizes."""
    small = share.deployment.wire_bytes[1]
    sizes = (small, 8 * small)
    graphs = {str(size): _wire_graph(share, _wire(share, size)).ms for size in sizes}
    one, other = (medians(graphs, rounds)[str(size)] for size in sizes)
    slope = max((other - one) / (sizes[1] - sizes[0]), 1e-12)
    return min(max(small // 16, round(sizes[0] + (ms - one) / slope)), 64 * small)


def roofline_gain(share: Share, ratio: float) -> float:
    """How much shorter two halves can be than the whole, where all of the whole's transfers take ``ratio`` of it.

    The halves compute longer together, for they read the weights twice.
    """
    tokens = share.deployment.tokens
    whole = roofline_s(share, 2 * tokens)
    return (1 + ratio) / max(2 * roofline_s(share, tokens) / whole, ratio)


def roofline_s(share: Share, tokens: int) -> float:
    """One layer of decode: each product as long as its bytes or its operations take, whichever is longer."""
    c, length = share.config, share.deployment.length
    local = c.experts // share.deployment.ranks
    rows = tokens * c.top_k
    products = [  # rows, in, out of each weight, and how many of it
        (tokens, c.hidden, c.query_rank, 1),
        (tokens, c.query_rank, c.heads * (c.nope + c.rope), 1),
        (tokens, c.hidden, c.latent_width, 1),
        (tokens, c.nope, c.latent, c.heads),
        (tokens, c.latent, c.value, c.heads),
        (tokens, c.heads * c.value, c.hidden, 1),
        (tokens, c.hidden, c.experts, 1),
        (tokens, c.hidden, 2 * c.intermediate * c.shared_experts, 1),
        (tokens, c.intermediate * c.shared_experts, c.hidden, 1),
        (rows / local, c.hidden, 2 * c.intermediate, local),
        (rows / local, c.intermediate, c.hidden, local),
    ]
    seconds = sum(_product_s(*product) for product in products)
    # Each request's latents are read once; every head multiplies with them twice.
    cache_bytes = 2 * tokens * length * c.latent_width
    cache_flops = 2 * tokens * c.heads * length * (c.latent_width + c.latent)
    return seconds + max(cache_bytes / BYTES_PER_S, cache_flops / FLOPS_PER_S)


def _product_s(rows: float, inner: int, outer: int, count: int) -> float:
    bytes_ = 2 * count * (inner * outer + rows * (inner + outer))
    return max(bytes_ / BYTES_PER_S, 2 * count * rows * inner * outer / FLOPS_PER_S)
