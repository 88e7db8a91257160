"""Placements in the files of those who serve: our own, SGLang's initial placement, vLLM's maps."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.placement import Placement
from counterflow.files import write_text


def write_served(path: str | os.PathLike[str], placement: Placement, kind: str = "counterflow") -> None:
    """Write ``placement`` as JSON of one ``kind``, wholly or not at all.

    ``"counterflow"`` is what ``write_placement`` writes. ``"sglang"`` is what its ``--init-expert-location`` takes:
    ``physical_to_logical_map`` [layers, slots], a row for every layer that its recorder counts, and no other key,
    for it refuses to start with one. ``"vllm"`` are the three maps that vLLM keeps: that one,
    ``logical_to_physical_map`` [layers, experts, redundant experts + 1], filled up with -1, and
    ``logical_replica_count`` [layers, experts].

    Raises:
        PlacementError: there is no such kind.
        OSError: the folder cannot be made or written to.

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow import Placement
        >>> from counterflow.experts import write_served
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "placement.json"
        >>> write_served(path, Placement([[0, 1, 0, 2]], num_experts=3, num_gpus=2), "sglang")
        >>> path.read_text()
        '{"physical_to_logical_map": [[0, 1, 0, 2]]}\\n'

    Source: SGLang, ``srt/eplb/expert_location.py``; vLLM, ``distributed/eplb/eplb_state.py``.
    """
    if kind not in WRITERS:
        raise PlacementError(f"the format is {reprlib.repr(kind)}; it has to be one of {', '.join(WRITERS)}")
    write_text(path, WRITERS[kind](placement))


def read_served(path: str | os.PathLike[str], num_gpus: int, num_nodes: int = 1) -> Placement:
    """The placement in a file of any kind that ``write_served`` writes.

    SGLang's and vLLM's do not say how many GPUs and nodes there are: ``num_gpus`` and ``num_nodes`` do. Ours does, and
    is read as it stands.

    Raises:
        PlacementError: it cannot be read, holds no valid placement, or maps that contradict each other; the message
            names the file.

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow.experts import read_served
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "placement.json"
        >>> _ = path.write_text('{"physical_to_logical_map": [[0, 1, 0, 2]]}')
        >>> read_served(path, num_gpus=2).logical_count.tolist()
        [[2, 1, 1]]
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlacementError(f"it is no JSON ({error}); give a placement") from None
        if isinstance(content, dict) and "physical_to_logical_map" in content:
            return _from_maps(content, num_gpus, num_nodes)
        return Placement.from_json(text)
    except OSError as error:
        raise PlacementError(f"{os.fspath(path)} cannot be read ({error.strerror}); give a placement") from None
    except (UnicodeDecodeError, PlacementError) as error:
        raise PlacementError(f"{os.fspath(path)}: {error}") from None


def _from_maps(content: dict[str, Any], num_gpus: int, num_nodes: int) -> Placement:
    slots = _numbers(content, "physical_to_logical_map", 2)
    experts = int(slots.max(initial=0)) + 1  # every expert has a slot, so the last one has
    placement = Placement(slots, experts, num_gpus, num_nodes)
    if "logical_replica_count" in content:
        _refuse_other(placement.logical_count, _numbers(content, "logical_replica_count", 2), "logical_replica_count")
    if "logical_to_physical_map" in content:
        where = _numbers(content, "logical_to_physical_map", 3)
        ours = placement.logical_to_physical
        width = max(where.shape[2], ours.shape[2])  # vLLM fills up to 1024, if need be
        _refuse_other(_filled(ours, width), _filled(where, width), "logical_to_physical_map")
    return placement


def _numbers(content: dict[str, Any], name: str, axes: int) -> Any:
    try:
        array = np.asarray(content[name])
    except (ValueError, OverflowError):
        raise PlacementError(f'the rows of its "{name}" are not of equal length; give it as it was written') from None
    if array.dtype.kind not in "iu" or array.ndim != axes:
        raise PlacementError(
            f'its "{name}" has type {array.dtype} and shape {list(array.shape)}; '
            f"it has to hold whole numbers in {axes} dimensions"
        )
    return array


def _filled(where: Any, width: int) -> Any:
    """The slots of each expert, ascending, filled up with -1 to ``width``."""
    end = np.iinfo(np.int64).max
    slots = np.full((*where.shape[:2], width), end)
    slots[:, :, : where.shape[2]] = np.where(where < 0, end, where)
    slots.sort(axis=2)
    return np.where(slots == end, -1, slots)


def _refuse_other(ours: Any, theirs: Any, name: str) -> None:
    if ours.shape != theirs.shape or not np.array_equal(ours, theirs):
        raise PlacementError(
            f'its "{name}" does not follow from its "physical_to_logical_map"; '
            f"leave it out, or write both from one placement"
        )


def _as_sglang(placement: Placement) -> str:
    return json.dumps({"physical_to_logical_map": placement.physical_to_logical.tolist()}) + "\n"


def _as_vllm(placement: Placement) -> str:
    return (
        json.dumps(
            {
                "physical_to_logical_map": placement.physical_to_logical.tolist(),
                "logical_to_physical_map": placement.logical_to_physical.tolist(),
                "logical_replica_count": placement.logical_count.tolist(),
            }
        )
        + "\n"
    )


WRITERS: dict[str, Callable[[Placement], str]] = {
    "counterflow": Placement.to_json,
    "sglang": _as_sglang,
    "vllm": _as_vllm,
}
