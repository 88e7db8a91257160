"""Recorded loads out of files: NumPy's, a load tracker's, and what serving engines write as JSON."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.loads import Floats, as_loads
from counterflow.experts.tracker import LoadTracker


def read_loads(path: str | os.PathLike[str], key: str | None = None) -> Floats:
    """The recorded loads in a file, float64 [windows, layers, experts]; what has no windows is one window.

    It is told by its name: ``.npy``; ``.npz``, of which ``key`` names the array, or a ``LoadTracker``'s; ``.json``:
    nested lists, or an object that holds them under ``key`` or as ``"loads"``, SGLang's ``"logical_count"``, the
    ``"load_history"`` of ``"logical_expert_load"`` that was recorded with vLLM (ADRS), or the ``"per_layer_stats"``
    of a snapshot of vLLM.

    Raises:
        PlacementError: it cannot be read, or holds no loads (see ``as_loads``); the message names the file.

    Example:
        >>> import pathlib, tempfile
        >>> from counterflow.experts import read_loads
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "loads.json"
        >>> _ = path.write_text('{"load_history": [{"logical_expert_load": [[3, 1]]}]}')
        >>> read_loads(path).tolist()
        [[[3.0, 1.0]]]
    """
    path = Path(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise PlacementError(
            f"{path} ends in {path.suffix!r}; loads are read from .npy, .npz and .json: give such a file"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlacementError(f"{path} cannot be read ({error.strerror}); give a file with loads") from None
    if not data:
        raise PlacementError(f"{path} is empty; give a file with loads")
    try:
        return as_windows(reader(path, data, key))
    except PlacementError as error:
        raise PlacementError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def as_windows(loads: Any) -> Floats:
    """``loads`` as float64 [windows, layers, experts], where one or two dimensions are one window.

    Raises:
        PlacementError: they are none (see ``as_loads``); the message names the window.
    """
    if np.ndim(loads) != 3:
        return as_loads(loads)[None]
    if len(loads) == 0:
        raise PlacementError("the loads have 0 windows; record at least one")
    windows = []
    for number, window in enumerate(loads):
        try:
            windows.append(as_loads(window))
        except PlacementError as error:
            raise PlacementError(f"window {number}: {error}") from None
    return np.stack(windows)


def _from_npy(path: Path, data: bytes, key: str | None) -> Any:
    if key is not None:
        raise PlacementError(f"a .npy file has no array named {key!r}; leave the key out")
    return _load(data, "no .npy file")


def _from_npz(path: Path, data: bytes, key: str | None) -> Any:
    file = _load(data, "no .npz file")
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise PlacementError("it holds a single array; name it .npy")
    with file:
        names = file.files
        if key is None and {"format", "num_steps", "recent"} <= set(names):
            return LoadTracker.load(path).loads()
        if key is None:
            key = names[0] if len(names) == 1 else "loads"
        if key not in names:
            raise PlacementError(f"it has no array named {key!r} but {_listed(names)}; choose one of them")
        try:
            return file[key]
        except Exception as error:
            raise PlacementError(_broken(error, "cut off or damaged")) from None


def _load(data: bytes, what: str) -> Any:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy and zipfile raise a dozen kinds for what is in a broken file
        raise PlacementError(_broken(error, f"{what}, or cut off")) from None


def _broken(error: Exception, otherwise: str) -> str:
    if "Object arrays" in str(error):
        return "it holds Python objects, which could run code when read; save an array of numbers"
    if isinstance(error, MemoryError):
        return "it claims more numbers than fit into memory; save it anew"
    return f"it is {otherwise} ({type(error).__name__}); save it anew"


def _from_json(path: Path, data: bytes, key: str | None) -> Any:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PlacementError(f"it is no JSON ({reason}); write the loads as nested lists") from None
    if isinstance(content, dict):
        content = _from_object(content, key)
    elif key is not None:
        raise PlacementError(f"the JSON is no object with {key!r}; leave the key out")
    if not isinstance(content, list):
        what = "an object" if isinstance(content, dict) else "a single value"
        raise PlacementError(f"it holds {what}; write the loads as nested lists, [layers, experts]")
    try:
        return np.asarray(content)
    except (ValueError, OverflowError):
        raise PlacementError("its rows are not of equal length; give [layers, experts]") from None


def _from_object(content: dict[str, Any], key: str | None) -> Any:
    if key is None:
        key = next((name for name in _KNOWN if name in content), "loads")
    if key not in content:
        raise PlacementError(f"the JSON has no {key!r} but {_listed(content)}; choose one of them")
    part = _KNOWN.get(key)
    if part is None:
        return content[key]
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and part in entry for entry in entries):
        raise PlacementError(f"not every entry of {key!r} has {part!r}; give what was recorded, unchanged")
    return [entry[part] for entry in entries]


_KNOWN = {
    "loads": None,
    "logical_count": None,
    "load_history": "logical_expert_load",
    "per_layer_stats": "logical_load",
}
_READERS = {".npy": _from_npy, ".npz": _from_npz, ".json": _from_json}


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "") if shown else "none at all"
