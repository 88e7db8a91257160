"""What ranks said to each other: collectives and point-to-point calls, with what a trace tells of their sizes.

PyTorch writes the process group, the element type and the number of elements beside NCCL kernels (in newer versions,
with ``record_shapes``) and beside gloo's ranges. Only events that carry these are decoded, in a pass of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from counterflow.trace.columns import GpuWork
from counterflow.trace.events import exact, repaired
from counterflow.trace.read import Trace, launch_of
from counterflow.trace.rules import function_of
from counterflow.trace.source import Source, is_regular

POINT_TO_POINT = frozenset({"send", "recv", "isend", "irecv", "coalesced", "batch_isend_irecv", "SendRecv"})
"""Names of what goes from one rank to another; every other message is a collective.

NCCL's ``SendRecv`` kernels also carry an all-to-all: it is told apart where the trace names the call.
"""

_LONGEST = 1 << 16
_MARK = re.compile(rb'"Collective name"|"name"\s*:\s*"gloo:')
_BEGINNING = re.compile(rb'\{\s*"(?:ph|name|cat|pid|tid|ts|dur|args|id)"\s*:')
_BASE = re.compile(rb'"baseTimeNanoseconds"\s*:\s*(-?\d{1,19})\b')
_KERNELS = (
    re.compile(r"[nr]ccl(?:Symk?)?(?:Dev)?Kernel_([A-Za-z]+)"),
    # As in 2021 (ncclAllReduceRingLLKernel_sum_f32), and RCCL's for everything (rcclGenericKernel).
    re.compile(r"[nr]ccl([A-Z][A-Za-z]*?)(?:(?:Ring|Tree|CollNet)[A-Za-z]*)?Kernel"),
)
_RANKS = re.compile(r"\d{1,6}")
_DECODER = json.JSONDecoder(parse_float=exact)
_BYTES = {
    "bool": 1, "byte": 1, "char": 1, "unsigned char": 1, "signed char": 1, "half": 2, "bfloat16": 2, "short": 2,
    "int": 4, "float": 4, "long": 8, "long int": 8, "double": 8, "complexfloat": 8,
}  # fmt: skip
"""Of one element, by torch's names; 8-bit floats begin alike."""


class Message(NamedTuple):
    """One side of a call: ``on_host`` where the time is that of the call on the CPU and no kernel's.

    ``group`` is the process group's name and ``ranks`` its members, empty where not told; ``size_bytes`` is what this
    rank put in, None where not told; ``sequence`` the number of the call in its group, -1 where not told.
    """

    name: str
    group: str
    ranks: tuple[int, ...]
    start_ns: int
    end_ns: int
    size_bytes: int | None
    on_host: bool
    sequence: int = -1

    @property
    def is_collective(self) -> bool:
        """Whether all ranks of a group take part."""
        return self.name not in POINT_TO_POINT


def messages(trace: Trace) -> list[Message]:
    """Every message of a rank in time; what the trace does not describe by the names of NCCL's kernels.

    The file is read once more for it. What came through a pipe is gone: only NCCL's kernels are left of it, without
    groups and sizes, and ``unheard`` says so.

    Example:
        >>> import json, tempfile, pathlib
        >>> from counterflow import open_trace
        >>> event = {"ph": "X", "cat": "user_annotation", "name": "gloo:all_reduce", "ts": 5, "dur": 2}
        >>> event["args"] = {"Input Dims": [[4, 8]], "Input type": ["float"]}
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> _ = path.write_text(json.dumps({"traceEvents": [event]}))
        >>> [(one.name, one.end_ns, one.size_bytes) for one in messages(open_trace(path))]
        [('all_reduce', 7000, 128)]
    """
    found = list(_described(trace.file)) if is_regular(trace.file) else []
    # Of calls that NCCL puts into one kernel the kernel tells nothing, beside others that do.
    described = {(one.start_ns, one.end_ns) for one in found if not one.on_host}
    kernels = [one for one in _by_kernel_names(trace) if (one.start_ns, one.end_ns) not in described]
    return sorted([*found, *kernels], key=lambda one: (one.start_ns, one.end_ns))


def unheard(traces: Iterable[Trace]) -> Iterator[str]:
    """A sentence for each trace whose messages cannot be read, for its file is not there any more."""
    for trace in traces:
        if not is_regular(trace.file):
            yield (
                f"{trace.file} cannot be read a second time, so the groups and sizes of its messages are not known: "
                "give a file in place of a pipe"
            )


def between_ranks(work: GpuWork, said: Sequence[Message]) -> npt.NDArray[np.bool_]:
    """Which pieces of work are the messages that go from one rank to another, shape [work]."""
    times = {(one.start_ns, one.end_ns) for one in said if not (one.on_host or one.is_collective)}
    which = np.isin(work.start_ns, [start for start, _ in times])
    for row in np.flatnonzero(which).tolist():
        which[row] = (int(work.start_ns[row]), int(work.end_ns[row])) in times
    return which


