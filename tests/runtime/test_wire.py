"""A value becomes text and tensors, and the same value again."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import PipelineError
from counterflow.runtime.wire import Structure, take_apart

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.cfloat,
]
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, st.sampled_from(DTYPES))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    tensors | plain,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left is right
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(values)
def test_what_is_taken_apart_is_put_together_as_it_was(value: Any) -> None:
    structure, parts = take_apart(value)
    assert same(structure.put_together(parts), value)


@given(values)
def test_what_is_announced_is_understood(value: Any) -> None:
    structure, parts = take_apart(value)
    heard = Structure.decode(structure.encode())
    assert heard == structure
    for leaf, part in zip(heard.leaves, parts, strict=True):
        empty = leaf.empty(torch.device("cpu"))
        assert (empty.shape, empty.dtype) == (part.shape, part.dtype)


def test_gradients_come_back_for_what_requires_one() -> None:
    weight = torch.ones(2, requires_grad=True)
    structure, _ = take_apart((weight, torch.ones(3), [weight * 2]))
    assert [leaf.requires_grad for leaf in structure.leaves] == [True, False, True]
    assert [str(leaf) for leaf in structure.gradient_leaves()] == ["float32[2]", "float32[2]"]
    assert str(structure) == "(float32[2] with gradient, float32[3], [float32[2] with gradient])"


class Pair(NamedTuple):
    left: int
    right: int


@pytest.mark.parametrize(
    ("value", "name"),
    [({1, 2}, "builtins.set"), (Pair(1, 2), f"{__name__}.Pair"), ({1: 2}, "builtins.dict"), (b"", "builtins.bytes")],
)
def test_anything_else_is_refused_in_one_sentence(value: object, name: str) -> None:
    with pytest.raises(PipelineError) as caught:
        take_apart([None, {"deep": (value,)}])
    assert str(caught.value) == (
        f"a {name} cannot flow through a pipeline; tensors, None, numbers, strings and booleans can, in tuples, lists "
        "and dicts with string keys: convert it first"
    )
