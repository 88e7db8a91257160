"""Loads and routes out of files that need no package but numpy: safetensors, TensorRT-LLM's statistic, routes."""

import io
import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from counterflow.errors import PlacementError
from counterflow.experts import read_loads, read_routes
from counterflow.experts.recordings import find_routes
from counterflow.experts.safetensors import Safetensors

NAMES = {"?": "BOOL", "u1": "U8", "i1": "I8", "u2": "U16", "i2": "I16", "u4": "U32", "i4": "I32", "u8": "U64"} | {
    "i8": "I64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
}


def safetensors(arrays: Mapping[str, np.ndarray], **header: Any) -> bytes:
    """The format as its documentation has it: length, header, data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        raw = array.tobytes()
        entries[name] = {
            "dtype": NAMES[array.dtype.str[1:] if array.dtype.kind != "b" else "?"],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(entries | header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- safetensors --------------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.text(max_size=3).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(NAMES)).flatmap(lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, min_side=0))),
        max_size=3,
    )
)
def test_every_tensor_is_read_as_it_was_written(arrays: dict[str, np.ndarray]) -> None:
    file = Safetensors(safetensors(arrays))
    assert list(file) == list(arrays)
    for name, array in arrays.items():
        assert file[name].dtype == array.dtype
        np.testing.assert_array_equal(file[name], array)


def test_brain_floats_become_floats() -> None:
    header = {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    upper_halves = b"".join(np.float32(value).tobytes()[2:] for value in (1.0, -2.5))
    file = Safetensors(safetensors({}, **header) + upper_halves)
    assert file["x"].tolist() == [1.0, -2.5]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it is no safetensors file, or cut off; save it anew"),
        (b"\xff" * 40, "it is no safetensors file, or cut off; save it anew"),
        (struct.pack("<Q", 2) + b"[]", "it is no safetensors file: what should be its header is no JSON object"),
        (struct.pack("<Q", 2) + b"{x", "it is no safetensors file: what should be its header is no JSON object"),
        (safetensors({"x": np.ones(4)})[:-1], "its tensor 'x' is cut off or damaged; save it anew"),
        (safetensors({}, x={"dtype": "F64", "shape": [2**70], "data_offsets": [0, 8]}), "its tensor 'x' is cut off or"),
        (safetensors({}, x={"dtype": "F64", "shape": [-1], "data_offsets": [0, -8]}), "its tensor 'x' is cut off or"),
        (safetensors({}, x={"dtype": "F64", "shape": [0.5], "data_offsets": [0, 4]}), "its tensor 'x' is cut off or"),
        (
            safetensors({}, x={"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}),
            "its tensor 'x' has type 'F8_E4M",
        ),
        (safetensors({}, x={"dtype": [], "shape": [0], "data_offsets": [0, 0]}), "its tensor 'x' is not described as"),
        (safetensors({}, x={"dtype": "F64", "shape": 3}), "its tensor 'x' is not described as it has to be"),
        (safetensors({}, x=7), "its tensor 'x' is not described as it has to be"),
    ],
)
def test_a_broken_file_is_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(PlacementError) as caught:
        Safetensors(data)["x"]
    assert str(caught.value).startswith(sentence)


# --- loads --------------------------------------------------------------------------------------------------


def test_loads_are_the_only_tensor_or_the_one_called_so_or_the_one_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "window.safetensors"
    loads = np.array([[[3, 1]], [[2, 2]]], dtype=np.int32)
    path.write_bytes(safetensors({"expert_load_window": loads}))
    assert read_loads(path).tolist() == loads.tolist()
    path.write_bytes(safetensors({"loads": loads, "other": loads + 1}))
    assert read_loads(path).tolist() == loads.tolist()
    assert read_loads(path, "other").tolist() == (loads + 1).tolist()


def test_the_statistic_of_several_ranks_is_added_up_by_iteration_and_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (3, 2, 2, 4), dtype=np.int32)  # ranks, iterations, layers, experts
    for rank in range(3):
        tensors = {f"{9 + i}_{3 + 8 * layer}": counts[rank, i, layer] for layer in (1, 0) for i in (1, 0)}
        (tmp_path / f"rank{rank}.safetensors").write_bytes(safetensors(tensors))
    (tmp_path / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    assert read_loads(tmp_path).tolist() == counts.sum(axis=0).tolist()
    assert read_loads(tmp_path / "rank1.safetensors").tolist() == counts[1].tolist()


BAD_LOADS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.safetensors": (lambda path: path.write_bytes(b"\x01"), "it is no safetensors file, or cut off"),
    "b.safetensors": (
        lambda path: path.write_bytes(safetensors({"x": np.ones(2), "y": np.ones(2)})),
        "it has no array named 'loads' but 'x', 'y'; choose one of them",
    ),
    "c.safetensors": (
        lambda path: path.write_bytes(safetensors({"0_1": np.ones(2), "1_2": np.ones(2)})),
        "it has no tensor '0_2' among those of iterations and layers",
    ),
    "d.safetensors": (
        lambda path: path.write_bytes(safetensors({"0_1": np.ones(2), "0_2": np.ones(3)})),
        r"its tensors are not of one shape, \[experts\]",
    ),
    "e.safetensors": (lambda path: path.write_bytes(safetensors({})), "it has no array named 'loads' but none at all"),
    "f": (lambda path: path.mkdir(), r"is a folder without the rank0\.safetensors of an expert statistic"),
}


@pytest.mark.parametrize("name", BAD_LOADS)
def test_what_holds_no_loads_is_one_sentence_that_names_the_file(tmp_path: Path, name: str) -> None:
    write, sentence = BAD_LOADS[name]
    write(tmp_path / name)
    with pytest.raises(PlacementError) as caught:
        read_loads(tmp_path / name)
    assert re.match(rf"{re.escape(str(tmp_path / name))}:? {sentence}", str(caught.value)), caught.value


def test_ranks_that_recorded_something_else_do_not_go_together(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}.safetensors").write_bytes(safetensors({"0_0": np.ones(2 + rank)}))
    with pytest.raises(PlacementError, match=r"the files of rank 0 and 1 hold \[1, 1, 2\] and \[1, 1, 3\] counts"):
        read_loads(tmp_path)


# --- routes -------------------------------------------------------------------------------------------------

ROUTES = np.array([[[0, 1], [2, 3]], [[3, -1], [0, 2]]], dtype=np.int16)


def npz(**arrays: Any) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


READABLE: dict[str, Callable[[Path], object]] = {
    "routes.npy": lambda path: np.save(path, ROUTES),
    "both.npz": lambda path: path.write_bytes(npz(loads=np.ones((2, 4)), routes=ROUTES)),
    "both.json": lambda path: path.write_text(json.dumps({"loads": [[1]], "routes": ROUTES.tolist()})),
    "both.safetensors": lambda path: path.write_bytes(safetensors({"loads": np.ones((2, 4)), "routes": ROUTES})),
}


@pytest.mark.parametrize("name", READABLE)
def test_routes_are_read_from_what_holds_them(tmp_path: Path, name: str) -> None:
    READABLE[name](tmp_path / name)
    assert read_routes(tmp_path / name).tolist() == ROUTES.tolist()


def test_routes_of_one_layer_need_no_dimension_for_it(tmp_path: Path) -> None:
    np.save(tmp_path / "routes.npy", ROUTES[:, 0])
    assert read_routes(tmp_path / "routes.npy").tolist() == ROUTES[:, :1].tolist()


def test_loads_alone_are_never_taken_for_routes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROUTES)
    np.savez(tmp_path / "b.npz", loads=ROUTES)
    (tmp_path / "c.json").write_text("[[1, 2]]")
    (tmp_path / "d.safetensors").write_bytes(safetensors({"loads": ROUTES}))
    assert [find_routes(path) for path in sorted(tmp_path.iterdir())] == [None] * 4


BAD_ROUTES: dict[str, tuple[Callable[[Path], object], str]] = {
    "none.npy": (lambda path: None, r"cannot be read \(No such file or directory\); give a file with routes"),
    "empty.npz": (lambda path: path.write_bytes(b""), "is empty; give a file with routes"),
    "floats.npy": (lambda path: np.save(path, np.ones((2, 2))), r"the routes have type float64 and shape \[2, 1, 2\]"),
    "minus.npy": (
        lambda path: np.save(path, ROUTES - 2),
        "the routes: experts go from 0 to 16777215, and -3 to 1 were",
    ),
    "loads.npz": (lambda path: path.write_bytes(npz(loads=ROUTES)), "holds no routes; give a .npy, or a .npz"),
    "ragged.json": (lambda path: path.write_text('{"routes": [[1], [1, 2]]}'), "the routes are not of equal length"),
    "no.json": (lambda path: path.write_text("{"), "it is no JSON"),
    "no.safetensors": (lambda path: path.write_bytes(b"{}"), "it is no safetensors file"),
    "no.npz": (lambda path: path.write_bytes(b"{}"), r"it is no .npy file, or cut off|it holds|it is no .npz file"),
    "routes.csv": (lambda path: path.write_text("1,2"), "holds no routes; give a .npy, or a .npz"),
}


@pytest.mark.parametrize("name", BAD_ROUTES)
def test_what_holds_no_routes_is_one_sentence_that_names_the_file(tmp_path: Path, name: str) -> None:
    write, sentence = BAD_ROUTES[name]
    write(tmp_path / name)
    with pytest.raises(PlacementError) as caught:
        read_routes(tmp_path / name)
    assert re.match(rf"{re.escape(str(tmp_path / name))}:? (?:{sentence})", str(caught.value)), caught.value