def _described(file: str) -> Iterator[Message]:
    base = 0
    events: list[dict[str, Any]] = []
    text, searched = b"", 0
    blocks = Source(file).blocks()
    for block in blocks:
        text += block
        for found in _BASE.finditer(block):
            base = int(found[1])
        searched = _take(text, searched, len(text) - _LONGEST, events)
        kept = max(0, searched - _LONGEST)
        text, searched = text[kept:], searched - kept
    _take(text, searched, len(text), events)
    for event in events:
        message = _message(event, base if abs(base) < 2**62 else 0)
        if message is not None:
            yield message


def _take(text: bytes, searched: int, limit: int, events: list[dict[str, Any]]) -> int:
    """Decode what is marked before ``limit``; returns how far the text has been searched."""
    while (mark := _MARK.search(text, searched)) and mark.start() < limit:
        searched = mark.end()
        # The innermost object may be the arguments; the event is the one round it.
        begins = [found.start() for found in _BEGINNING.finditer(text, max(0, mark.start() - _LONGEST), mark.end())]
        for begin in reversed(begins[-4:]):
            try:
                event, length = _DECODER.raw_decode(repaired(text[begin : begin + 2 * _LONGEST]))
            except (ValueError, RecursionError):
                continue
            if "ph" in event:
                events.append(event)
                searched = max(searched, begin + length)
                break
    return max(searched, min(limit, len(text)))


def _message(event: dict[str, Any], base_ns: int) -> Message | None:
    told = event.get("args")
    told = told if isinstance(told, dict) else {}
    name, cat = event.get("name"), event.get("cat")
    start, length = (_nanoseconds(event.get(key)) for key in ("ts", "dur"))
    if event.get("ph") != "X" or not isinstance(name, str) or start is None or length is None:
        return None
    when = base_ns + start, base_ns + start + length
    call = told.get("Collective name")
    if cat == "user_annotation" and name.startswith("gloo:"):
        return Message(_call(name), "", (), *when, _gloo_bytes(told), True)
    # The call of a collective on the CPU returns at once: only its kernel tells when it was.
    on_host = name == "record_param_comms" and call in POINT_TO_POINT
    if not isinstance(call, str) or not (on_host or cat == "kernel"):
        return None
    group, ranks, sequence = (told.get(key) for key in ("Process Group Name", "Process Group Ranks", "Seq"))
    members = tuple(map(int, _RANKS.findall(ranks))) if isinstance(ranks, str) and "..." not in ranks else ()
    number = sequence if type(sequence) is int and abs(sequence) < 2**62 else -1
    size = _bytes(told.get("In msg nelems"), told.get("dtype"))
    return Message(call, group if isinstance(group, str) else "", members, *when, size, on_host, number)


def _call(label: str) -> str:
    """``send`` of ``nccl:send 0->1``."""
    return label.partition(":")[2].partition(" ")[0]


def _nanoseconds(us: Any) -> int | None:
    known = type(us) in (int, float, Decimal) and -(2**50) < us < 2**50
    return round(us * 1000) if known else None


def _gloo_bytes(told: dict[str, Any]) -> int | None:
    shapes, types = told.get("Input Dims"), told.get("Input type")
    if not isinstance(shapes, list) or not isinstance(types, list) or len(shapes) != len(types):
        return None
    total = 0
    for shape, element in zip(shapes, types, strict=True):
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            return None
        size = _bytes(int(np.prod(shape, dtype=object)), element)
        if size is None:
            return None
        total += size
    return total


def _bytes(count: Any, element: Any) -> int | None:
    if type(count) is not int or not 0 <= count < 2**62 or not isinstance(element, str):
        return None
    plain = element.lower().removeprefix("c10::")
    each = 1 if plain.startswith("float8") else _BYTES.get(plain)
    return None if each is None else count * each


def _by_kernel_names(trace: Trace) -> Iterator[Message]:
    """NCCL's kernels, named by the call that launched them where that is annotated."""
    kernels = {name: call for name in np.unique(trace.work.name).tolist() if (call := _kernel(trace.names[name]))}
    rows = np.flatnonzero(np.isin(trace.work.name, list(kernels)))
    if not len(rows):
        return
    work = trace.work.rows(rows)
    launch = launch_of(work, trace.launches)
    calls = [
        (start, end, _call(trace.names[name]))
        for start, end, name, _, on_gpu, *_ in trace.annotations.tuples()
        if not on_gpu and trace.names[name].startswith("nccl:")
    ]
    starts = np.array([start for start, *_ in calls], dtype=np.int64)
    for row, at in enumerate(launch.tolist()):
        label = kernels[int(work.name[row])]
        if at >= 0 and len(calls):
            time = int(trace.launches.start_ns[at])
            _, end, call = calls[max(0, int(np.searchsorted(starts, time, side="right")) - 1)]
            label = call if time <= end and time >= starts[0] else label
        yield Message(label, "", (), int(work.start_ns[row]), int(work.end_ns[row]), None, False)


def _kernel(name: str) -> str | None:
    """What one of NCCL's kernels does by its name; RCCL has a generic one."""
    found = next((found for one in _KERNELS if (found := one.match(function_of(name)))), None)
    return None if found is None else found[1]
