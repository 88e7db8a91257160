"""Full decoding: what the block scan falls back to, and what is left to do with a broken file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from counterflow.errors import TraceError
from counterflow.trace.collector import Collector
from counterflow.trace.events import Event, decode_events, event_of, exact, repaired

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises at text that is not what it should be."""

_EVENTS_KEY = re.compile(rb'"traceEvents"\s*:\s*\[')
_NEXT_EVENT = re.compile(r'\{\s*"(?:ph|name|cat|pid|tid|ts|dur|args|id)"\s*:')
_BETWEEN = re.compile(r"[\s,]*")
_MOST_ENDS = 8  # so many brackets are tried as the events' last one: each try reads the rest of the file
MOST_FAULTS = 1_000  # so many broken places are passed before the rest is given up
_WINDOW = 1 << 18
_DECODER = json.JSONDecoder(parse_float=exact)


_NOT_THERE = msgspec.Raw()


class _File(msgspec.Struct):
    traceEvents: msgspec.Raw = _NOT_THERE  # noqa: N815 - the key in the file
    deviceProperties: msgspec.Raw = _NOT_THERE  # noqa: N815
    distributedInfo: msgspec.Raw = _NOT_THERE  # noqa: N815
    baseTimeNanoseconds: msgspec.Raw = _NOT_THERE  # noqa: N815


@dataclass
class Head:
    """What stands beside the events in a trace; ``lost``: what stands before them is broken, and not in ``data``."""

    data: dict[str, Any] = field(default_factory=dict)
    broken: int = 0
    cut: bool = False
    lost: bool = False

    def precede(self, text: bytes) -> None:
        """Take what stands before the events, from the file's first brace to before their key."""
        try:
            data = json.loads(repaired(unmarked(text)).strip().removesuffix(",") + "}")
        except (ValueError, RecursionError):
            self.lost = True
        else:
            self.data = data | self.data


def read_whole(text: bytes, collector: Collector) -> Head:
    """Give all events of a trace's text to the collector.

    Raises:
        TraceError: the text holds no trace.
    """
    text = unmarked(text)
    if not text.strip():
        raise TraceError("the file is empty; give a trace as the PyTorch profiler writes it")
    try:
        return _decoded(text, collector)
    except MALFORMED:
        return recovered(text, collector)


def _decoded(text: bytes, collector: Collector) -> Head:
    if text.lstrip()[:1] == b"[":
        collector.add(decode_events(text))
        return Head()
    file = msgspec.json.decode(text, type=_File)
    if not bytes(file.traceEvents):
        raise TraceError('the file is JSON without "traceEvents"; give a trace as the PyTorch profiler writes it')
    beside = {
        key: msgspec.json.decode(value)
        for key in ("deviceProperties", "distributedInfo", "baseTimeNanoseconds")
        if bytes(value := getattr(file, key))
    }
    collector.add(decode_events(bytes(file.traceEvents)))  # last: what fails before it leaves the collector empty
    return Head(beside)


def recovered(text: bytes, collector: Collector) -> Head:
    """As ``read_whole``, event by event and past every fault.

    Raises:
        TraceError: the text holds no event.
    """
    found = _EVENTS_KEY.search(text)
    bare = text.lstrip()[:1] == b"["
    if found is None and not bare:
        raise TraceError(
            'the file is not JSON with "traceEvents" in it, or it ends before them; '
            "give a trace as the PyTorch profiler writes it"
        )
    start = text.index(b"[") + 1 if found is None else found.end()
    head = recover_events(text[start:], collector, closing="]" if bare else "]}")
    if bare and not len(collector.columns().names):
        raise TraceError("the file holds no event; give a trace as the PyTorch profiler writes it")
    if found is not None:
        head.precede(text[: found.start()])
    return head


def recover_events(text: bytes, collector: Collector, closing: str = "]}") -> Head:
    """Take the events from the text that follows an array's bracket, or begins at an event; the rest is the head."""
    head = Head(cut=True)
    batch: list[Event] = []
    for event in _walk(repaired(text), head):
        batch.append(event)
        if len(batch) == 10_000:
            collector.add(batch)
            batch.clear()
    collector.add(batch)
    if closing == "]" and head.cut:
        head.cut = not text.rstrip().endswith(b"]")
    return head


def _walk(text: str, head: Head) -> Iterator[Event]:
    position = ends = 0
    window = _Window(text)
    while True:
        position = _end(_BETWEEN.match(text, position))
        if position == len(text):
            return
        if text[position] == "]":
            ends += 1
            beside = _rest(text[position + 1 :]) if ends <= _MOST_ENDS else None
            if beside is not None:
                head.data, head.cut = beside, False
                return
        else:
            try:
                data, position = window.decode(position)
            except (ValueError, RecursionError):
                pass
            else:
                event = event_of(data)
                if event is not None:
                    yield event
                continue
        resumed = _NEXT_EVENT.search(text, position + 1)
        if resumed is None and text[position] == "]":  # the array ended, and what stands beside it was cut off
            return
        head.broken += 1
        if resumed is None:
            return
        if head.broken == MOST_FAULTS:
            head.cut = False
            return
        position = resumed.start()


class _Window:
    """Decodes values out of a long text through a part of it, for an error takes time in proportion to what it saw."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._start = 0
        self._part = text[:_WINDOW]

    def decode(self, position: int) -> tuple[Any, int]:
        """The value at a position, and where it ends.

        Raises:
            ValueError, RecursionError: there is none.
        """
        size = _WINDOW
        while True:
            try:
                value, end = _DECODER.raw_decode(self._part, position - self._start)
                return value, self._start + end
            except (ValueError, RecursionError) as error:
                if position == self._start:
                    if self._start + len(self._part) == len(self._text) or not _cut(error, len(self._part)):
                        raise
                    size *= 8
            self._start, self._part = position, self._text[position : position + size]


def _cut(error: Exception, size: int) -> bool:
    """Whether it may be only the end of the text that stood in the way."""
    return isinstance(error, json.JSONDecodeError) and (
        error.pos >= size - len("-Infinity") or error.msg.startswith("Unterminated")
    )


def _end(match: re.Match[str] | None) -> int:
    assert match is not None
    return match.end()


def _rest(text: str) -> dict[str, Any] | None:
    """What follows the events' closing bracket in a file that is whole."""
    text = text.strip()
    if not text:
        return {}
    try:
        data = json.loads("{" + text.removeprefix(","))
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def unmarked(text: bytes) -> bytes:
    """The text without the mark that some editors put before UTF-8."""
    return text.removeprefix(codecs.BOM_UTF8)
