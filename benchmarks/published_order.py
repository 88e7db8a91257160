"""Do our DualPipe and DualPipeV run the published order, action by action?

Takes a checkout of the published DualPipe (a folder that holds the package ``dualpipe``), lets its own ``step``
run on every rank with computing and communication replaced by a log, and compares that log with our rows, for
training and forward only, for all legal sizes up to a limit:

    git clone https://github.com/deepseek-ai/DualPipe
    python benchmarks/published_order.py --peer DualPipe

Prints how many sizes and actions agree; exits with 1 at the first difference. Needs torch, no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from counterflow import Action, Schedule, check, dualpipe, dualpipev
from counterflow.schedule import Kind


def main() -> int:
    options = _options()
    peer = _import_peer(options.peer)
    for name, generator in (("dualpipe", dualpipe), ("dualpipev", dualpipev)):
        sizes = actions = 0
        for num_ranks, num_microbatches in _legal_sizes(name, options.ranks, options.microbatches):
            schedule = generator(num_ranks, num_microbatches)
            check(schedule)
            for ours in (schedule, schedule.forward_only()):
                for rank, row in enumerate(ours.rows):
                    published = _published_row(peer, ours, rank)
                    if difference := _first_difference(row, published):
                        print(f"{name}, {num_ranks} ranks, {num_microbatches} micro-batches, {ours.mode}: {difference}")
                        return 1
                    actions += len(row)
            sizes += 1
        print(f"{name}: {sizes} of {sizes} sizes agree, {actions} actions (training and forward only)")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of the published DualPipe")
    parser.add_argument("--ranks", type=int, default=16, help="the most ranks (default %(default)s)")
    parser.add_argument("--microbatches", type=int, default=48, help="the most micro-batches (default %(default)s)")
    options = parser.parse_args()
    if not (options.peer / "dualpipe" / "__init__.py").is_file():
        parser.error(f"{options.peer} holds no package dualpipe; give a checkout of the published DualPipe")
    return options


def _import_peer(checkout: Path) -> ModuleType:
    sys.path.insert(0, str(checkout.resolve()))
    peer = importlib.import_module("dualpipe")
    peer.set_p2p_tensor_shapes([])
    peer.set_p2p_tensor_dtype(torch.float32)
    return peer


def _legal_sizes(name: str, most_ranks: int, most_microbatches: int) -> Iterator[tuple[int, int]]:
    step = 2 if name == "dualpipe" else 1
    for num_ranks in range(step, most_ranks + 1, step):
        for num_microbatches in range(2 * num_ranks, most_microbatches + 1, step):
            yield num_ranks, num_microbatches


def _published_row(peer: ModuleType, ours: Schedule, rank: int) -> list[Action]:
    """What the peer's own step does on ``rank`` at the sizes and in the mode of ``ours``."""
    published = peer.DualPipe if ours.name == "dualpipe" else peer.DualPipeV
    store = importlib.import_module("dualpipe.utils").WeightGradStore
    log: list[Action] = []

    class Logged(published):
        """The published schedule, its steps as they are; what they would compute or send is logged or left out."""

        def _forward_compute_chunk(self, phase: int) -> None:
            log.append(self._next(Kind.F, phase))
            if not self.loss_chunks:
                self.loss_chunks.append(torch.zeros(()))  # step() stacks the losses at its end

        def _backward_compute_chunk(self, phase: int, enable_zb: bool = False) -> None:
            if self.forward_only:
                return
            action = self._next(Kind.I if enable_zb else Kind.B, phase)
            log.append(action)
            if enable_zb:
                # The peer's own queue then says when each W comes.
                store.put(lambda: log.append(Action(Kind.W, action.stage, action.microbatch)))
                store.flush()

        def _forward_backward_compute_chunk(self, phase0: int, phase1: int) -> None:
            before = len(log)
            super()._forward_backward_compute_chunk(phase0, phase1)
            if len(log) == before + 2:
                log[before:] = [Action.overlap(*log[before:])]

        def _next(self, kind: Kind, phase: int) -> Action:
            counters = self.current_f_chunk_id if kind is Kind.F else self.current_b_chunk_id
            counters[phase] += 1
            return _in_our_words(ours, rank, kind, phase, counters[phase] - 1)

        def _nothing(self, *args: Any, **kwargs: Any) -> None:
            pass

        _recv_forward = _recv_backward = _send_forward = _send_backward = _commit_and_wait_comm = _nothing

    group = SimpleNamespace(size=lambda: ours.num_ranks, rank=lambda: rank)
    module = torch.nn.Linear(1, 1)
    with patch.object(torch.cuda, "current_device", return_value=module.weight.device):  # it insists on a GPU
        pipeline = Logged((module, module), process_group=group)
    train = ours.mode == "train"
    with torch.set_grad_enabled(train):
        pipeline.step(num_chunks=ours.num_microbatches, criterion=(lambda: None) if train else None)
    return log


def _in_our_words(ours: Schedule, rank: int, kind: Kind, phase: int, chunk: int) -> Action:
    """The peer counts each direction's chunks from 0, and calls the direction that enters nearer phase 0."""
    last = ours.num_stages - 1
    if ours.name == "dualpipev":
        return Action(kind, last - rank if phase else rank, chunk)
    from_last_rank = phase ^ (rank >= ours.num_ranks // 2)
    half = ours.num_microbatches // 2
    return Action(kind, last - rank, half + chunk) if from_last_rank else Action(kind, rank, chunk)


def _first_difference(ours: tuple[Action, ...], published: list[Action]) -> str | None:
    if list(ours) == published:
        return None
    for step in range(max(len(ours), len(published))):
        mine, theirs = (str(row[step]) if step < len(row) else "nothing" for row in (ours, published))
        if mine != theirs:
            return f"step {step} is {mine} here and {theirs} as published"
    raise AssertionError("rows that differ have a first difference")


if __name__ == "__main__":
    sys.exit(main())
