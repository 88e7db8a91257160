"""A placement: which expert lies in which slot of which GPU, layer by layer, and what follows from it."""

from __future__ import annotations

import json
import operator
import os
import reprlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.certificate import Certificate
from counterflow.experts.loads import MOST_EXPERTS, Floats, Ints, as_loads
from counterflow.experts.peaks import gpu_loads
from counterflow.files import write_text

FORMAT = 1
HIERARCHIES = ("node", "none")

MOST_SLOTS = 2**22
"""Layers times replicas, a hundred times what any model has."""

MOST_ENTRIES = 2**28
"""Of a map from experts to slots: 2 GiB, a hundred times what any model needs."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The expert in every slot, for every layer.

    ``physical_to_logical`` is int64 [layers, slots]. Every GPU has equally many slots: slot ``s`` is on GPU
    ``s // (slots // num_gpus)``, GPU ``g`` on node ``g // (num_gpus // num_nodes)``. ``hierarchy`` says whether groups
    of experts were kept on one node (``"node"``) or not (``"none"``). ``certificate`` says how good it is for the
    loads it was made for; a placement read from elsewhere has none.

    Raises:
        PlacementError: slots that do not divide, an expert that does not exist, or one without a slot.

    Example:
        >>> from counterflow import Placement
        >>> placement = Placement([[0, 1, 0, 2]], num_experts=3, num_gpus=2)
        >>> placement.logical_count.tolist(), placement.logical_to_physical.tolist()
        ([[2, 1, 1]], [[[0, 2], [1, -1], [3, -1]]])
        >>> placement.gpu_loads([4, 3, 1]).tolist(), placement.balancedness([4, 3, 1]).tolist()
        ([[5.0, 3.0]], [0.8])
    """

    physical_to_logical: Ints
    num_experts: int
    num_gpus: int
    num_nodes: int = 1
    hierarchy: str = "none"
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_gpus", "num_nodes"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        hierarchy: Any = self.hierarchy
        if not isinstance(hierarchy, str) or hierarchy not in HIERARCHIES:
            raise PlacementError(f"the hierarchy is {reprlib.repr(hierarchy)}; it has to be 'node' or 'none'")
        slots = _as_slots(self.physical_to_logical)
        object.__setattr__(self, "physical_to_logical", slots)
        refuse_sizes(self.num_experts, slots.shape[1], self.num_gpus, self.num_nodes)
        if slots.min() < 0 or slots.max() >= self.num_experts:
            layer, slot = np.argwhere((slots < 0) | (slots >= self.num_experts))[0]
            raise PlacementError(
                f"slot {slot} of layer {layer} holds expert {slots[layer, slot]}; "
                f"experts are numbered from 0 to {self.num_experts - 1}: give one of them"
            )
        if (self.logical_count == 0).any():
            layer, expert = np.argwhere(self.logical_count == 0)[0]
            raise PlacementError(f"expert {expert} of layer {layer} has no slot; every expert needs at least one")
        slots.setflags(write=False)

    @property
    def num_layers(self) -> int:
        """How many layers it places."""
        return len(self.physical_to_logical)

    @property
    def num_slots(self) -> int:
        """How many physical experts a layer has."""
        return int(self.physical_to_logical.shape[1])

    @cached_property
    def logical_count(self) -> Ints:
        """The replicas of each expert, int64 [layers, experts]."""
        flat = self.physical_to_logical + np.arange(self.num_layers)[:, None] * self.num_experts
        size = self.num_layers * self.num_experts
        return np.bincount(flat.ravel(), minlength=size).reshape(self.num_layers, -1)

    @property
    def logical_to_physical(self) -> Ints:
        """The slots of each expert, ascending, int64 [layers, experts, width], filled up with -1.

        The width is slots - experts + 1, the most replicas that an expert can have: it follows from the sizes, so
        that buffers made once fit every placement of that size.
        """
        order = np.argsort(self.physical_to_logical, axis=1, kind="stable")
        expert = np.take_along_axis(self.physical_to_logical, order, axis=1)
        first = np.cumsum(self.logical_count, axis=1) - self.logical_count
        rank = np.arange(self.num_slots) - np.take_along_axis(first, expert, axis=1)
        where = unfilled_map(self.num_layers, self.num_experts, self.num_slots - self.num_experts + 1)
        where[np.arange(self.num_layers)[:, None], expert, rank] = order
        return where

    def gpu_loads(self, loads: object) -> Floats:
        """The load of every GPU, float64 [layers, gpus]: an expert's load is split evenly over its replicas.

        Raises:
            PlacementError: ``loads`` are none (see ``as_loads``), or of other layers and experts.
        """
        return gpu_loads(self._fitting(loads), self.physical_to_logical, self.num_gpus)

    def balancedness(self, loads: object) -> Floats:
        """Mean GPU load over largest GPU load, float64 [layers]: 1.0 is perfect, and what a layer without load has.

        Raises:
            PlacementError: as ``gpu_loads``.
        """
        gpu_loads = self.gpu_loads(loads)
        largest = gpu_loads.max(axis=1)
        even: Floats = np.divide(gpu_loads.mean(axis=1), largest, out=np.ones_like(largest), where=largest > 0)
        return np.asarray(np.minimum(even, 1.0))

    def _fitting(self, loads: object) -> Floats:
        load = as_loads(loads)
        if load.shape != self.logical_count.shape:
            raise PlacementError(
                f"the loads are for {load.shape[0]} layers and {load.shape[1]} experts, "
                f"the placement for {self.num_layers} and {self.num_experts}: give loads of the same model"
            )
        return load

    def to_json(self) -> str:
        """The placement as text; its certificate, which belongs to the loads as well, is left out.

        Example:
            >>> from counterflow import Placement
            >>> placement = Placement([[0, 1, 0, 2]], num_experts=3, num_gpus=2)
            >>> Placement.from_json(placement.to_json()).physical_to_logical.tolist()
            [[0, 1, 0, 2]]
        """
        return (
            json.dumps(
                {
                    "format": FORMAT,
                    "num_experts": self.num_experts,
                    "num_gpus": self.num_gpus,
                    "num_nodes": self.num_nodes,
                    "hierarchy": self.hierarchy,
                    "physical_to_logical": self.physical_to_logical.tolist(),
                }
            )
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """The opposite of ``to_json``.

        Raises:
            PlacementError: not JSON, not a placement, or not a valid one.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlacementError(f"the placement is not JSON ({error}); write it with to_json") from None
        needed = ("physical_to_logical", "num_experts", "num_gpus", "num_nodes", "hierarchy")
        missing = [key for key in needed if key not in data] if isinstance(data, dict) else list(needed)
        if missing:
            raise PlacementError(f'a placement in JSON needs "{missing[0]}"; write one with to_json')
        if data.get("format", FORMAT) != FORMAT:
            raise PlacementError(
                f"the placement has format {reprlib.repr(data['format'])}; this version reads format {FORMAT}"
            )
        return cls(**{key: data[key] for key in needed})


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """The placement in a file that ``write_placement`` wrote.

    Raises:
        PlacementError: it cannot be read, or holds no valid placement; the message names the file.
    """
    try:
        return Placement.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PlacementError) as error:
        raise PlacementError(f"{os.fspath(path)}: {error}") from None


def write_placement(path: str | os.PathLike[str], placement: Placement) -> None:
    """Write ``placement`` as JSON, wholly or not at all.

    Raises:
        OSError: the folder cannot be made or written to.

    Example:
        >>> import tempfile, pathlib
        >>> from counterflow.experts import Placement, read_placement, write_placement
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "placement.json"
        >>> write_placement(path, Placement([[0, 1, 0, 2]], num_experts=3, num_gpus=2))
        >>> read_placement(path).num_slots
        4
    """
    write_text(path, placement.to_json())


def whole_number(name: str, value: Any) -> int:
    """``value`` as an int from 1 to ``MOST_EXPERTS``.

    Raises:
        PlacementError: it is none.
    """
    try:
        number = operator.index(value)
    except Exception:  # a tensor without data raises RuntimeError: the caller is owed one sentence all the same
        number = 0
    if isinstance(value, bool | np.bool_) or not 1 <= number <= MOST_EXPERTS:
        raise PlacementError(f"{name} is {reprlib.repr(value)}; it has to be a whole number from 1 to {MOST_EXPERTS}")
    return number


def refuse_sizes(num_experts: int, num_replicas: int, num_gpus: int, num_nodes: int, num_groups: int = 1) -> None:
    """Raise PlacementError where the replicas do not hold the experts, or anything does not divide."""
    if num_replicas < num_experts:
        problem = f"{num_replicas} replicas cannot hold {num_experts} experts: give at least {num_experts}"
    elif num_replicas % num_gpus:
        fitting = -(-num_replicas // num_gpus) * num_gpus
        problem = f"{num_replicas} replicas do not divide over {num_gpus} GPUs: give {fitting}, or another multiple"
    elif num_gpus % num_nodes:
        problem = f"{num_gpus} GPUs do not divide over {num_nodes} nodes: give a multiple of {num_nodes}"
    elif num_experts % num_groups:
        problem = f"{num_experts} experts do not divide into {num_groups} groups: give a divisor of {num_experts}"
    else:
        return
    raise PlacementError(problem)


def refuse_slots(num_layers: int, num_replicas: int) -> None:
    """Raise PlacementError where there are more slots than can be meant."""
    if num_layers * num_replicas > MOST_SLOTS:
        raise PlacementError(
            f"{num_layers} layers of {num_replicas} replicas are too many slots; give at most {MOST_SLOTS} in all"
        )


def unfilled_map(num_layers: int, num_experts: int, width: int) -> Ints:
    """Room for the slots of each expert, all of it -1 [layers, experts, width].

    Raises:
        PlacementError: it would be more than can be meant, and most of it empty.
    """
    if num_layers * num_experts * width > MOST_ENTRIES:
        raise PlacementError(
            f"a map of {num_layers} layers, {num_experts} experts and {width} replicas of one is too large; "
            f"give fewer replicas, for at most {MOST_ENTRIES} entries"
        )
    return np.full((num_layers, num_experts, width), -1, dtype=np.int64)


def _as_slots(value: Any) -> Ints:
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except Exception as error:  # whatever it is: the caller is owed one sentence about it
        raise PlacementError(
            f"physical_to_logical, a {type(value).__name__}, is no array; give rows of equal length, [layers, slots]"
        ) from error
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.size == 0:
        raise PlacementError(
            f"physical_to_logical has type {array.dtype} and shape {list(array.shape)}; "
            f"give the number of an expert for every slot, [layers, slots]"
        )
    return array.astype(np.int64)
