"""Files are written beside their place and then renamed, so a failed write leaves the old one whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, wholly or not at all; folders are made as needed.

    Raises:
        OSError: the folder cannot be made or written to.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "out" / "hello.txt"
        >>> write_text(path, "hello")
        >>> path.read_text()
        'hello'
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, wholly or not at all; folders are made as needed.

    Raises:
        OSError: the folder cannot be made or written to.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "out" / "hello.bin"
        >>> write_bytes(path, bytes(3))
        >>> path.read_bytes()
        b'\\x00\\x00\\x00'
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a pipe or device, such as /dev/stdout: to rename over it destroys it
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
