"""Arrays out of safetensors files, with nothing but numpy."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterflow.errors import PlacementError

_DTYPES = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
}


class Safetensors(Mapping[str, NDArray[Any]]):
    """The tensors of a safetensors file, by name; one is decoded when it is asked for. BF16 becomes float32.

    Raises:
        PlacementError: ``data`` is no such file, or cut off; when asked for, a tensor whose type numpy does not know
            or whose place in the file does not fit its shape.

    Example:
        >>> import json, struct
        >>> from counterflow.experts.safetensors import Safetensors
        >>> header = json.dumps({"loads": {"dtype": "I16", "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
        >>> file = Safetensors(struct.pack("<Q", len(header)) + header + bytes([3, 0, 1, 0]))
        >>> list(file), file["loads"].tolist()
        (['loads'], [[3, 1]])

    Source: https://github.com/huggingface/safetensors, "Format": eight bytes with the length of a header in JSON, the
    header, and then the data of all tensors, little-endian.
    """

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise PlacementError("it is no safetensors file, or cut off; save it anew")
        try:
            header = json.loads(data[8 : 8 + length])
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise PlacementError("it is no safetensors file: what should be its header is no JSON object; save it anew")
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._data = memoryview(data)[8 + length :]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> NDArray[Any]:
        try:
            entry = self._entries[name]
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            known = np.dtype(_DTYPES[dtype]) if dtype in _DTYPES else None
            whole = all(type(size) is int and size >= 0 for size in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            raise PlacementError(
                f"its tensor {reprlib.repr(name)} is not described as it has to be; save it anew"
            ) from None
        if known is None:
            raise PlacementError(
                f"its tensor {reprlib.repr(name)} has type {reprlib.repr(dtype)}; "
                f"save it as one of {', '.join(_DTYPES)}"
            )
        if not whole or end > len(self._data) or end - start != math.prod(shape) * known.itemsize:
            raise PlacementError(f"its tensor {reprlib.repr(name)} is cut off or damaged; save it anew")
        array = np.frombuffer(self._data[start:end], dtype=known).reshape(shape)
        return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array
