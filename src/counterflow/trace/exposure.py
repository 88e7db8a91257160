"""Communication time under which no compute kernel runs, exactly: to the nanosecond of the trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from counterflow.errors import TraceError
from counterflow.trace.columns import Ints
from counterflow.trace.cover import Cover
from counterflow.trace.cover import blocks as row_blocks
from counterflow.trace.figures import Exposure, Kernel, Stream
from counterflow.trace.flights import Flights, flight_figures, flights
from counterflow.trace.parts import COMBINE, DISPATCH
from counterflow.trace.phase_figures import hiding_figures, phase_figures
from counterflow.trace.phases import phases_of
from counterflow.trace.pieces import Pieces
from counterflow.trace.read import Trace, counted, launch_of
from counterflow.trace.rules import CLASSES, MEMORY, TRANSFER, UNKNOWN_KERNEL, WAITING, Rules, function_of
from counterflow.trace.window import Window, us


def exposures(trace: Trace, rules: Rules | None = None, within: str | None = None) -> list[Exposure]:
    """Where the time went, for each GPU of the trace.

    The window is the span of all GPU work or, with ``within``, of the work that was launched inside the annotations
    of that name: such work starts after the annotation opens, and ends long after it closes. The ranks of a timeline
    that counterflow wrote share the window of the step, so what is idle there is their bubble.

    Raises:
        TraceError: the trace has no such annotation, or nothing was launched inside it.

    Example:
        >>> import json, tempfile, pathlib
        >>> from counterflow.trace import exposures, open_trace
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> kernels = [("gemm", 7, 0, 10), ("ncclDevKernel_AllReduce", 20, 6, 8)]
        >>> events = [
        ...     {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": ts, "dur": dur}
        ...     for name, stream, ts, dur in kernels
        ... ]
        >>> _ = path.write_text(json.dumps({"traceEvents": events}))
        >>> [one] = exposures(open_trace(path))
        >>> one.window_us, one.compute_us, one.communication_us, one.exposed_us
        (14.0, 10.0, 8.0, 4.0)
    """
    work = trace.work
    classes = (rules or Rules()).classify(work, trace.names, trace.sms)
    phases = phases_of(trace, classes)
    launch = launch_of(work, trace.launches)
    flown = flights(work, trace.names, launch)
    inside = None if within is None else _launched_within(trace, within)
    found = []
    for device in np.unique(work.device if inside is None else work.device[inside]).tolist():
        on = work.device == device
        chosen = on if inside is None else on & inside
        chosen = np.ones_like(chosen) if trace.timeline and within is None else chosen
        start = int(work.start_ns[chosen.argmax()])  # the first of those in order
        end = int(work.end_ns.max(where=chosen, initial=start))
        here = on & (work.start_ns <= end) & (work.end_ns >= start)
        rows = slice(None) if here.all() else np.flatnonzero(here)
        window = Window(trace, device, rows, classes, launch, phases, start, end)
        found.append(_exposure(window, flown))
    return found


def _launched_within(trace: Trace, name: str) -> Ints:
    ranges = trace.annotations.rows(np.array([trace.names[n] == name for n in trace.annotations.name], dtype=bool))
    ranges = ranges.rows(ranges.on_gpu == 0)
    if not len(ranges):
        known = sorted({trace.names[n] for n in trace.annotations.name.tolist()})
        some = ", ".join(map(repr, known[:10])) + (", …" if len(known) > 10 else "")
        raise TraceError(
            f"{trace.file}: there is no annotation {name!r}; give one of {some or 'a trace that has some'}"
        )
    launch = launch_of(trace.work, trace.launches)
    times = trace.launches.start_ns[launch] if len(trace.launches) else launch
    inside = (launch >= 0) & Cover.of(ranges.start_ns, ranges.end_ns).holds(times)
    if not inside.any():
        raise TraceError(f"{trace.file}: no GPU work was launched inside {name!r}; give another annotation")
    return np.asarray(inside)


def _exposure(window: Window, flown: Flights) -> Exposure:
    busy = Cover.of(window.work.start_ns, window.work.end_ns)
    busy_ns, idle_gaps = busy.total_ns, len(Cover(np.array([window.start]), np.array([window.end])) - busy)
    del busy  # it may be long
    transfers, waiting = window.cover(window.classes == TRANSFER), window.cover(window.classes == WAITING)
    exposed = window.exposed.total_ns
    kernels = tuple(_kernels(window))
    pieces = Pieces(window)
    flown = flown.inside(window)
    sms = window.trace.sms.get(window.device, 0)
    blocks = int(window.work.blocks[window.communicates].max(initial=0))
    return Exposure(
        file=window.trace.file,
        rank=window.trace.rank,
        device=window.device,
        start_ns=window.start,
        window_us=us(window.end - window.start),
        compute_us=us(window.compute.total_ns),
        communication_us=us(window.communication.total_ns),
        overlapped_us=us(window.communication.total_ns - exposed),
        exposed_us=us(exposed),
        transfers_us=us(transfers.total_ns),
        exposed_transfers_us=us((transfers - window.compute).total_ns),
        waiting_us=us(waiting.total_ns),
        unknown_us=us(window.cover(window.classes == UNKNOWN_KERNEL).total_ns),
        other_us=us(busy_ns - window.compute.total_ns - exposed),
        idle_us=us(window.end - window.start - busy_ns),
        idle_gaps=idle_gaps,
        num_pieces=len(window.exposed),
        blocking_us=us(pieces.blocking_ns),
        not_blocking_us=us(pieces.not_blocking_ns),
        flights_us=us(flown.cover.total_ns),
        hidden_flights_us=us((flown.cover & window.compute).total_ns),
        exposed_flights_us=us((flown.cover - window.compute).total_ns),
        phase_source=window.phases.source,
        sms=sms,
        communication_sms=min(blocks, sms) if sms else 0,
        streams=tuple(_streams(window)),
        kernels=kernels,
        pieces=tuple(pieces.longest()),
        phases=tuple(phase_figures(window)),
        hiding=tuple(hiding_figures(window)),
        flights=tuple(flight_figures(window, flown)),
        warnings=tuple(_warnings(window, kernels)),
    )


def _streams(window: Window) -> Iterator[Stream]:
    for stream in np.unique(window.work.stream).tolist():
        on = window.work.stream == stream
        yield Stream(
            stream,
            int(on.sum()),
            *(us(window.cover(on & which).total_ns) for which in (on, window.computes, window.communicates)),
        )


def _kernels(window: Window) -> list[Kernel]:
    """The longest first."""
    names = np.unique(window.work.name)
    counts, total, shown, blocks, threads = np.zeros((5, len(names) * len(CLASSES)), dtype=np.int64)
    for some in row_blocks(len(window.work)):
        work = window.work.rows(some)
        place = np.searchsorted(names, work.name) * len(CLASSES) + window.classes[some]
        length = work.end_ns - work.start_ns
        talks = window.communicates[some]
        bare = length[talks] - window.compute.within_ns(work.start_ns[talks], work.end_ns[talks])
        np.add.at(counts, place, 1)
        np.add.at(total, place, length)
        np.add.at(shown, place[talks], bare)
        np.maximum.at(blocks, place, work.blocks)
        np.maximum.at(threads, place, work.threads)
    kernels = [
        Kernel(
            window.trace.names[int(names[key // len(CLASSES)])],
            CLASSES[key % len(CLASSES)],
            int(counts[key]),
            us(int(total[key])),
            us(int(shown[key])),
            int(blocks[key]),
            int(threads[key]),
        )
        for key in np.flatnonzero(counts).tolist()
    ]
    return sorted(kernels, key=lambda kernel: (-kernel.total_us, kernel.name))


def _warnings(window: Window, kernels: tuple[Kernel, ...]) -> Iterator[str]:
    yield from window.trace.warnings
    carries = [part is not None and part.part in (DISPATCH, COMBINE) for part in window.phases.parts]
    copied = (window.classes == MEMORY) & np.array([*carries, False], dtype=bool)[window.phase_rows]
    if copied.any():
        copies = us(window.cover(copied).total_ns)
        yield (
            f"{copies:,.3f} µs of copies in the phases of dispatch and combine are counted as other, and not as "
            "communication: tell their class in a rules file"
        )
    unknown = [kernel for kernel in kernels if kernel.kind == CLASSES[UNKNOWN_KERNEL]]
    if unknown:
        yield (
            f"{counted(len(unknown), 'long kernel')} of unknown purpose counted as other, with few blocks and on a "
            f"stream without larger ones, the longest {function_of(unknown[0].name)!r}: tell the class in a rules file"
        )
