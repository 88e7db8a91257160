"""One event of a trace: which are read, what of them, strictly and leniently.

Times are microseconds, whole or with a fraction, as in the file.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from math import nan
from typing import Any, cast

import msgspec

from counterflow.timeline import LANE
from counterflow.trace.columns import KERNEL, MEMCPY, MEMSET, UNKNOWN

WORK = {
    "kernel": KERNEL,
    "Kernel": KERNEL,
    "gpu_memcpy": MEMCPY,
    "Memcpy": MEMCPY,
    "gpu_memset": MEMSET,
    "Memset": MEMSET,
}
LAUNCH = frozenset({"cuda_runtime", "cuda_driver", "hip_runtime", "xpu_runtime", "Runtime"})
ANNOTATION = {"user_annotation": 0, "gpu_user_annotation": 1}
LAUNCHING = ("aunch", "emcpy", "emset")
"""A call on the CPU launches GPU work if its name has one of these in it; the other calls are most of a trace."""
NEVER_LAUNCHING = (
    *("cudaDevi", "cudaEven", "cudaFunc", "cudaGetD", "cudaOccu", "cudaPeek", "cudaPoin", "cudaStre", "cuStream"),
    *("hipDevic", "hipEvent", "hipFuncG", "hipGetDe", "hipGetLa", "hipPoint", "hipStrea"),
)
"""How the names of the other calls begin, in eight letters; it decides before what is in the name."""
WANTED = frozenset({*WORK, *LAUNCH, *ANNOTATION})
"""The categories (``cat``) that are read; "Kernel", "Runtime" and their like are those of 2021."""

FURTHEST_NS = 2**62
"""int64 holds the difference of any two such times."""
EXACT_US = 2.0**42
"""From here on a double no longer tells the nanoseconds of a time in microseconds."""

Number = int | float | Decimal


class Arguments(msgspec.Struct, gc=False, rename={"lane": LANE}):
    """What is read of an event's ``args``; only counterflow's own timelines tell a lane."""

    device: int | None = None
    stream: int | None = None
    correlation: int = UNKNOWN
    grid: list[int] | None = None
    block: list[int] | None = None
    lane: str | None = None


class Event(msgspec.Struct, gc=False):
    """What is read of an event."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: int | float | None = None
    dur: int | float | None = None
    pid: int | str = 0
    tid: int | str = 0
    args: Arguments | None = None


class _ExactEvent(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: Decimal | None = None
    dur: Decimal | None = None
    pid: int | str = 0
    tid: int | str = 0
    args: Arguments | None = None


_EVENTS = msgspec.json.Decoder(list[Event])
_EXACT_EVENTS = msgspec.json.Decoder(list[_ExactEvent])


def decode_events(array: bytes) -> list[Event]:
    """The events of a JSON array, with all the digits that their times have.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError: the array is not one of well-formed events.
    """
    events = _EVENTS.decode(array)
    inexact = [type(event.ts) is float and not -EXACT_US < event.ts < EXACT_US for event in events]
    if any(inexact):
        return cast(list[Event], _EXACT_EVENTS.decode(array))
    return events


_SPACES = bytes(c if c >= 0x20 else 0x20 for c in range(256))
_SIGNS = tuple(before + word for before in (b":", b" ", b"-") for word in (b"inf", b"nan"))
_NO_NUMBER = re.compile(rb'(?<!\\)(" *: *)-?(?:inf|nan)(?= *[,}])')


def repaired(text: bytes) -> str:
    """The text as a lenient reader takes it: control characters are blanks, broken UTF-8 is replaced.

    C's ``inf`` and ``nan``, which profilers of 2021 wrote as the bandwidth of copies without length, are null.
    """
    text = text.translate(_SPACES)
    if any(sign in text for sign in _SIGNS):  # the pattern itself takes four times as long to miss
        text = _NO_NUMBER.sub(rb"\1null", text)
    return text.decode("utf-8", errors="replace")


def launches(name: str) -> bool:
    """Whether a call of this name launches GPU work.

    Example:
        >>> launches("cudaGraphLaunch"), launches("hipMemcpyAsync"), launches("cudaEventRecord")
        (True, True, False)
    """
    return name[:8] not in NEVER_LAUNCHING and any(part in name for part in LAUNCHING)


def event_of(data: object) -> Event | None:
    """The event in a decoded object, read leniently; None if it is none that we want.

    What is malformed in it counts as not told.
    """
    if not isinstance(data, dict) or data.get("ph") != "X":
        return None
    cat, name = data.get("cat"), data.get("name")
    if not isinstance(cat, str) or cat not in WANTED:
        return None
    event = Event("X", cat, name if isinstance(name, str) else "")
    event.ts, event.dur = (_number(data.get(key)) for key in ("ts", "dur"))  # type: ignore[assignment]
    event.pid, event.tid = (v if type(v) in (int, str) else 0 for v in (data.get("pid"), data.get("tid")))  # type: ignore[assignment]
    arguments = data.get("args")
    if isinstance(arguments, dict):
        event.args = Arguments(
            device=_whole(arguments.get("device")),
            stream=_whole(arguments.get("stream")),
            correlation=_first(_whole(arguments.get("correlation")), UNKNOWN),
            grid=_sizes(arguments.get("grid")),
            block=_sizes(arguments.get("block")),
            lane=lane if isinstance(lane := arguments.get(LANE), str) else None,
        )
    return event


def lenient_event(text: bytes) -> Event | None:
    """As ``event_of``, of an event's own text.

    Raises:
        ValueError, RecursionError: it is not the text of one JSON value.
    """
    return event_of(json.loads(repaired(text), parse_float=exact))


def exact(text: str) -> Decimal | float:
    """A number with all its digits, or NaN where it has more than any time.

    Example:
        >>> exact("1699999999123456.789")
        Decimal('1699999999123456.789')
    """
    try:
        return Decimal(text)
    except ArithmeticError:
        return nan


def _number(value: Any) -> Number | None:
    return value if type(value) in (int, float, Decimal) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < FURTHEST_NS else None


def _first(value: int | None, other: int) -> int:
    return other if value is None else value


def _sizes(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and all(_whole(size) is not None for size in value) else None
