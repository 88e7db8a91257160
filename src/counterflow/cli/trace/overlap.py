"""The verb trace overlap: the communication of a profiled run, and how much of it no compute hides."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterflow.cli.output import print_json, print_table, printable, short, warn
from counterflow.cli.trace.options import RulesFile, Within
from counterflow.cli.trace.progress import reading
from counterflow.errors import CounterflowError, TraceError

if TYPE_CHECKING:
    from counterflow.trace import Exposure, Kernel, Trace

_PIECES = 5
_KERNELS = 12
_COLUMNS = 8


def overlap(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Traces, one folder of them, or - for a pipe.")],
    within: Within = None,
    rules: RulesFile = None,
    max_exposed: Annotated[
        str | None,
        typer.Option("--max-exposed", metavar="PERCENT", help="Exit with 1 if more of a GPU's window is exposed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the communication of a profiled run, and how much of it no compute hides.

    Reads traces of the PyTorch profiler, plain, .gz or .zst, and timelines that counterflow wrote.

    \b
    Example:
      counterflow trace overlap rank0.json.gz rank1.json.gz
      counterflow trace overlap traces/ --max-exposed 4%
    """
    from counterflow.trace import Rules, exposures, open_traces

    limit = None if max_exposed is None else _share(max_exposed)
    chosen = Rules.read(rules) if rules is not None else None
    with reading(files) as progress:
        traces = open_traces(files[0] if len(files) == 1 else files, progress=progress)
    found = [(trace, exposures(trace, chosen, within)) for trace in traces]
    for trace, gpus in found:
        for warning in dict.fromkeys(w for gpu in gpus for w in gpu.warnings) if gpus else trace.warnings:
            warn(f"{trace.file}: {warning}")
    if as_json:
        print_json({"traces": [entry for trace, gpus in found for entry in _entries(trace, gpus)]})
    else:
        for number, (trace, gpus) in enumerate(found):
            print("\n" if number else "", end="")
            _show(trace, gpus)
    if limit is not None:
        _hold(found, limit, max_exposed)


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value <= 100:
        raise CounterflowError(f"--max-exposed got {text!r}; it needs a part of the window, such as 4%")
    return value / 100


def _hold(found: list[tuple[Trace, list[Exposure]]], limit: float, said: str | None) -> None:
    """The gate: what has no GPU work has not passed it."""
    empty = [trace.file for trace, gpus in found if not gpus]
    if empty:
        raise TraceError(f"{empty[0]}: there is no GPU work to hold to {said}; give a trace that has some")
    damaged = [trace.file for trace, _ in found if trace.damaged]
    if damaged:
        raise TraceError(
            f"{damaged[0]}: a part of the file is missing, so it cannot be held to {said}; give a whole one"
        )
    over = [gpu for _, gpus in found for gpu in gpus if gpu.exposed_share > limit]
    for gpu in over:
        print(
            f"counterflow: {printable(gpu.file)}: {gpu.exposed_share:.2%} of GPU {gpu.device}'s window is exposed "
            f"communication; at most {said} was asked for",
            file=sys.stderr,
        )
    if over:
        raise typer.Exit(1)


def _entries(trace: Trace, gpus: list[Exposure]) -> Iterator[dict[str, Any]]:
    if not gpus:
        times = dict.fromkeys(_TIMES.values(), 0.0)
        lists: dict[str, list[Any]] = {key: [] for key in (*_LISTS, "exposed_pieces")}
        yield (
            {"file": trace.file, "rank": trace.rank, "device": None, "phase_source": "none"}
            | times
            | lists
            | {"warnings": list(trace.warnings)}
        )
    for gpu in gpus:
        yield {
            "file": gpu.file,
            "rank": gpu.rank,
            "device": gpu.device,
            "phase_source": gpu.phase_source,
            **{key: getattr(gpu, name) for name, key in _TIMES.items()},
            "idle_gaps": gpu.idle_gaps,
            "num_exposed_pieces": gpu.num_pieces,
            "sms": gpu.sms,
            "communication_sms": gpu.communication_sms,
            **{key: [asdict(one) for one in getattr(gpu, key)] for key in _LISTS},
            "exposed_pieces": [asdict(one) for one in gpu.pieces],
            "warnings": list(gpu.warnings),
        }


