"""Expert loads and routes out of the files of SGLang's expert distribution recorder, which torch has to read."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterflow.errors import PlacementError
from counterflow.experts.routes import NO_EXPERT

Array = NDArray[Any]


def read_recorder(path: str | os.PathLike[str]) -> Array:
    """The tokens of each expert in every recorded step, [steps, layers, experts], on the CPU.

    ``path`` is a file of any of the recorder's modes, or a folder with those of all ranks: in the modes ``per_pass``
    and ``per_token`` each rank writes what it has seen itself, and what the ranks saw in one pass is added up. Nothing
    in a file can run code: torch reads it with ``weights_only``.

    Raises:
        PlacementError: it cannot be read, or is no such recording; the message names the file.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from counterflow.runtime.recorder import read_recorder
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "expert_distribution_recorder_1.0.pt"
        >>> torch.save({"rank": 0, "logical_count": torch.tensor([[[3, 1]]])}, path)
        >>> read_recorder(path).tolist()
        [[[3, 1]]]

    Source: SGLang, ``srt/eplb/expert_distribution.py``.
    """
    path = Path(path)
    recorded = _recorded(path)
    if all("logical_count" in content for _, content in recorded):
        return _joined(path, [_as_windows(_array(file, content, "logical_count")) for file, content in recorded])
    passes: dict[int, list[Array]] = defaultdict(list)
    for file, record, slots in _records(recorded):
        passes[record["forward_pass_id"]].append(
            _per_expert(file, _array(file, record, "global_physical_count"), slots)
        )
    return _joined(path, [_joined(path, passes[number]).sum(axis=0, keepdims=True) for number in sorted(passes)])


def read_recorded_routes(path: str | os.PathLike[str]) -> Array | None:
    """The logical experts that each token chose, int64 [tokens, layers, k], -1 where it chose none.

    Only the mode ``per_token`` records them: for a file or folder of another mode there are none, and None comes back.
    Tokens come rank by rank and pass by pass. The recorder writes slots; they become experts by the map that it wrote
    last, so there may be no rebalance while it records.

    Raises:
        PlacementError: as ``read_recorder``.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from counterflow.runtime.recorder import read_recorded_routes
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "expert_distribution_recorder_1.0_0.pt"
        >>> record = {"forward_pass_id": 1, "rank": 0, "topk_ids_of_layer": torch.tensor([[[2, 0], [1, -1]]])}
        >>> torch.save({"records": [record], "last_physical_to_logical_map": torch.tensor([[0, 1, 1]])}, path)
        >>> read_recorded_routes(path).tolist()
        [[[1, 0]], [[1, -1]]]

    Source: SGLang, ``srt/eplb/expert_distribution.py``.
    """
    path = Path(path)
    parts = [
        (record["rank"], record["forward_pass_id"], _experts_of(file, _array(file, record, "topk_ids_of_layer"), slots))
        for file, record, slots in _records([each for each in _recorded(path) if "records" in each[1]])
        if "topk_ids_of_layer" in record
    ]
    parts.sort(key=lambda part: part[:2])
    return _joined(path, [chosen.swapaxes(0, 1) for *_, chosen in parts]) if parts else None


def _recorded(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise PlacementError(f"{path} is a folder without .pt files; give a file or folder of SGLang's recorder")
    return [(file, _load(file)) for file in files]


def _records(recorded: list[tuple[Path, dict[str, Any]]]) -> Iterator[tuple[Path, dict[str, Any], Array]]:
    """Each record of a pass, with the expert of every slot [layers, slots] that its file ends with."""
    for file, content in recorded:
        records = content.get("records")
        if not isinstance(records, list) or not records:
            raise PlacementError(f'{file} has no "records"; record at least one pass, and in one mode only')
        slots = _array(file, content, "last_physical_to_logical_map")
        if slots.ndim != 2 or slots.dtype.kind not in "iu" or slots.size == 0 or slots.min() < 0:
            raise PlacementError(f"{file} says for no slot which expert it holds; give a file of SGLang's recorder")
        if slots.max() >= slots.shape[1]:  # every expert has a slot
            raise PlacementError(
                f"{file} has expert {slots.max()} in one of {slots.shape[1]} slots; give a file of SGLang's recorder"
            )
        for record in records:
            if not isinstance(record, dict) or not all(type(record.get(name)) is int for name in _NUMBERS):
                raise PlacementError(f"{file} has a record without {' and '.join(_NUMBERS)}; give it unchanged")
            yield file, record, slots


def _per_expert(file: Path, counts: Array, slots: Array) -> Array:
    """The counts [layers, slots] as [1, layers, experts]."""
    if counts.shape != slots.shape:
        raise PlacementError(
            f"{file} has counts of shape {list(counts.shape)} for {list(slots.shape)} slots; give it unchanged"
        )
    layers, experts = len(slots), int(slots.max()) + 1  # the last one has a slot, as all have
    total = np.zeros((1, layers, experts), dtype=counts.dtype)
    np.add.at(total[0], (np.arange(layers)[:, None], slots), counts)
    return total


def _experts_of(file: Path, chosen: Array, slots: Array) -> Array:
    """The experts of the slots ``chosen`` [layers, tokens, k], and -1 where that is."""
    if chosen.ndim != 3 or len(chosen) != len(slots) or chosen.dtype.kind not in "iu" or (chosen < NO_EXPERT).any():
        raise PlacementError(
            f"{file} has routes of shape {list(chosen.shape)} for {len(slots)} layers; give it unchanged"
        )
    if chosen.size and chosen.max() >= slots.shape[1]:
        raise PlacementError(
            f"{file} has routes to slot {chosen.max()} of {slots.shape[1]}: shared experts count there as well; "
            f"record with --disable-shared-experts-fusion"
        )
    experts = slots[np.arange(len(slots))[:, None, None], np.maximum(chosen, 0)]
    return np.where(chosen == NO_EXPERT, NO_EXPERT, experts).astype(np.int64)


def _as_windows(counts: Array) -> Array:
    return counts[None] if counts.ndim == 2 else counts


def _joined(path: Path, parts: list[Array]) -> Array:
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise PlacementError(f"{path} holds recordings of shapes {shapes[0]} and {shapes[1]}; give those of one model")
    return np.concatenate(parts)


def _load(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise PlacementError(f"{path} is read by torch, which is not installed; install counterflow[torch]") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch remarks upon how it was written
            recorded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise a dozen kinds for what is in a broken file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise PlacementError(
            f"{path} cannot be read as tensors ({reason}); give a file of SGLang's recorder, unchanged"
        ) from None
    if not isinstance(recorded, dict) or not {"logical_count", "records"} & set(recorded):
        raise PlacementError(
            f'{path} has no tensor "logical_count" and no "records"; give a file of SGLang\'s recorder, unchanged'
        )
    return recorded


def _array(path: Path, content: dict[str, Any], name: str) -> Array:
    import torch

    tensor = content.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise PlacementError(f'{path} has no tensor "{name}"; give a file of SGLang\'s recorder, unchanged')
    try:
        return np.asarray((tensor.detach().double() if tensor.is_floating_point() else tensor).numpy())
    except (TypeError, RuntimeError):  # sparse, quantized, or without any data
        raise PlacementError(
            f'{path} has a tensor "{name}" that is no array ({tensor.layout}, {tensor.dtype}, {tensor.device}); '
            f"give a file of SGLang's recorder, unchanged"
        ) from None


_NUMBERS = ("forward_pass_id", "rank")
