"""The traces as the page's script reads them: tables of names, and for each GPU its figures and lanes in columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import PurePath
from typing import Any

import numpy as np

from counterflow.report.page.hues import hues, inks
from counterflow.report.page.lanes import Drawn, Lane, LaneKind
from counterflow.report.page.packed import packed, packed_times
from counterflow.trace import (
    CLASSES,
    COMMUNICATION,
    Alignment,
    Exposure,
    Rules,
    Trace,
    align,
    exposures,
    function_of,
    messages,
)
from counterflow.trace.columns import Ints

MOST_SLICES = 1_000_000
"""A page draws so many intervals at most: browsers hold no more in reason. The shortest are left out, and counted."""

_SHORT = (
    "{:,} {} are not drawn, for a page holds {:,} of them: the shortest, none above {:g} µs. "
    "Figures and tables count them."
)
_CROWDED = (
    "{:,} slices are not drawn: too much else runs at that time on their stream, or in other phases. "
    "Figures and tables count them."
)
_FIGURES = (
    *("window_us", "compute_us", "communication_us", "overlapped_us", "exposed_us", "transfers_us"),
    *("exposed_transfers_us", "waiting_us", "unknown_us", "other_us", "idle_us"),
    *("blocking_us", "not_blocking_us", "idle_gaps", "num_pieces", "phase_source", "sms", "communication_sms"),
)


@dataclass(frozen=True)
class _Gpu:
    """One GPU of one trace; ``title`` is what a person calls it, ``ahead_ns`` how far its clock runs ahead."""

    title: str
    ahead_ns: int
    drawn: Drawn
    exposure: Exposure
    lanes: list[Lane]


class _Table:
    """Texts, each once, in the order in which they come."""

    def __init__(self, *first: str) -> None:
        self.ids = {text: place for place, text in enumerate(first)}

    def __call__(self, text: str) -> int:
        return self.ids.setdefault(text, len(self.ids))


class Data:
    """All GPUs, with as many slices as a page holds; ``num_left_out`` are the slices beyond those."""

    def __init__(self, gpus: list[_Gpu], aligned: Alignment) -> None:
        self.gpus = gpus
        self.is_timeline = bool(gpus) and all(gpu.drawn.is_timeline for gpu in gpus)
        crowded = sum({id(gpu.drawn): gpu.drawn.crowded for gpu in gpus}.values())
        self.left_out = [_CROWDED.format(crowded)] if crowded else []
        self.num_slices, short = self._keep_the_longest("slices", ("stream", "phase"))
        self._keep_the_longest("stretches of the unions", ("compute", "hidden", "exposed"))
        self.num_left_out = crowded + short
        starts = [gpu.exposure.start_ns - gpu.ahead_ns for gpu in gpus]
        ends = [start + round(gpu.exposure.window_us * 1000) for start, gpu in zip(starts, gpus, strict=True)]
        one_clock = len(gpus) < 2 or max(starts) < min(ends)
        self.origins = [(min(starts) + gpu.ahead_ns if one_clock else gpu.exposure.start_ns) for gpu in gpus]
        self.about_clocks = _about_clocks(aligned, one_clock)

    def _keep_the_longest(self, what: str, kinds: tuple[LaneKind, ...]) -> tuple[int, int]:
        """How many are drawn, and how many are not."""
        lanes = [(gpu.lanes, place) for gpu in self.gpus for place, lane in enumerate(gpu.lanes) if lane.kind in kinds]
        lengths = [of[place].end_ns - of[place].start_ns for of, place in lanes]
        total = sum(map(len, lengths))
        over = total - MOST_SLICES
        if over <= 0:
            return total, 0
        every = np.concatenate(lengths)
        kept = np.ones(total, dtype=bool)
        kept[np.argsort(every, kind="stable")[:over]] = False
        for (of, place), part in zip(lanes, np.split(kept, np.cumsum([*map(len, lengths)])[:-1]), strict=True):
            of[place] = of[place].rows(part)
        self.left_out.append(_SHORT.format(over, what, MOST_SLICES, every[~kept].max() / 1000))
        return MOST_SLICES, over

    def warnings_of(self, trace: Trace) -> list[str]:
        """Each sentence once."""
        gpus = [gpu.exposure for gpu in self.gpus if gpu.drawn.trace is trace]
        return list(dict.fromkeys(w for gpu in gpus for w in gpu.warnings)) if gpus else list(trace.warnings)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        names, phases = _Table(""), _Table("")
        runs = _Runs(names)
        gpus = [
            self._gpu(gpu, origin, names, phases, runs) for gpu, origin in zip(self.gpus, self.origins, strict=True)
        ]
        colours = hues(list(phases.ids))
        return {
            "gpus": gpus,
            "classes": CLASSES,
            "communication": COMMUNICATION,
            "names": list(names.ids),
            "functions": [function_of(name) for name in names.ids],
            "phases": list(phases.ids),
            "hues": colours,
            "inks": inks(colours),
            "runs": {key: packed(column) for key, column in runs.columns().items()},
            "is_timeline": self.is_timeline,
        }

    def _gpu(self, gpu: _Gpu, origin: int, names: _Table, phases: _Table, runs: _Runs) -> dict[str, Any]:
        one = gpu.exposure
        place = np.array([phases(name) for name in gpu.drawn.phases], dtype=np.int64)
        return {
            "title": gpu.title,
            "file": one.file,
            "start_ns": one.start_ns - origin,
            **{key: getattr(one, key) for key in _FIGURES},
            "streams": [[s.stream, s.count, s.busy_us, s.compute_us, s.communication_us] for s in one.streams],
            "kernels": [
                [names(k.name), CLASSES.index(k.kind), k.count, k.total_us, k.exposed_us, k.blocks, k.threads]
                for k in one.kernels
            ],
            "pieces": [
                [p.start_us, p.length_us, list(map(names, p.kernels)), p.phases, names(p.then), p.then_phase, p.waited]
                for p in one.pieces
            ],
            "phases": [
                [phases(p.name), p.count, p.compute_us, p.communication_us, p.exposed_us, p.other_us]
                for p in one.phases
            ],
            "hiding": [
                [h.name, h.communication_us, h.exposed_us, [[s.phase, s.us] for s in h.under]] for h in one.hiding
            ],
            "flights": [[f.name, f.count, f.flight_us, f.hidden_us, f.exposed_us] for f in one.flights],
            "lanes": [
                {
                    "kind": lane.kind,
                    "label": lane.label,
                    "whole": lane.whole,
                    **packed_times(lane.start_ns - origin, lane.end_ns - origin),
                    "run": packed(runs.of(gpu.drawn, lane.what)) if lane.kind == "stream" else None,
                    "phase": packed(place[lane.phase]) if lane.kind in ("stream", "phase") else None,
                }
                for lane in gpu.lanes
            ],
        }


class _Runs:
    """What ran, each once: a kernel, its class, its grid and its block; slices name their row here."""

    def __init__(self, names: _Table) -> None:
        self._names = names
        self._ids: dict[tuple[int, int, int, int], int] = {}

    def of(self, drawn: Drawn, rows: Ints) -> Ints:
        work = drawn.work
        columns = (work.name[rows], drawn.classes[rows], work.blocks[rows], work.threads[rows])
        key = np.zeros(len(rows), dtype=np.int64)
        for column in columns:  # renumbered at each step, so that the product fits
            values, place = np.unique(column, return_inverse=True)
            key = np.unique(key * len(values) + place, return_inverse=True)[1]
        _, first = np.unique(key, return_index=True)
        texts = drawn.trace.names
        ids = [
            self._ids.setdefault((self._names(texts[name]), *rest), len(self._ids))
            for name, *rest in zip(*(column[first].tolist() for column in columns), strict=True)
        ]
        return np.array(ids, dtype=np.int64)[key] if ids else key

    def columns(self) -> dict[str, Ints]:
        table = np.array(list(self._ids), dtype=np.int64).reshape(-1, 4)
        return dict(zip(("name", "class", "blocks", "threads"), table.T.clip(min=0), strict=True))


def data_of(traces: Sequence[Trace], rules: Rules | None, within: str | None) -> Data:
    """What there is to draw of these traces, on one clock where their collectives tell it.

    Raises:
        TraceError: a trace has no annotation ``within``, or nothing was launched inside it.
    """
    several = len(traces) > 1
    aligned = align([messages(trace) for trace in traces]) if several else Alignment.none(len(traces))
    gpus = []
    for trace, ahead_ns in zip(traces, aligned.offsets_ns.tolist(), strict=True):
        drawn = Drawn(trace, rules)
        for one in exposures(trace, rules, within):
            gpus.append(_Gpu(_title(drawn, one), ahead_ns, drawn, one, list(drawn.lanes(one))))
    titles = [gpu.title for gpu in gpus]
    if len(set(titles)) < len(titles):
        apart = what_differs([gpu.exposure.file for gpu in gpus])
        gpus = [replace(gpu, title=f"{file}: {gpu.title}") for file, gpu in zip(apart, gpus, strict=True)]
    return Data(gpus, aligned)


def what_differs(files: Sequence[str]) -> list[str]:
    """What tells files apart: their paths without the words at the beginning and the end that all of them share.

    Example:
        >>> what_differs(["runs/node1_71.pt.trace.json", "runs/node1_72.pt.trace.json"])
        ['71', '72']
        >>> what_differs(["runs/trace.json", "runs/trace.1.json"])
        ['trace.json', '1']
    """
    words = [re.findall(r"[^\W_]+|[\W_]+", file) for file in files]
    before, after = _shared(words), _shared([one[::-1] for one in words])
    return [
        "".join(one[before : len(one) - after]) or PurePath(file).name for one, file in zip(words, files, strict=True)
    ]


def _shared(words: Sequence[list[str]]) -> int:
    """How many words at the beginning are those of all."""
    return sum(1 for _ in takewhile(lambda place: len(set(place)) == 1, zip(*words, strict=False)))


def _about_clocks(aligned: Alignment, one_clock: bool) -> str:
    """What a reader has to know to compare ranks."""
    if not one_clock:
        return "The clocks of these traces do not meet: each GPU is drawn from the start of its own window."
    if aligned.basis != "collectives":
        return ""
    exact = "" if aligned.error_us is None else f", to {aligned.error_us:.3g} µs"
    return f"Ranks are on one clock by the ends of {aligned.shared:,} collectives that they share{exact}."


def _title(drawn: Drawn, gpu: Exposure) -> str:
    if drawn.is_timeline:
        return f"rank {gpu.device}"
    return f"GPU {gpu.device}" if gpu.rank is None else f"rank {gpu.rank}, GPU {gpu.device}"