_LISTS = ("streams", "kernels", "phases", "hiding", "flights")
_TIMES = {
    "window_us": "window_us",
    "compute_us": "compute_us",
    "communication_us": "communication_us",
    "overlapped_us": "overlapped_us",
    "exposed_us": "exposed_communication_us",
    "blocking_us": "blocking_us",
    "not_blocking_us": "not_blocking_us",
    "transfers_us": "transfers_us",
    "exposed_transfers_us": "exposed_transfers_us",
    "waiting_us": "waiting_us",
    "unknown_us": "unknown_us",
    "other_us": "other_us",
    "idle_us": "idle_us",
    "flights_us": "flights_us",
    "hidden_flights_us": "hidden_flights_us",
    "exposed_flights_us": "exposed_flights_us",
}


# --- for people ----------------------------------------------------------------------------------------------


def _show(trace: Trace, gpus: list[Exposure]) -> None:
    if not gpus:
        print(f"{printable(trace.file)}: no GPU work")
    for number, gpu in enumerate(gpus):
        print("\n" if number else "", end="")
        rank = "" if gpu.rank is None else f"rank {gpu.rank}, "
        sms = f", {gpu.sms} SMs" if gpu.sms else ""
        print(f"{printable(gpu.file)}: {rank}GPU {gpu.device}{sms}\n")
        _show_times(gpu)
        _show_streams(gpu)
        _show_kernels(gpu)
        _show_pieces(gpu)
        _show_phases(gpu)
        _show_hiding(gpu)
        _show_flights(gpu)


def _show_times(gpu: Exposure) -> None:
    rows = [
        ("window", gpu.window_us, ""),
        ("compute", gpu.compute_us, ""),
        ("communication", gpu.communication_us, ""),
        ("  hidden under compute", gpu.overlapped_us, _percent(gpu.overlapped_us, gpu.communication_us)),
        ("  exposed", gpu.exposed_us, _percent(gpu.exposed_us, gpu.communication_us)),
        ("  waiting for peers", gpu.waiting_us, _percent(gpu.waiting_us, gpu.communication_us)),
        ("transfers alone", gpu.transfers_us, ""),
        ("  exposed", gpu.exposed_transfers_us, _percent(gpu.exposed_transfers_us, gpu.communication_us)),
        ("other", gpu.other_us, ""),
        ("idle", gpu.idle_us, ""),
    ]
    print_table(
        ["", "µs", "of the window", "of communication"],
        [[name, _time(us), _percent(us, gpu.window_us), share] for name, us, share in rows],
    )


def _show_streams(gpu: Exposure) -> None:
    print()
    rows = [(s.stream, s.count, s.busy_us, s.compute_us, s.communication_us) for s in gpu.streams]
    print_table(
        ["stream", "pieces of work", "busy µs", "of the window", "compute µs", "communication µs"],
        [
            [str(stream), f"{count:,}", _time(busy), _percent(busy, gpu.window_us), _time(compute), _time(talk)]
            for stream, count, busy, compute, talk in rows
        ],
    )


