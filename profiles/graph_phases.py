"""Tell the phases inside a CUDA graph: its replay launches everything at once, and no range stands around a kernel.

The same steps are profiled once more without a graph. There every kernel is launched inside the range of its step, and
each lane does the same work in the same order: so the n-th kernel of a lane belongs to the same step in both. Streams
say nothing of lanes in a graph: a step may lie on several, and a stream hold compute and copies by turns. So what a
step has on end on one stream becomes a slice of the category ``gpu_user_annotation`` there, which holds nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import groupby
from typing import Any

Event = dict[str, Any]
Step = tuple[str, int, str | None]
"""A lane, the how-manieth step of it, and its phase."""

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LANES = ("Memcpy DtoH", "Memcpy HtoD", "loopback_kernel")


def mark_phases(graph: dict[str, Any], plain: dict[str, Any]) -> None:
    """Add the slices to ``graph``, a trace of one replay; ``plain`` is a trace of the same steps.

    Raises:
        ValueError: the two did not do the same work.
    """
    phases = {lane: _phases_of(plain, work) for lane, work in _lanes(plain).items()}
    streams: dict[tuple[Any, Any], list[tuple[Event, Step]]] = {}
    for lane, work in _lanes(graph).items():
        told = phases.get(lane, [])
        if [event["name"] for event in work] != [name for name, _ in told]:
            raise ValueError(
                f"the graph has {len(work)} pieces of work on the lane {lane or 'compute'} and the plain run "
                f"{len(told)}, or others; profile the same steps"
            )
        pairs = zip(work, (phase for _, phase in told), strict=True)
        for number, (phase, run) in enumerate(groupby(pairs, key=lambda pair: pair[1])):
            for event, _ in run:
                streams.setdefault((event["pid"], event["tid"]), []).append((event, (lane, number, phase)))
    for work_of_steps in streams.values():
        work_of_steps.sort(key=lambda pair: pair[0]["ts"])
        for (_, _, phase), run_of_step in groupby(work_of_steps, key=lambda pair: pair[1]):
            if phase is not None:
                graph["traceEvents"].append(_slice(phase, [event for event, _ in run_of_step]))


def _lanes(trace: dict[str, Any]) -> dict[str, list[Event]]:
    lanes: dict[str, list[Event]] = {}
    for event in sorted(_of(trace, _WORK), key=lambda event: event["ts"]):
        lane = next((lane for lane in _LANES if event["name"].startswith(lane)), "")
        lanes.setdefault(lane, []).append(event)
    return lanes


def _phases_of(trace: dict[str, Any], work: list[Event]) -> list[tuple[str, str | None]]:
    launched = {e["args"]["correlation"]: e["ts"] for e in _of(trace, ("cuda_runtime", "cuda_driver")) if "args" in e}
    steps = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in _of(trace, ("user_annotation",)))
    steps = [step for step in steps if "Step#" not in step[2]]
    starts = [start for start, _, _ in steps]
    told = []
    for event in work:
        ts = launched.get(event["args"].get("correlation"), float("-inf"))
        place = bisect_right(starts, ts) - 1
        inside = place >= 0 and ts < steps[place][1]
        told.append((event["name"], steps[place][2] if inside else None))
    return told


def _of(trace: dict[str, Any], categories: tuple[str, ...]) -> list[Event]:
    return [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in categories]


def _slice(phase: str, run: list[Event]) -> Event:
    first, end = run[0], max(event["ts"] + event["dur"] for event in run)
    place = {key: first[key] for key in ("pid", "tid", "ts")}
    return {"ph": "X", "cat": "gpu_user_annotation", "name": phase, "dur": end - first["ts"], **place}
