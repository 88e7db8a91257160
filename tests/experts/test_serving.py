"""Placements in the files of SGLang and vLLM: what is written is read back, and what contradicts itself is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.experts.loads import problems

from counterflow import Placement, balance
from counterflow.errors import PlacementError
from counterflow.experts import read_served, write_served
from counterflow.experts.serving import WRITERS

PLACEMENT = Placement([[0, 1, 2, 0, 1, 2], [2, 2, 1, 2, 0, 2]], num_experts=3, num_gpus=3)


@given(problems(), st.sampled_from(sorted(WRITERS)))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, problem: Any, kind: str) -> None:
    loads, (replicas, groups, nodes, gpus) = problem
    placement = balance(loads, replicas, gpus, nodes, groups)
    path = tmp_path_factory.getbasetemp() / "placement.json"
    write_served(path, placement, kind)
    again = read_served(path, gpus, nodes)
    assert again.physical_to_logical.tolist() == placement.physical_to_logical.tolist()
    assert (again.num_experts, again.num_gpus, again.num_nodes) == (placement.num_experts, gpus, nodes)


def test_sglang_gets_one_key_for_it_takes_every_key_for_an_argument(tmp_path: Path) -> None:
    write_served(tmp_path / "p.json", PLACEMENT, "sglang")

    def init_by_mapping(server_args: object, model_config: object, physical_to_logical_map: object) -> object:
        return physical_to_logical_map

    assert init_by_mapping(None, None, **json.loads((tmp_path / "p.json").read_text())) == [
        [0, 1, 2, 0, 1, 2],
        [2, 2, 1, 2, 0, 2],
    ]


def test_vllm_gets_the_three_maps_as_it_documents_them(tmp_path: Path) -> None:
    """The example of its ``EplbModelState``: 4 logical experts, 6 physical ones, 3 ranks."""
    write_served(tmp_path / "p.json", Placement([[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]], 4, 3), "vllm")
    assert json.loads((tmp_path / "p.json").read_text()) == {
        "physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]],
        "logical_to_physical_map": [
            [[0, 4, -1], [1, 5, -1], [2, -1, -1], [3, -1, -1]],
            [[0, 2, 4], [3, -1, -1], [1, -1, -1], [5, -1, -1]],
        ],
        "logical_replica_count": [[2, 2, 1, 1], [3, 1, 1, 1]],
    }


def test_maps_are_read_in_whatever_order_and_width_a_server_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_served(path, PLACEMENT, "vllm")
    maps = json.loads(path.read_text())
    wide = np.full((2, 3, 1024), -1)
    wide[:, :, 3 : 3 + 4] = np.asarray(maps["logical_to_physical_map"])[:, :, ::-1]
    path.write_text(json.dumps(maps | {"logical_to_physical_map": wide.tolist()}))
    assert read_served(path, 3).physical_to_logical.tolist() == PLACEMENT.physical_to_logical.tolist()


VLLM = json.loads(WRITERS["vllm"](PLACEMENT))
REFUSED: dict[str, tuple[Any, str]] = {
    "no json": ("{", r"it is no JSON \(.*\); give a placement"),
    "list": ([[0, 1]], 'a placement in JSON needs "physical_to_logical"'),
    "loads": ({"logical_count": [[1, 2]]}, 'a placement in JSON needs "physical_to_logical"'),
    "ragged": (
        {"physical_to_logical_map": [[0], [0, 1]]},
        'the rows of its "physical_to_logical_map" are not of equal',
    ),
    "text": ({"physical_to_logical_map": "0"}, 'its "physical_to_logical_map" has type <U1 and shape'),
    "row": (
        {"physical_to_logical_map": [0, 1]},
        'its "physical_to_logical_map" has type int64 and shape .2.; it has to',
    ),
    "hole": ({"physical_to_logical_map": [[0, 2, 0]]}, "expert 1 of layer 0 has no slot"),
    "empty slot": ({"physical_to_logical_map": [[0, 1, -1]]}, "slot 2 of layer 0 holds expert -1"),
    "many": ({"physical_to_logical_map": [[0, 0, 2**40]]}, "num_experts is 1099511627777; it has to be a whole"),
    "odd": ({"physical_to_logical_map": [[0, 1, 0, 1]]}, "4 replicas do not divide over 3 GPUs"),
    "count": (VLLM | {"logical_replica_count": [[2, 2, 2], [1, 1, 1]]}, 'its "logical_replica_count" does not follow'),
    "where": (VLLM | {"logical_to_physical_map": [[[0]]]}, 'its "logical_to_physical_map" does not follow from its'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_placement_is_one_sentence_that_names_the_file(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSED[name]
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(PlacementError) as caught:
        read_served(path, 3)
    assert re.match(rf"{re.escape(str(path))}: {sentence}", str(caught.value)), caught.value


def test_a_file_that_is_not_there_or_no_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"none\.json cannot be read \(No such file or directory\); give a placem"):
        read_served(tmp_path / "none.json", 3)
    (tmp_path / "p.json").write_bytes(b"\xff")
    with pytest.raises(PlacementError, match=r"p\.json: 'utf-8' codec can't decode"):
        read_served(tmp_path / "p.json", 3)


def test_a_format_that_does_not_exist_is_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"the format is 'yaml'; it has to be one of counterflow, sglang, vllm"):
        write_served(tmp_path / "p.json", PLACEMENT, "yaml")
    assert not list(tmp_path.iterdir())
