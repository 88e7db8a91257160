"""How long a plan takes: sequential, compute alone, wire alone, overlapped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from deployments import LAYERS, Share

from counterflow.runtime.blocks import ready_now
from counterflow.runtime.chunk import run
from counterflow.runtime.exchange import Exchange, Rows
from counterflow.runtime.loopback import LoopbackExchange
from counterflow.schedule.chunk_plans import ChunkPlan, in_a_row, one_after_the_other

WARM_UP = 2
REST_S = 0.1
"""Before each run, so that all begin on a GPU as cool as the other."""
Programs = tuple[Any, ...]


class Stopwatch:
    """Milliseconds of the GPU between two moments, or of the host where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Now, on the current stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, start: Any, end: Any) -> float:
        """Waits for ``end``."""
        if not self._cuda:
            return (end - start) * 1e3
        end.synchronize()
        return float(start.elapsed_time(end))

    def synchronize(self) -> None:
        """Everything launched is done."""
        if self._cuda:
            torch.cuda.synchronize()

    def of(self, work: Callable[[], object]) -> float:
        """How long ``work`` takes on the current stream."""
        start = self.mark()
        work()
        return self.between_ms(start, self.mark())


def in_order(programs: Programs) -> ChunkPlan:
    """The plan that hides nothing."""
    return one_after_the_other(*(program.steps for program in programs))


def once(
    share: Share,
    exchange: Exchange,
    programs: Callable[[], Programs],
    plan: Callable[[Programs], ChunkPlan],
    *,
    serial: bool = False,
    beside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """One run, without what prepares it."""
    share.forget()
    made = programs()
    order = plan(made)
    watch = Stopwatch(share.device)
    watch.synchronize()
    with share.over(exchange), beside():
        return watch.of(lambda: run(order, *made, serial=serial))


def wire_alone(share: Share, exchange: Exchange) -> float:
    """The transfers of both micro-batches behind each other, and nothing else."""
    rows = share.deployment.tokens * share.config.top_k
    source = share.random(rows)
    target = torch.empty_like(source)
    there = Rows((rows,), (rows,))

    def exchange_all() -> None:
        for _ in range(2 * LAYERS):
            for way in (there, there.back()):
                arrival = exchange.start(source, target, way, ready_now(source))
        arrival.wait()

    watch = Stopwatch(share.device)
    watch.synchronize()
    return watch.of(exchange_all)


STREAM = 3


def in_a_stream(share: Share, exchange: Exchange) -> float:
    """Several pairs, each of which starts while the last transfers of the one before are under way."""

    def pairs() -> Programs:
        return tuple(program for _ in range(STREAM) for program in share.pair())

    def plan(programs: Programs) -> ChunkPlan:
        return in_a_row(*(share.plan(programs[2 * n : 2 * n + 2]) for n in range(STREAM)))

    return once(share, exchange, pairs, plan)


def figures(share: Share, exchange: LoopbackExchange, rounds: int) -> dict[str, float]:
    """Medians over ``rounds``, in each of which everything runs once."""
    # As long as anything takes, so that the blocks are there from beginning to end.
    longest = once(share, exchange, share.pair, in_order, serial=True)

    def compute_beside() -> float:
        return once(share, share.still, share.pair, share.plan, beside=lambda: taken(exchange.ctas, 1.5 * longest))

    ways = ways_of(share, exchange, lambda: wire_alone(share, exchange))
    if exchange.ctas:
        ways["compute_on_the_other_sms_ms"] = compute_beside
    found = with_shares(medians(ways, rounds))
    if exchange.ctas:
        beside = max(found["compute_on_the_other_sms_ms"], found["wire_ms"])
        found["overlapped_of_the_longer_on_the_other_sms"] = beside / found["overlapped_ms"]
    if share.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ways["overlapped_ms"]()
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def ways_of(share: Share, exchange: Exchange, wire: Callable[[], float]) -> dict[str, Callable[[], float]]:
    """A pair without and with overlap, its halves alone, and a stream of pairs with and without transfers."""
    return {
        "sequential_ms": lambda: once(share, exchange, share.pair, in_order, serial=True),
        "compute_ms": lambda: once(share, share.still, share.pair, share.plan),
        "wire_ms": wire,
        "overlapped_ms": lambda: once(share, exchange, share.pair, share.plan),
        "stream_ms": lambda: in_a_stream(share, exchange),
        "compute_stream_ms": lambda: in_a_stream(share, share.still),
    }


def with_shares(found: dict[str, float]) -> dict[str, float]:
    """The same, with what is hidden of the shorter of compute and wire, and the longer one over both.

    *Steady* is what one more pair adds to a stream of them, which neither begins nor ends; it is held against what one
    more pair adds without transfers, for a GPU that is busy for longer is slower.
    """
    found["steady_ms"] = (found["stream_ms"] - found["overlapped_ms"]) / (STREAM - 1)
    found["steady_compute_ms"] = (found["compute_stream_ms"] - found["compute_ms"]) / (STREAM - 1)
    wire = found["wire_ms"]
    for way, compute in (("overlapped", found["compute_ms"]), ("steady", found["steady_compute_ms"])):
        both = found[f"{way}_ms"]
        found[f"{way}_hidden"] = (compute + wire - both) / min(compute, wire)
        found[f"{way}_of_the_longer"] = max(compute, wire) / both
    return found


def actions(share: Share, exchange: Exchange, rounds: int) -> dict[str, float]:
    """What the actions of a pipeline cost on these blocks, F&B interleaved and the others with their transfers bare."""

    def forward() -> Programs:
        return (share.forward(share.inputs[0], None, "(F)"),)

    def weights_alone() -> float:
        (program,) = (share.backward(weights=False),)
        share.forget()
        with share.over(exchange):
            run(in_order((program,)), program)
        watch = Stopwatch(share.device)
        watch.synchronize()
        return watch.of(program.backward_weight)

    ways = {
        "forward_us": lambda: once(share, exchange, forward, in_order),
        "backward_us": lambda: once(share, exchange, lambda: (share.backward(),), in_order),
        "input_us": lambda: once(share, exchange, lambda: (share.backward(weights=False),), in_order),
        "weight_us": weights_alone,
        "overlapped_us": lambda: once(share, exchange, share.pair, share.plan),
    }
    return {name: ms * 1e3 for name, ms in medians(ways, rounds).items()}


def medians(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Of each way, all of them in each round, each time in another order: what ran before sets a GPU's clock."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(WARM_UP + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(REST_S)
            took = ways[name]()
            if number >= WARM_UP:
                found[name].append(took)
    return {name: statistics.median(values) for name, values in found.items()}


@contextmanager
def taken(ctas: int, ms: float) -> Iterator[None]:
    """Meanwhile, for ``ms``, so many thread blocks as large as those that carry rows do nothing but be there."""
    if torch.cuda.is_available():
        from spinning import spin

        stream = torch.cuda.Stream(priority=-1)
        with torch.cuda.stream(stream):
            spin(ctas, ms)
    yield


@contextmanager
def sms_left_free(count: int) -> Iterator[None]:
    """Grouped products leave so many multiprocessors to others, and some more.

    Their blocks come in twos that need neighbouring multiprocessors: if some find only single ones, they wait for a
    whole round. In eights enough pairs are left.
    """
    if not count or not torch.cuda.is_available():
        yield
        return
    torch._C._set_sm_carveout_experimental(-(-count // 8) * 8)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)
