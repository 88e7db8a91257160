"""What flows between stages: any nesting of tensors, taken apart to be sent and put together again.

A value becomes its ``Structure`` (plain JSON, which the receiver learns once) and a flat list of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counterflow.errors import PipelineError


@dataclass(frozen=True)
class Leaf:
    """One tensor of a structure: shape, dtype (``"float32"``), and whether a gradient comes back for it."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Leaf:
        """The description of ``tensor``."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        """A tensor of this shape and dtype with arbitrary contents."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Structure:
    """The nesting of a value as text, and its tensors in order.

    Example:
        >>> structure, tensors = take_apart({"hidden": torch.ones(2, 3), "mask": None})
        >>> [str(leaf) for leaf in structure.leaves], len(tensors)
        (['float32[2, 3]'], 1)
        >>> structure.put_together(tensors)["mask"] is None
        True
    """

    nesting: str
    leaves: tuple[Leaf, ...]

    def encode(self) -> bytes:
        """What a sender announces."""
        leaves = [[leaf.shape, leaf.dtype, leaf.requires_grad] for leaf in self.leaves]
        return json.dumps([self.nesting, leaves]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Structure:
        """The opposite of ``encode``."""
        nesting, leaves = json.loads(data)
        return cls(nesting, tuple(Leaf(tuple(shape), dtype, grad) for shape, dtype, grad in leaves))

    def put_together(self, tensors: list[Tensor]) -> Any:
        """The value with these tensors in the places of its own."""
        return _put_together(json.loads(self.nesting), tensors)

    def gradient_leaves(self) -> list[Leaf]:
        """The tensors for which a gradient comes back, in order."""
        return [leaf for leaf in self.leaves if leaf.requires_grad]

    def __str__(self) -> str:
        return _write(json.loads(self.nesting), self.leaves)


def take_apart(value: Any) -> tuple[Structure, list[Tensor]]:
    """The structure of ``value`` and its tensors.

    Tensors, None, numbers, strings and booleans may stand in tuples, lists and dicts with string keys.

    Raises:
        PipelineError: anything else stands in it.
    """
    tensors: list[Tensor] = []
    nesting = json.dumps(_take_apart(value, tensors))
    return Structure(nesting, tuple(Leaf.of(tensor) for tensor in tensors)), tensors


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of ``value``, in order.

    Raises:
        PipelineError: as ``take_apart``.
    """
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with_tensors(value, keep)
    return tensors


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting, with ``change`` of each tensor in its place, called in their order.

    Raises:
        PipelineError: as ``take_apart``.
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(with_tensors(item, change) for item in value)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: with_tensors(item, change) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise _cannot_flow(value)


def _take_apart(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_take_apart(item, tensors) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _take_apart(item, tensors) for key, item in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise _cannot_flow(value)


def _cannot_flow(value: Any) -> PipelineError:
    return PipelineError(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot flow through a pipeline; tensors, None, "
        "numbers, strings and booleans can, in tuples, lists and dicts with string keys: convert it first"
    )


def _write(nesting: dict[str, Any], leaves: tuple[Leaf, ...]) -> str:
    ((kind, content),) = nesting.items()
    match kind:
        case "tensor":
            return f"{leaves[content]}{' with gradient' if leaves[content].requires_grad else ''}"
        case "tuple" | "list":
            items = ", ".join(_write(item, leaves) for item in content)
            return f"({items})" if kind == "tuple" else f"[{items}]"
        case "dict":
            return "{" + ", ".join(f"{key!r}: {_write(item, leaves)}" for key, item in content.items()) + "}"
    return repr(content)


def _put_together(nesting: dict[str, Any], tensors: list[Tensor]) -> Any:
    ((kind, content),) = nesting.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "tuple":
            return tuple(_put_together(item, tensors) for item in content)
        case "list":
            return [_put_together(item, tensors) for item in content]
        case "dict":
            return {key: _put_together(item, tensors) for key, item in content.items()}
    return content
