"""The block scan: finds the events that are wanted by their category, and decodes nothing else.

PyTorch writes every slice as ``{"ph": "X", "cat": "…", …``, with blanks that differ from version to version. The
first slice of a file tells its opening. Then every ``"X"`` in the file has to stand in that very opening, which is
checked for each; so no slice is missed, whatever stands in the strings. Where one does not, where keys come in
another order, or where a slice does not decode by itself, ``Unlike`` sends the reader to full decoding.

Not seen are letters of these few keys and categories written as \\u escapes, which no writer of traces does.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from counterflow.trace.collector import Collector
from counterflow.trace.events import LAUNCH, NEVER_LAUNCHING, WANTED, decode_events, lenient_event
from counterflow.trace.whole import MALFORMED

Positions = npt.NDArray[np.int64]

LONGEST_EVENT = 64 << 20
"""A slice with what follows it may be so long before the scan gives up."""

_OPENING = re.compile(rb'\{\s*"ph"\s*:\s*"X"\s*,\s*"cat"\s*:\s*"')
_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_CALL = re.compile(rb'\w+"\s*,\s*"name"\s*:\s*"(\w+)"')
_X = ord("X")
_QUOTE = ord('"')
_STEMS = 4  # the first letters of a category decide whether it is worth decoding
_WORK_STEMS, _LAUNCH_STEMS = (
    np.array(sorted({int.from_bytes(cat[:_STEMS].encode(), "little") for cat in cats}), dtype=np.uint32)
    for cats in (WANTED - LAUNCH, LAUNCH)
)

_BEGINNING = 8  # bytes of a call's name, one uint64
_IDLE = np.array([int.from_bytes(beginning.encode(), "little") for beginning in NEVER_LAUNCHING], dtype=np.uint64)


class Unlike(Exception):  # noqa: N818 - no error: the file is read in another way
    """The file is not formatted in the way that its first slice promised."""


class Opening:
    """How the slices of a file begin, up to the first letter of their category."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.mark = text.index(b'"X"') + 1

    @classmethod
    def of(cls, beginning: bytes) -> tuple[Opening, bytes] | None:
        """The opening and what stands before the events' key, read off the first block of a file."""
        events = _EVENTS.search(beginning)
        found = _OPENING.search(beginning, events.end()) if events else None
        return (cls(found.group()), beginning[: events.start()]) if events and found else None


class Scan:
    """Takes the text of a file, or of a stretch of it, block by block.

    Args:
        opening: how its slices begin.
        collector: takes the events.
        length: slices that begin after so many bytes belong to the next stretch; None: to the file's end.
        within: whether the text begins inside a file, where a slice of the stretch before may still stand.
    """

    def __init__(self, opening: Opening, collector: Collector, length: int | None = None, within: bool = False) -> None:
        self._opening = opening
        self._collector = collector
        self._left = length
        self._within = within
        self.tail = b""
        """What stands from the last slice on, which is not decoded yet."""
        self.begun = False
        """Whether a slice of this stretch has been met."""
        self.ended = False
        """Whether the slices of the next stretch have been reached."""

    def feed(self, block: bytes) -> None:
        """Take the next block.

        Raises:
            Unlike: the text is not formatted as its first slice.
        """
        text = self.tail + block
        starts = self._starts(text)
        if self._left is not None and len(starts) and starts[-1] >= self._left:
            starts = starts[: int(np.searchsorted(starts, self._left)) + 1]
            self.ended = True
        if len(starts):
            self._within, self.begun = False, True
            self._decode(text, starts)
            kept = int(starts[-1])
        else:
            kept = max(0, len(text) - len(self._opening.text) - _STEMS) if self._within else 0
        self.tail = text[kept:]
        if self._left is not None:
            self._left -= kept
        if len(self.tail) > LONGEST_EVENT:
            raise Unlike

    def _starts(self, text: bytes) -> Positions:
        """Where slices begin whose opening and stem stand in the text."""
        size = len(self._opening.text)
        codes = np.frombuffer(text, dtype=np.uint8)
        marks = np.flatnonzero(codes[: max(0, len(text) - (size - self._opening.mark) - _STEMS)] == _X)
        marks = marks[marks > 0]
        marks = marks[(codes[marks - 1] == _QUOTE) & (codes[marks + 1] == _QUOTE)]
        starts = marks - self._opening.mark
        if len(starts) and starts[0] < 0:
            if not self._within:
                raise Unlike
            starts = starts[starts >= 0]
        if len(starts):
            windows = np.lib.stride_tricks.sliding_window_view(codes, size)
            if not (windows[starts] == np.frombuffer(self._opening.text, dtype=np.uint8)).all():
                raise Unlike
        return np.asarray(starts, dtype=np.int64)

    def _decode(self, text: bytes, starts: Positions) -> None:
        """Decode every slice but the last, whose end is not known yet."""
        codes = np.frombuffer(text, dtype=np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(codes, _STEMS)
        stems = np.ascontiguousarray(windows[starts[:-1] + len(self._opening.text)]).view("<u4").ravel()
        if (stems.view(np.uint8) == ord("\\")).any():
            raise Unlike
        work = np.flatnonzero(np.isin(stems, _WORK_STEMS))
        calls = np.flatnonzero(np.isin(stems, _LAUNCH_STEMS))
        for which in (work, self._launching(text, codes, starts, calls)):
            stretches = zip(starts[which].tolist(), starts[which + 1].tolist(), strict=True)
            slices = [self._alone(text[start:following]) for start, following in stretches]
            if slices:
                self._take(slices)

    def _launching(self, text: bytes, codes: npt.NDArray[np.uint8], starts: Positions, calls: Positions) -> Positions:
        """Those of the calls on the CPU that launch, or may: most of a trace is calls that do not."""
        if not len(calls):
            return calls
        # Where the first call has its name after its category, nearly all have, and few names are many calls.
        size = len(self._opening.text)
        first = int(starts[calls[0]]) + size
        named = _CALL.match(text, first)
        if named is None:
            return calls
        before = np.frombuffer(text[first : named.start(1)], dtype=np.uint8)
        length = len(before) + _BEGINNING
        there = starts[calls] + size
        fits = there + length <= len(codes)
        windows = np.lib.stride_tricks.sliding_window_view(codes, length)[there[fits]]
        alike = (windows[:, : len(before)] == before).all(axis=1)
        beginnings = np.ascontiguousarray(windows[:, len(before) :]).view("<u8").ravel()
        idle = np.zeros(len(calls), dtype=bool)
        idle[fits] = alike & np.isin(beginnings, _IDLE)
        return calls[~idle]

    def _alone(self, text: bytes) -> bytes:
        """A slice without the events after it that are no slices."""
        following = text.find(b'"ph"', len(self._opening.text))
        return text[: text.rfind(b"}", 0, following if following >= 0 else len(text)) + 1]

    def _take(self, slices: list[bytes]) -> None:
        try:
            events = decode_events(b"[" + b",".join(slices) + b"]")
        except MALFORMED:
            events = []
        if len(events) == len(slices):
            self._collector.add(events)
            return
        try:
            self._collector.add([event for event in map(lenient_event, slices) if event is not None])
        except (ValueError, RecursionError):
            raise Unlike from None