def _show_kernels(gpu: Exposure) -> None:
    from counterflow.trace import CLASSES, COMMUNICATION, function_of

    shown = {*(CLASSES[kind] for kind in COMMUNICATION), "unknown"}
    functions: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in gpu.kernels:
        if kernel.kind in shown:
            functions.setdefault((function_of(kernel.name), kernel.kind), []).append(kernel)
    if not functions:
        print("\nno communication kernels")
        return
    rows = [
        (
            name,
            kind,
            sum(k.count for k in runs),
            sum(k.total_us for k in runs),
            sum(k.exposed_us for k in runs),
            runs[0],
        )
        for (name, kind), runs in functions.items()
    ]
    rows.sort(key=lambda row: -row[3])
    print()
    print_table(
        ["communication kernel", "is", "runs", "µs", "exposed µs", "grid × block"],
        [
            [
                short(name),
                kind,
                f"{count:,}",
                _time(total),
                _time(exposed),
                f"{longest.blocks} × {longest.threads}" if longest.blocks else "",
            ]
            for name, kind, count, total, exposed, longest in rows[:_KERNELS]
        ],
    )
    if len(rows) > _KERNELS:
        print(f"and {len(rows) - _KERNELS} more")
    if gpu.communication_sms:
        print(f"communication takes up to {gpu.communication_sms} of {gpu.sms} SMs")


def _show_pieces(gpu: Exposure) -> None:
    from counterflow.trace import function_of

    if not gpu.pieces:
        return
    unknown = gpu.exposed_us - gpu.blocking_us - gpu.not_blocking_us
    print(
        f"\nof the exposed time compute waited for {_time(gpu.blocking_us)} µs and did not for "
        f"{_time(gpu.not_blocking_us)} µs; the trace does not tell of {_time(unknown)} µs"
    )
    print(f"exposed in {gpu.num_pieces:,} pieces, the longest:")
    print_table(
        ["kernel", "at µs", "µs", "phase", "compute that follows", "phase", "outcome"],
        [
            [
                short(", ".join(dict.fromkeys(map(function_of, p.kernels)))),
                _time(p.start_us),
                _time(p.length_us),
                short(", ".join(p.phases)),
                short(function_of(p.then)) if p.then else "none",
                short(p.then_phase),
                p.waited,
            ]
            for p in gpu.pieces[:_PIECES]
        ],
    )


def _show_phases(gpu: Exposure) -> None:
    if not gpu.phases:
        return
    print()
    print_table(
        [f"phase, by {gpu.phase_source}", "ranges", "compute µs", "communication µs", "exposed µs", "other µs"],
        [
            [
                short(p.name),
                f"{p.count:,}",
                *(_time(us) for us in (p.compute_us, p.communication_us, p.exposed_us, p.other_us)),
            ]
            for p in gpu.phases
        ],
    )


def _show_hiding(gpu: Exposure) -> None:
    if not gpu.hiding:
        return
    totals: dict[str, float] = {}
    for row in gpu.hiding:
        for share in row.under:
            totals[share.phase] = totals.get(share.phase, 0.0) + share.us
    largest = set(sorted(totals, key=lambda phase: -totals[phase])[:_COLUMNS])
    columns = [phase for phase in totals if phase in largest]
    rest = ["others"] if len(totals) > len(columns) else []
    rows = []
    for row in gpu.hiding:
        under = {share.phase: share.us for share in row.under}
        others = sum(us for phase, us in under.items() if phase not in largest)
        cells = [row.communication_us, row.exposed_us, *(under.get(phase, 0.0) for phase in columns), others]
        rows.append([short(row.name), *(_time(us) if us else "" for us in cells[: len(columns) + len(rest) + 2])])
    nameless = "compute of no phase" if gpu.phases else "compute"
    print("\nwhat hides which communication, µs:")
    print_table(["", "communication", "exposed", *(f"under {short(c) or nameless}" for c in columns), *rest], rows)


def _show_flights(gpu: Exposure) -> None:
    if not gpu.flights:
        return
    print("\nlow-latency transfers in flight, between the kernel that sends and the one that receives:")
    rows = [(f.name, f.count, f.flight_us, f.hidden_us, f.exposed_us) for f in gpu.flights]
    print_table(
        ["", "flights", "µs", "hidden under compute", "exposed"],
        [[name, f"{count:,}", *map(_time, times)] for name, count, *times in rows],
    )


def _time(us: float) -> str:
    return f"{us:,.3f}".rstrip("0").rstrip(".")


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else ""
