"""The phases of all GPU work by the order of its kernels alone, put together: compute first, then transfers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import MEMCPY, Ints
from counterflow.trace.hints import hint_of
from counterflow.trace.kernel_phases import (
    ATTENTION_B,
    ATTENTION_F,
    EXPERTS_B,
    EXPERTS_F,
    STATES,
    UNTOLD,
    WEIGHTS,
    states_of,
)
from counterflow.trace.movers import Movers
from counterflow.trace.parts import ATTENTION, EXPERTS, MLP, Part
from counterflow.trace.read import Trace, graph_of, launch_of
from counterflow.trace.rules import PREPARING, WAITING, function_of
from counterflow.trace.transfer_phases import Block, Gap, Transfers, gaps_of, kinds_of

Bools = npt.NDArray[np.bool_]

_Range = Block | Gap

_BACKWARD = {ATTENTION_B: ATTENTION, EXPERTS_B: EXPERTS}


def phases_by_order(trace: Trace, classes: Ints) -> tuple[list[Part], Ints]:
    """The phases as they first appear, GPU by GPU, and for each piece of work the row of its own; -1 without one.

    Empty where the kernels show no attention or nothing like an expert: then nothing is told.
    """
    launch = launch_of(trace.work, trace.launches)
    in_graph = graph_of(launch) >= 0
    rows = np.full(len(trace.work), UNTOLD, dtype=np.int64)
    phases: list[Part] = []
    for device in np.unique(trace.work.device).tolist():
        here = np.flatnonzero(trace.work.device == device)
        told = _Gpu(trace, here, classes[here], launch[here], in_graph[here]).ranges()
        rows[here] = _numbered(told, phases)
    return phases, rows


def _numbered(told: list[_Range | None], phases: list[Part]) -> list[int]:
    """A row for each block and transfer, as they first appear, behind the phases known already."""
    rows: dict[int, int] = {}
    numbered = []
    for one in told:
        if one is None or one.part is None:
            numbered.append(UNTOLD)
            continue
        if id(one) not in rows:
            rows[id(one)] = len(phases)
            phases.append(one.part)
        numbered.append(rows[id(one)])
    return numbered


class _Gpu:
    """The work of one GPU, in the order in which it was launched."""

    def __init__(self, trace: Trace, rows: Ints, classes: Ints, launch: Ints, in_graph: Bools) -> None:
        known = launch >= 0
        launched = np.where(known, trace.launches.start_ns[launch], -1) if len(trace.launches) else launch
        thread = np.where(known, trace.launches.thread[launch], -1) if len(trace.launches) else launch
        work = trace.work.rows(rows)
        self.order = np.lexsort((work.start_ns, _filled(launched, work.stream)))
        self.work, self.classes = work.rows(self.order), classes[self.order]
        self.launched, self.thread = launched[self.order], thread[self.order]
        self.names = trace.names
        self.hints = {name: hint_of(self.names[name]) for name in np.unique(work.name).tolist()}
        sms = trace.sms.get(int(work.device[0]), 0)
        self.movers = Movers.of(
            self.work, self.classes, self.launched, in_graph[self.order], self.names, self.hints, sms
        )

    def ranges(self) -> list[_Range | None]:
        """For each piece of work, in the order of its start, the block or the transfer it belongs to."""
        computes = np.flatnonzero(~self.movers.aside & ~self.movers.moves)
        told: list[_Range | None] = [None] * len(self.work)
        blocks = self._blocks(computes, self._states(computes))
        if blocks:
            for block in blocks:
                for row in block.rows.tolist():
                    told[int(self.order[row])] = block
            for row, gap in self._transfers(blocks):
                told[int(self.order[row])] = gap
        return told

    def _states(self, computes: Ints) -> Ints:
        movers = np.unique(self.work.name[self.movers.moves]).tolist()
        return states_of(
            self.work.rows(computes),
            self.hints,
            self.launched[computes],
            self.thread[computes],
            self.movers.edges(self.work, computes),
            dispatches=any(kinds_of(function_of(self.names[name])) for name in movers),
        )

    def _blocks(self, computes: Ints, states: Ints) -> list[Block]:
        """Compute of one state launched on end, and what part of a layer it is."""
        routed, core, product, router, norm = (
            np.isin(self.work.name[computes], [name for name, hint in self.hints.items() if getattr(hint, which)])
            for which in ("routed", "core", "gemm", "router", "opens")
        )
        experts = bool(routed.any())
        first = _begins(states, router, norm)
        blocks, backward = [], ""
        for begin, end in zip(first.tolist(), [*first[1:].tolist(), len(states)], strict=False):
            state = int(states[begin])
            backward = _BACKWARD.get(state, backward)
            if state == UNTOLD:
                continue
            behind = begin + np.flatnonzero(routed[begin:end])
            part = _part(state, EXPERTS if len(behind) else backward, experts)
            places = computes[behind] if len(behind) else computes[[begin, end - 1]]
            cores = begin + np.flatnonzero(core[begin:end])
            projected = bool(product[begin : cores[0] if len(cores) else end].any())
            about = len(behind) > 0, len(cores) > 0, projected
            blocks.append(Block(state, int(places[0]), int(places[-1]), *about, part, computes[begin:end]))
        return blocks

    def _transfers(self, blocks: list[Block]) -> Iterator[tuple[int, Gap]]:
        """Each piece of communication with its transfer, and what was launched before it on its stream for it."""
        if not any(block.routed for block in blocks):
            return
        backward = any(block.state not in (ATTENTION_F, EXPERTS_F) for block in blocks)
        transfers, movers = Transfers(gaps_of(blocks), backward), self.movers
        served: dict[int, Gap] = {}
        copies = self.work.kind == MEMCPY
        ready: dict[int, list[int]] = {}
        streams, names, classes = self.work.stream.tolist(), self.work.name.tolist(), self.classes.tolist()
        for row in np.flatnonzero(movers.aside | movers.moves).tolist():
            origin = int(movers.origin[row])
            if origin >= 0:
                if origin in served:
                    yield row, served[origin]
                continue
            waiting = ready.setdefault(streams[row], [])
            waiting.append(row)
            if not movers.moves[row] or classes[row] in (WAITING, PREPARING):
                continue
            prepared = " ".join(function_of(self.names[names[one]]) for one in waiting[:-1])
            kinds = kinds_of(function_of(self.names[names[row]]), prepared)
            if backward and copies[row] and self.launched[row] < 0:
                kinds = ()  # copies of several exchanges mix: only the order of their launch could tell them apart
            gap = transfers.serve(row, kinds, joined=not prepared and bool(movers.joined[row]))
            if gap is not None:
                served[row] = gap
                yield from ((one, gap) for one in waiting)
            waiting.clear()


def _begins(states: Ints, router: Bools, norm: Bools) -> Ints:
    """Where blocks begin: at another state, and where attention goes on after its router, at the next norm."""
    rows = np.arange(len(states))
    begins = np.append(True, states[1:] != states[:-1])[: len(states)]
    since, routed, normed = (np.maximum.accumulate(np.where(which, rows, -1)) for which in (begins, router, norm))
    normed = np.append(-1, normed[:-1])[: len(states)]
    anew = norm & (states == ATTENTION_F) & (routed >= since) & (routed > normed)
    return np.flatnonzero(begins | anew)


def _part(state: int, backward: str, experts: bool) -> Part | None:
    """The part of a block; gradients of weights are those of the backward before them."""
    part, direction = (backward, "W") if state == WEIGHTS else (STATES[state][:-3], STATES[state][-2])
    if not part:
        return None
    return Part(MLP if part == EXPERTS and not experts else part, direction)


def _filled(launched: Ints, stream: Ints) -> Ints:
    """When each piece was launched; where not told, with the piece before it on its stream."""
    filled = launched.copy()
    for one in np.unique(stream).tolist():
        here = stream == one
        filled[here] = np.maximum.accumulate(launched[here])
    return filled
