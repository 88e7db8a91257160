"""Recorded loads and routes out of files: NumPy's, a load tracker's, and what serving engines write."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.loads import MOST_EXPERTS, Floats, Ints, as_loads
from counterflow.experts.routes import as_routes
from counterflow.experts.safetensors import Safetensors
from counterflow.experts.tracker import LoadTracker


def read_loads(path: str | os.PathLike[str], key: str | None = None) -> Floats:
    """The recorded loads in a file, float64 [windows, layers, experts]; what has no windows is one window.

    It is told by its name: ``.npy``; ``.npz`` and ``.safetensors``, of which ``key`` names the array, or a
    ``LoadTracker``'s; ``.json``: nested lists, or an object that holds them under ``key`` or as ``"loads"``, SGLang's
    ``"logical_count"``, the ``"load_history"`` of ``"logical_expert_load"`` that was recorded with vLLM (ADRS), or the
    ``"per_layer_stats"`` of a snapshot of vLLM. A folder is TensorRT-LLM's expert statistic: a ``.safetensors`` for
    each rank, whose counts are added up, with a tensor for each iteration and layer.

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
    ranks = sorted(path.glob("rank*.safetensors"))
    if ranks:
        return _sum_over_ranks(path, [read_loads(rank, key) for rank in ranks])
    reader = _READERS.get(path.suffix)
    if reader is None and path.is_dir():
        raise PlacementError(f"{path} is a folder without the rank0.safetensors of an expert statistic; give a file")
    if reader is None:
        raise PlacementError(
            f"{path} ends in {path.suffix!r}; loads are read from .npy, .npz, .json and .safetensors: give such a file"
        )
    data = _read_bytes(path, "loads")
    with _about(path):
        return as_windows(reader(path, data, key))


def read_routes(path: str | os.PathLike[str]) -> Ints:
    """The logical experts that each token chose, int64 [tokens, layers, k], and -1 where it chose none.

    They are the array of a ``.npy``, or ``"routes"`` of a ``.npz``, ``.json`` or ``.safetensors``; [tokens, k] is one
    layer. The ``routed_experts`` that vLLM and SGLang return with a request have this shape.

    Raises:
        PlacementError: it cannot be read, or holds no routes; the message names the file.

    Example:
        >>> import pathlib, tempfile
        >>> from counterflow.experts import read_routes
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "recorded.json"
        >>> _ = path.write_text('{"loads": [[1, 2, 0, 1]], "routes": [[[0, 1]], [[1, 3]]]}')
        >>> read_routes(path).shape
        (2, 1, 2)
    """
    path = Path(path)
    if path.suffix == ".npy":
        data = _read_bytes(path, "routes")
        with _about(path):
            return _as_routes(_from_npy(path, data, None))
    routes = find_routes(path)
    if routes is None:
        raise PlacementError(f"{path} holds no routes; give a .npy, or a .npz, .json or .safetensors with 'routes'")
    return routes


def find_routes(path: str | os.PathLike[str]) -> Ints | None:
    """What ``read_routes`` reads, or None where ``path`` holds loads alone.

    Raises:
        PlacementError: it cannot be read, or its ``"routes"`` are none; the message names the file.
    """
    path = Path(path)
    if path.suffix not in _NAMED:
        return None
    data = _read_bytes(path, "routes")
    with _about(path):
        named = _NAMED[path.suffix](data)
        return _as_routes(_array(named, "routes")) if isinstance(named, Mapping) and "routes" in named else None


def _as_routes(value: Any) -> Ints:
    try:
        array = np.asarray(value)
    except ValueError:
        raise PlacementError("the routes are not of equal length; give [tokens, layers, k]") from None
    return as_routes(array[:, None] if array.ndim == 2 else array, MOST_EXPERTS)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """An error inside it names the file, if it does not yet."""
    try:
        yield
    except PlacementError as error:
        raise PlacementError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _read_bytes(path: Path, what: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlacementError(f"{path} cannot be read ({error.strerror}); give a file with {what}") from None
    if not data:
        raise PlacementError(f"{path} is empty; give a file with {what}")
    return data


def _sum_over_ranks(path: Path, counts: list[Floats]) -> Floats:
    for rank, count in enumerate(counts):
        if count.shape != counts[0].shape:
            raise PlacementError(
                f"{path}: the files of rank 0 and {rank} hold {list(counts[0].shape)} and {list(count.shape)} counts, "
                f"[iterations, layers, experts]; give those of one recording"
            )
    return np.asarray(np.sum(counts, axis=0))


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
    array = _load(data, "no .npy file")
    if isinstance(array, np.lib.npyio.NpzFile):
        raise PlacementError("it holds named arrays; name it .npz")
    return array


def _from_npz(path: Path, data: bytes, key: str | None) -> Any:
    arrays = _arrays(data)
    if key is None and {"format", "num_steps", "recent"} <= set(arrays):
        return LoadTracker.load(path).loads()
    return _array(arrays, key)


def _arrays(data: bytes) -> Mapping[str, Any]:
    file = _load(data, "no .npz file")
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise PlacementError("it holds a single array; name it .npy")
    return file


def _array(arrays: Mapping[str, Any], key: str | None) -> Any:
    """The array called ``key``, or the only one, or ``"loads"``."""
    if key is None:
        key = next(iter(arrays)) if len(arrays) == 1 else "loads"
    if key not in arrays:
        raise PlacementError(f"it has no array named {key!r} but {_listed(arrays)}; choose one of them")
    try:
        return arrays[key]
    except PlacementError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds for what is in a broken file
        raise PlacementError(_broken(error, "cut off or damaged")) from None


def _from_safetensors(path: Path, data: bytes, key: str | None) -> Any:
    tensors = Safetensors(data)
    if key is None and tensors and all(_ITERATION_AND_LAYER.fullmatch(name) for name in tensors):
        return _by_iteration(tensors)
    return _array(tensors, key)


def _by_iteration(tensors: Safetensors) -> Any:
    """[iterations, layers, experts] of tensors called iteration_layer, as TensorRT-LLM writes them."""
    numbers = {tuple(map(int, name.split("_"))): name for name in tensors}
    iterations, layers = (sorted({number[axis] for number in numbers}) for axis in (0, 1))
    missing = [f"{i}_{layer}" for i in iterations for layer in layers if (i, layer) not in numbers]
    if missing:
        raise PlacementError(f"it has no tensor {missing[0]!r} among those of iterations and layers; record it anew")
    try:
        return np.stack([np.stack([tensors[numbers[i, layer]] for layer in layers]) for i in iterations])
    except PlacementError:
        raise
    except ValueError:
        raise PlacementError("its tensors are not of one shape, [experts]; record it anew") from None


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
    content = _parsed(data)
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


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PlacementError(f"it is no JSON ({reason}); write the loads as nested lists") from None


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
_READERS = {".npy": _from_npy, ".npz": _from_npz, ".json": _from_json, ".safetensors": _from_safetensors}
_NAMED: dict[str, Callable[[bytes], Any]] = {".npz": _arrays, ".json": _parsed, ".safetensors": Safetensors}
_ITERATION_AND_LAYER = re.compile(r"\d{1,18}_\d{1,18}", re.ASCII)


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "") if shown else "none at all"
