"""The decoder whole and in stages, its weights, its files, its counts, and that the host waits for nothing."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from counterflow import CounterflowError, LoadTracker
from counterflow.moe import Decode, LatentCache, Part, Prefill, run, stage, stages, take_counts
from counterflow.moe import grouped as grouped_room
from counterflow.moe.draw import draw
from moe.models import TINY, TWO_LAYERS, any_placement, tokens, whole


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_behind_each_other_are_the_whole_model(num_stages: int) -> None:
    parts = stages(TINY, num_stages, dtype=torch.float64)
    x = tokens(2, 5)
    expected = whole(TINY)(x)
    for part in parts:
        x = part(x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_tokens_that_are_no_sequences_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        CounterflowError, match=r"in training give \[sequences, time, hidden\]: tokens in two dimensions"
    ):
        whole()(torch.zeros(shape, dtype=torch.int64))


def test_weights_follow_from_the_seed_and_the_place() -> None:
    one, same, other = (stage(TINY, 1, 2, seed=seed) for seed in (1, 1, 2))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one[0].shared_expert.down.weight, other[0].shared_expert.down.weight)
    assert not torch.equal(one[0].shared_expert.down.weight, one[1].shared_expert.down.weight)


def test_first_weights_keep_the_size_of_what_goes_through() -> None:
    weight = torch.empty(300, 400)
    draw(weight, "any", 7)
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=0.001)


def test_a_stage_is_made_where_and_as_precise_as_asked_and_leaves_no_trace() -> None:
    part = stage(TINY, 0, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in part.parameters()} == {("meta", torch.bfloat16)}
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device.type == "cpu"


@pytest.mark.parametrize(("index", "num_stages"), [(0, 5), (2, 2), (-1, 2)])
def test_more_stages_than_layers_are_refused(index: int, num_stages: int) -> None:
    with pytest.raises(CounterflowError) as refused:
        stage(TINY, index, num_stages)
    assert str(refused.value) == (
        f"stage {index} of {num_stages} was asked for, and the model has 4 layers; give at most a stage for each, "
        "numbered from 0"
    )


def test_a_model_comes_back_from_a_file_that_holds_weights_only(tmp_path: Path) -> None:
    model = whole(seed=3)
    model[1].router.even_out(torch.arange(TINY.experts))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = whole(seed=4)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = tokens(2, 6)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded[1].router.bias, model[1].router.bias)


def test_a_file_does_not_hold_where_experts_lie() -> None:
    names = whole(placement=any_placement(0, 1)).state_dict()
    assert not [name for name in names if "dispatch" in name or "counts" in name]


def test_counts_are_what_a_tracker_adds() -> None:
    model = whole()
    tracker = LoadTracker(num_layers=TWO_LAYERS.layers, num_experts=TINY.experts, window_size=4)
    sent = torch.zeros(TWO_LAYERS.layers, TINY.experts, dtype=torch.int64)
    for step in range(3):
        model(tokens(2, 8, seed=step))
        counts = take_counts([model])
        sent += counts
        tracker.add(counts.numpy())
    assert tracker.loads().tolist() == sent.tolist()
    assert sent.sum(1).tolist() == [3 * 2 * 8 * TINY.top_k] * 2


# --- nobody waits for a GPU ---------------------------------------------------------------------------------


def train_and_serve() -> None:
    """Everything one rank does, on tensors that have sizes but no numbers: whoever looks at a number raises."""
    placement = any_placement(0, 1)
    with FakeTensorMode():
        model = stage(TWO_LAYERS, 0, 1, placement=placement, dtype=torch.bfloat16)
        model(tokens(2, 8)).sum().backward()
        with torch.no_grad():
            cache = LatentCache(TWO_LAYERS, 4, 16, torch.bfloat16)
            parts = [Part(0, 0, 4), Part(1, 0, 4), Part(0, 4, 4)]
            run(model, tokens(12), Prefill(cache, parts))
            run(model, tokens(4), Decode(cache, 0, torch.zeros(4, dtype=torch.int64)))


def test_on_one_rank_the_host_looks_at_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU in bfloat16, where one kernel reads on the GPU how many rows an expert has.
    monkeypatch.setattr(grouped_room, "has_kernel", lambda rows: True)
    train_and_serve()


def test_without_that_kernel_it_has_to() -> None:
    with pytest.raises(DataDependentOutputException):
        train_and_serve()
