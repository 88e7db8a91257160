"""A placement: what it is made of, what follows from it, and how it is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from counterflow import Placement, balance
from counterflow.errors import PlacementError
from counterflow.experts import read_placement, write_placement
from experts.loads import problems


def placed(**changes: Any) -> Placement:
    return Placement(**{"physical_to_logical": [[0, 1, 0, 2]], "num_experts": 3, "num_gpus": 2} | changes)


@given(problems())
def test_the_maps_agree_and_the_load_is_all_there(problem: tuple[np.ndarray, tuple[int, int, int, int]]) -> None:
    loads, (replicas, groups, nodes, gpus) = problem
    placement = balance(loads, replicas, gpus, nodes, groups)
    where = placement.logical_to_physical
    assert where.shape == (*loads.shape, replicas - loads.shape[1] + 1)
    assert np.array_equal((where >= 0).sum(axis=2), placement.logical_count)
    for layer, row in enumerate(placement.physical_to_logical.tolist()):
        for expert, places in enumerate(where[layer].tolist()):
            assert [slot for slot in places if slot >= 0] == [s for s, held in enumerate(row) if held == expert]
    assert placement.gpu_loads(loads).sum(axis=1) == pytest.approx(loads.sum(axis=1))
    assert ((placement.balancedness(loads) > 0) & (placement.balancedness(loads) <= 1)).all()


@given(problems())
def test_json_there_and_back_loses_nothing_but_the_certificate(problem: Any) -> None:
    loads, (replicas, groups, nodes, gpus) = problem
    placement = balance(loads, replicas, gpus, nodes, groups)
    read = Placement.from_json(placement.to_json())
    assert np.array_equal(read.physical_to_logical, placement.physical_to_logical)
    assert (read.num_experts, read.num_gpus, read.num_nodes) == (placement.num_experts, gpus, nodes)
    assert (read.hierarchy, read.certificate) == (placement.hierarchy, None)


def test_a_file_there_and_back(tmp_path: Path) -> None:
    write_placement(tmp_path / "new" / "placement.json", placed())
    assert read_placement(tmp_path / "new" / "placement.json").physical_to_logical.tolist() == [[0, 1, 0, 2]]


def test_a_placement_cannot_be_written_into() -> None:
    mine = np.array([[0, 1, 0, 2]])
    placement = placed(physical_to_logical=mine)
    mine[0, 0] = 1
    assert placement.physical_to_logical.tolist() == [[0, 1, 0, 2]]
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical[0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"physical_to_logical": [[0, 1, 0, 1]]}, "expert 2 of layer 0 has no slot; every expert needs at least one"),
        (
            {"physical_to_logical": [[0, 1, 3, 2]]},
            "slot 2 of layer 0 holds expert 3; experts are numbered from 0 to 2: give one of them",
        ),
        ({"num_gpus": 3}, "4 replicas do not divide over 3 GPUs: give 6, or another multiple"),
        ({"num_nodes": 3}, "2 GPUs do not divide over 3 nodes: give a multiple of 3"),
        ({"num_gpus": True}, "num_gpus is True; it has to be a whole number from 1 to 16777216"),
        ({"hierarchy": "group"}, "the hierarchy is 'group'; it has to be 'node' or 'none'"),
        (
            {"physical_to_logical": [[0.5, 1]]},
            "physical_to_logical has type float64 and shape [1, 2]; "
            "give the number of an expert for every slot, [layers, slots]",
        ),
        (
            {"physical_to_logical": [[0], [1, 2]]},
            "physical_to_logical, a list, is no array; give rows of equal length, [layers, slots]",
        ),
    ],
)
def test_what_is_no_placement_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlacementError) as caught:
        placed(**changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"format": 2}', "[" * 100_000, "null", '{"num_experts": 3}'])
def test_text_that_is_no_placement_is_one_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    file.write_text(text)
    with pytest.raises(PlacementError) as caught:
        read_placement(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused() -> None:
    newer = placed().to_json().replace('"format": 1', '"format": 2')
    with pytest.raises(PlacementError, match="the placement has format 2; this version reads format 1"):
        Placement.from_json(newer)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="No such file"):
        read_placement(tmp_path / "none.json")


def test_loads_of_another_model_are_refused() -> None:
    with pytest.raises(PlacementError, match="the loads are for 1 layers and 2 experts, the placement for 1 and 3"):
        placed().gpu_loads([[1, 2]])
