"""The bytes of a trace in blocks, whichever way they come and are packed; a broken end is told, not raised."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

from counterflow.errors import TraceError

BLOCK = 512 << 10
"""So many bytes are read at once: larger blocks leave the processor's cache, smaller ones are too many."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


STANDARD_INPUT = "-"
"""The path that stands for it, as in other programs."""


@contextmanager
def rereadable(path: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """The path, or that of a temporary copy where it is a pipe, which can be read only once, and only by one process.

    Raises:
        TraceError: the pipe cannot be read, or the copy not be written.
    """
    if os.fspath(path) != STANDARD_INPUT and not _flows(path):
        yield path
        return
    with NamedTemporaryFile(prefix="counterflow-") as copy:
        try:
            with _flow(path) as pipe:
                shutil.copyfileobj(pipe, copy, BLOCK)
            copy.flush()
            if not copy.tell() and os.fspath(path) == STANDARD_INPUT:
                raise TraceError("nothing came through standard input, which can be read once; give a trace, or a file")
        except OSError as error:
            raise TraceError(
                f"the pipe cannot be copied to {copy.name} ({error.strerror or error}); write the trace to a file, "
                "and give that"
            ) from None
        yield copy.name


def _flow(path: str | os.PathLike[str]) -> Any:
    if os.fspath(path) != STANDARD_INPUT:
        return opened(path)
    if sys.stdin is None:
        raise TraceError("there is no standard input; give a file")
    return open(sys.stdin.fileno(), "rb", closefd=False)


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file that can be read again and again; nothing is opened."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _flows(path: str | os.PathLike[str]) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # opening it will say so
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as gzip or zstd does.

    Raises:
        TraceError: the file cannot be read.
    """
    with opened(path) as file:
        return bytes(file.read(4)).startswith((_GZIP, _ZSTD))


def opened(path: str | os.PathLike[str]) -> Any:
    """The file, open for reading bytes.

    Raises:
        TraceError: the file cannot be read.
    """
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(
            f"the file cannot be read ({reason}); give a trace as the PyTorch profiler writes it"
        ) from None


class Source:
    """The text of a trace in blocks; what is wrong with its packing is found in ``warnings`` afterwards."""

    def __init__(self, path: str | os.PathLike[str], taken: Callable[[int], None] | None = None) -> None:
        self._path = path
        self._taken = taken
        self.warnings: list[str] = []

    def blocks(self) -> Iterator[bytes]:
        """The blocks, unpacked.

        Raises:
            TraceError: the file cannot be read, or zstd is needed and not installed.
        """
        with opened(self._path) as file:
            raw = self._raw(file)
            first = next(raw, b"")
            if first.startswith(_GZIP):
                yield from self._unpacked("gzip", _Gzip, first, raw, zlib.error)
            elif first.startswith(_ZSTD):
                zstd = _zstd()
                yield from self._unpacked("zstd", zstd.ZstdDecompressor, first, raw, zstd.ZstdError)
            else:
                yield first
                yield from raw

    def _raw(self, file: Any) -> Iterator[bytes]:
        try:
            while block := file.read(BLOCK):
                if self._taken:
                    self._taken(len(block))
                yield block
        except OSError as error:
            raise TraceError(f"the file cannot be read ({error.strerror}); give a trace") from None

    def _unpacked(
        self,
        packing: str,
        new: Callable[[], _Decompressor],
        first: bytes,
        raw: Iterator[bytes],
        failure: type[Exception],
    ) -> Iterator[bytes]:
        unpack, data = new(), first
        try:
            while True:
                text = unpack.decompress(data, BLOCK)
                if text:
                    yield text
                if unpack.eof:
                    data = unpack.unused_data or next(raw, b"")
                    if not data:
                        return
                    unpack = new()  # packed files may be joined end to end
                elif len(text) < BLOCK:
                    data = next(raw, b"")
                    if not data:
                        self.warnings.append(f"the {packing} file ends too early: what stands before its end was read")
                        return
                else:
                    data = b""
        except failure as error:
            self.warnings.append(f"the {packing} file is broken ({error}): what stands before the fault was read")


class _Gzip:
    """zlib's object, in the manner of the other packings: it keeps the input that it has not used yet."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self._left = b""

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        text = self._inner.decompress(self._left + data, max_length)
        self._left = self._inner.unconsumed_tail
        return text


def _zstd() -> Any:
    try:
        from backports import zstd
    except ImportError:
        try:
            from compression import zstd  # type: ignore[import-not-found,no-redef,unused-ignore]
        except ImportError:
            raise TraceError(
                "the trace is packed with zstd, which this Python cannot read; pip install 'counterflow[zstd]', "
                "or unpack it first"
            ) from None
    return zstd
