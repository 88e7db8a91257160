"""SGLang's recorder: what its four modes write becomes loads by expert, and routes where it wrote them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.errors import PlacementError
from counterflow.experts import route_loads
from counterflow.runtime.recorder import read_recorded_routes, read_recorder

SLOTS = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])  # two layers, three experts
EXPERTS = 3


def recording(rank: int, passes: dict[int, torch.Tensor]) -> dict[str, Any]:
    """What one rank writes in the mode per_token, of the slots [layers, tokens, k] that tokens of each pass chose."""
    records = []
    for number, chosen in passes.items():
        counts = torch.stack([torch.bincount(layer[layer >= 0], minlength=4) for layer in chosen])
        records.append(
            {
                "forward_pass_id": number,
                "rank": rank,
                "gatherer_key": "primary",
                "input_ids": list(range(chosen.shape[1])),
                "topk_ids_of_layer": chosen.int(),
                "misc_objects": [],
                "global_physical_count": counts.int(),
            }
        )
    return {"records": records, "last_physical_to_logical_map": SLOTS}


FIRST = torch.tensor([[[0, 1], [3, 2]], [[0, 3], [1, -1]]])
SECOND = torch.tensor([[[2, 1]], [[-1, -1]]])


def save(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def test_a_recording_of_passes_becomes_the_tokens_of_each_expert(tmp_path: Path) -> None:
    path = save(tmp_path, "one.pt", recording(0, {7: FIRST, 3: SECOND}))
    assert read_recorder(path).tolist() == [[[0, 1, 1], [0, 0, 0]], [[2, 1, 1], [0, 2, 1]]]


def test_what_the_ranks_saw_in_one_pass_is_added_up(tmp_path: Path) -> None:
    save(tmp_path, "recorder_1.0_0.pt", recording(0, {1: FIRST, 2: FIRST}))
    save(tmp_path, "recorder_1.5_1.pt", recording(1, {1: SECOND}))
    alone = [read_recorder(file) for file in sorted(tmp_path.iterdir())]
    assert read_recorder(tmp_path).tolist() == [(alone[0][0] + alone[1][0]).tolist(), alone[0][1].tolist()]


def test_recorded_slots_become_the_experts_in_them_token_by_token(tmp_path: Path) -> None:
    path = save(tmp_path, "one.pt", recording(0, {1: FIRST, 2: SECOND}))
    routes = read_recorded_routes(path)
    assert routes is not None
    assert routes.tolist() == [[[0, 1], [2, 1]], [[0, 2], [1, -1]], [[2, 1], [-1, -1]]]
    assert route_loads(routes, EXPERTS).tolist() == read_recorder(path).sum(axis=0).tolist()


def test_tokens_come_in_the_order_of_ranks_whatever_the_files_are_called(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", recording(1, {1: SECOND}))
    save(tmp_path, "b.pt", recording(0, {2: FIRST}))
    in_order = [read_recorded_routes(tmp_path / name) for name in ("b.pt", "a.pt")]
    routes = read_recorded_routes(tmp_path)
    assert routes is not None
    assert routes.tolist() == np.concatenate(in_order).tolist()


@pytest.mark.parametrize("counts", [[[[3, 1]]], [[3, 1]], [[[3.0, 1.0]]]])
def test_statistics_hold_counts_and_no_routes(tmp_path: Path, counts: list[Any]) -> None:
    path = save(tmp_path, "stat.pt", {"rank": 0, "logical_count": torch.tensor(counts)})
    assert read_recorder(path).tolist() == [[[3, 1]]]
    assert read_recorded_routes(path) is None
    assert read_recorder(tmp_path).tolist() == [[[3, 1]]]


def test_counts_that_a_gradient_could_flow_to_are_counts(tmp_path: Path) -> None:
    counts = torch.tensor([[3.0, 1.0]], requires_grad=True)
    assert read_recorder(save(tmp_path, "stat.pt", {"logical_count": counts})).tolist() == [[[3, 1]]]


def test_what_torch_warns_of_is_not_told_beside_the_sentence(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(b"\x80\x04K\x01.")  # the number 1 in protocol 4: torch writes 2, and remarks upon others
    with pytest.raises(PlacementError, match=r"cannot be read as tensors \(RuntimeError\)"):  # a warning would raise
        read_recorder(path)


def test_a_recording_of_passes_alone_has_no_routes(tmp_path: Path) -> None:
    content = recording(0, {1: FIRST})
    del content["records"][0]["topk_ids_of_layer"]
    assert read_recorded_routes(save(tmp_path, "one.pt", content)) is None


def changed(**values: Any) -> dict[str, Any]:
    content = recording(0, {1: FIRST})
    content["records"][0] |= values
    return content


REFUSED: dict[str, tuple[Any, str]] = {
    "neither": ({"rank": 0}, 'has no tensor "logical_count" and no "records"; give a file of SGLang'),
    "list": ([torch.ones(2)], 'has no tensor "logical_count" and no "records"'),
    "empty": ({"records": []}, 'has no "records"; record at least one pass'),
    "text": ({"logical_count": "many"}, 'has no tensor "logical_count"; give a file'),
    "sparse": ({"logical_count": torch.ones(2, 4).to_sparse()}, 'has a tensor "logical_count" that is no array'),
    "meta": ({"logical_count": torch.ones(2, 4, device="meta")}, 'has a tensor "logical_count" that is no array'),
    "map": (recording(0, {1: FIRST}) | {"last_physical_to_logical_map": SLOTS - 1}, "says for no slot which expert"),
    "experts": (
        recording(0, {1: FIRST}) | {"last_physical_to_logical_map": SLOTS + 2},
        "has expert 4 in one of 4 slots",
    ),
    "rank": (changed(rank=None), "has a record without forward_pass_id and rank"),
    "counts": (changed(global_physical_count=torch.ones(2, 3)), r"has counts of shape \[2, 3\] for \[2, 4\] slots"),
    "slots": (changed(topk_ids_of_layer=FIRST + 1), r"has routes to slot 4 of 4: shared experts count there as well"),
    "layers": (changed(topk_ids_of_layer=FIRST[:1]), r"has routes of shape \[1, 2, 2\] for 2 layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_recording_is_one_sentence_that_names_the_file(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSED[name]
    path = save(tmp_path, f"{name}.pt", content)
    readers: tuple[Callable[[Path], Any], ...] = (read_recorder, read_recorded_routes)
    said = []
    for read in readers:
        try:
            read(path)
        except PlacementError as error:
            said.append(str(error))
    assert any(re.match(rf"{re.escape(str(path))} {sentence}", text) for text in said), said


def test_recordings_of_two_models_do_not_go_together(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", {"logical_count": torch.ones(1, 2, 4)})
    save(tmp_path, "b.pt", {"logical_count": torch.ones(1, 2, 8)})
    with pytest.raises(
        PlacementError, match=r"holds recordings of shapes \(2, 4\) and \(2, 8\); give those of one model"
    ):
        read_recorder(tmp_path)


def test_a_folder_without_recordings_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"is a folder without \.pt files"):
        read_recorder(tmp_path)
