"""The load tracker against one that keeps every step, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from counterflow import LoadTracker, balance
from counterflow.errors import PlacementError

SHAPE = (2, 3)
COUNTS = st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e6), st.just(1e30))
STEPS = st.lists(hnp.arrays(np.float64, SHAPE, elements=COUNTS), max_size=30)


class Reference:
    """Keeps every step for ever."""

    def __init__(self, window_size: int, decay: float | None) -> None:
        self.window_size, self.decay, self.steps = window_size, decay, list[np.ndarray]()

    def loads(self) -> np.ndarray:
        if not self.steps:
            return np.ones(SHAPE)
        if self.decay is None:
            return np.sum(self.steps[-self.window_size :], axis=0)
        weights = self.decay ** np.arange(len(self.steps))[::-1]
        return np.average(self.steps, axis=0, weights=weights)


def both(steps: list[np.ndarray], window_size: int, decay: float | None = None) -> tuple[LoadTracker, Reference]:
    tracker, reference = LoadTracker(*SHAPE, window_size, decay=decay), Reference(window_size, decay)
    for step in steps:
        tracker.add(step)
        reference.steps.append(step)
    return tracker, reference


# --- what it computes ---------------------------------------------------------------------------------------


@given(STEPS, st.integers(1, 12))
def test_the_window_is_the_sum_of_its_last_steps_and_carries_nothing_of_those_before(
    steps: list[np.ndarray], window_size: int
) -> None:
    tracker, reference = both(steps, window_size)
    np.testing.assert_allclose(tracker.loads(), reference.loads(), rtol=1e-13)


@given(st.lists(hnp.arrays(np.int32, SHAPE, elements=st.integers(0, 2**31 - 1)), max_size=30), st.integers(1, 12))
def test_counts_of_tokens_are_summed_exactly(steps: list[np.ndarray], window_size: int) -> None:
    tracker, reference = both(steps, window_size)
    assert np.array_equal(tracker.loads(), np.asarray(reference.loads(), dtype=np.float64))


@given(STEPS, st.floats(0.01, 0.999999))
def test_with_a_decay_it_is_the_weighted_average_of_all_steps(steps: list[np.ndarray], decay: float) -> None:
    tracker, reference = both(steps, 7, decay)
    np.testing.assert_allclose(tracker.loads(), reference.loads(), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("decay", [1e-300, 0.5, 1 - 2**-53])
def test_equal_steps_average_to_themselves_however_it_forgets(decay: float) -> None:
    tracker, _ = both([np.full(SHAPE, 3.0)] * 5, 1, decay)
    np.testing.assert_allclose(tracker.loads(), 3.0, rtol=1e-14)


def test_before_the_first_step_all_loads_are_equal_and_it_says_so() -> None:
    tracker = LoadTracker(*SHAPE)
    assert (tracker.cold, tracker.due(), tracker.loads().tolist()) == (True, False, [[1.0] * 3] * 2)
    assert balance(tracker.loads(), 6, 3).balancedness(tracker.loads()).tolist() == [1.0, 1.0]
    tracker.add(np.zeros(SHAPE))
    assert (tracker.cold, tracker.loads().any()) == (False, False)


def test_a_rebalance_is_due_after_every_interval() -> None:
    tracker = LoadTracker(1, 1, window_size=2, step_interval=3)
    due = []
    for _ in range(7):
        tracker.add([[1]])
        due.append(tracker.due())
    assert due == [False, False, True, False, False, True, False]


def test_what_it_took_in_and_gave_out_is_its_own() -> None:
    tracker, step = LoadTracker(1, 2, window_size=1), np.array([[1.0, 2.0]])
    tracker.add(step)
    step[:] = 9
    tracker.loads()[:] = 9
    assert tracker.loads().tolist() == [[1.0, 2.0]]
    tracker.add([3, 4])
    tracker.loads()[:] = 9
    assert tracker.loads().tolist() == [[3.0, 4.0]]


def test_counts_may_be_torch_tensors() -> None:
    tracker = LoadTracker(1, 2)
    tracker.add(torch.tensor([[3, 1]], dtype=torch.int32))
    assert tracker.loads().tolist() == [[3.0, 1.0]]


# --- several ranks ------------------------------------------------------------------------------------------


@given(STEPS, st.integers(1, 12), st.sampled_from([None, 0.5]))
def test_merged_ranks_are_one_tracker_that_saw_it_all(
    steps: list[np.ndarray], window_size: int, decay: float | None
) -> None:
    shares = (0.25, 0.75)
    ranks = [both([step * share for step in steps], window_size, decay)[0] for share in shares]
    merged, (whole, _) = LoadTracker.merge(ranks), both(steps, window_size, decay)
    np.testing.assert_allclose(merged.loads(), whole.loads(), rtol=1e-12)
    for tracker in (merged, whole):
        for step in steps[:5]:
            tracker.add(step)
    np.testing.assert_allclose(merged.loads(), whole.loads(), rtol=1e-12)
    assert (merged.cold, merged.num_steps) == (whole.cold, whole.num_steps)


def test_merging_leaves_the_merged_as_they_were() -> None:
    one, other = both([np.ones(SHAPE)], 3)[0], both([np.ones(SHAPE)], 3)[0]
    LoadTracker.merge([one, other]).add(np.ones(SHAPE))
    assert (one.num_steps, one.loads().tolist()) == (1, [[1.0] * 3] * 2)


def test_ranks_that_saw_other_steps_do_not_merge() -> None:
    with pytest.raises(PlacementError, match=r"^tracker 1 has num_steps 1, tracker 0 0; merge those of ranks"):
        LoadTracker.merge([LoadTracker(*SHAPE), both([np.ones(SHAPE)], 1000)[0]])
    with pytest.raises(PlacementError, match=r"^tracker 1 has decay 0\.5, tracker 0 None;"):
        LoadTracker.merge([LoadTracker(*SHAPE), LoadTracker(*SHAPE, decay=0.5)])
    with pytest.raises(PlacementError, match=r"^there is no tracker to merge"):
        LoadTracker.merge([])


def test_what_is_no_tracker_does_not_merge() -> None:
    with pytest.raises(PlacementError, match=r"^tracker 1 is a str; give the LoadTracker of each rank$"):
        LoadTracker.merge([LoadTracker(*SHAPE), "tracker.npz"])  # type: ignore[list-item]
    with pytest.raises(PlacementError, match=r"^the trackers are a LoadTracker; give a list, with that of each rank$"):
        LoadTracker.merge(LoadTracker(*SHAPE))  # type: ignore[arg-type]


# --- files --------------------------------------------------------------------------------------------------


@given(STEPS, st.integers(1, 12), st.sampled_from([None, 0.5]))
def test_a_saved_tracker_goes_on_where_it_stood(
    tmp_path_factory: pytest.TempPathFactory, steps: list[np.ndarray], window_size: int, decay: float | None
) -> None:
    path = tmp_path_factory.mktemp("tracker") / "state.npz"
    tracker = both(steps, window_size, decay)[0]
    tracker.save(path)
    loaded = LoadTracker.load(path)
    for step in (None, *steps[:5]):
        if step is not None:
            tracker.add(step)
            loaded.add(step)
        assert np.array_equal(loaded.loads(), tracker.loads())
    assert vars(loaded).keys() == vars(tracker).keys()
    assert (loaded.num_steps, loaded.step_interval, loaded.decay) == (tracker.num_steps, 3000, decay)


def test_saving_replaces_the_file_as_a_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    path.write_text("old")
    LoadTracker(*SHAPE).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]
    assert LoadTracker.load(path).cold


def spoiled(path: Path, **changes: Any) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **(arrays | changes))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), r"no tracker can be read \(No such file"),
        (lambda path: path.write_bytes(b""), r"no tracker can be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), r"no tracker can be read"),
        (lambda path: np.savez(path, loads=np.ones(3)), r"no tracker can be read \(KeyError\)"),
        (lambda path: spoiled(path, older=np.array([[{}]], dtype=object)), r"no tracker can be read"),
        (lambda path: spoiled(path, format=2), r"the tracker has format 2; this version reads format 1"),
        (lambda path: spoiled(path, recent=np.full((1, 2, 3), np.nan)), r"the steps it kept are no loads"),
        (lambda path: spoiled(path, recent=-np.ones((1, 2, 3))), r"the steps it kept are no loads"),
        (lambda path: spoiled(path, recent=np.ones((1, 3))), r"the steps it kept are no loads"),
        (lambda path: spoiled(path, recent=np.ones((1, 0, 3))), r"num_layers is 0"),
        (lambda path: spoiled(path, older=np.ones((0, 2, 4))), r"of 1 steps it kept 0 and 1"),
        (lambda path: spoiled(path, num_steps=7), r"of 7 steps it kept 0 and 1"),
        (lambda path: spoiled(path, num_steps=-1), r"of -1 steps it kept 0 and 1"),
        (lambda path: spoiled(path, num_steps=1.5), r"this is no whole tracker"),
        (lambda path: spoiled(path, num_steps=[1, 2]), r"this is no whole tracker"),
        (lambda path: spoiled(path, window_size=0), r"window_size is 0"),
        (lambda path: spoiled(path, decay=1.5), r"the decay is 1\.5"),
        (lambda path: spoiled(path, decay="x"), r"the decay is 'x'"),
    ],
)
def test_a_file_that_holds_no_tracker_is_one_sentence_that_names_it(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    path = tmp_path / "state.npz"
    both([np.ones(SHAPE)], 9)[0].save(path)
    spoil(path)
    with pytest.raises(PlacementError, match=sentence) as caught:
        LoadTracker.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# --- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([[1, 2, np.nan], [0, 0, 0]], "the load of expert 2 in layer 0 is nan; a load has to be finite"),
        ([[1, 2, 3], [0, np.inf, 0]], "the load of expert 1 in layer 1 is inf; a load has to be finite"),
        ([[1, 2, 3], [0, -1, 0]], "the load of expert 1 in layer 1 is -1; a load cannot be negative"),
        ([[1, 2, 3], [0, 1e39, 0]], r"the load of expert 1 in layer 1 is 1e\+39; a load has to fit float32"),
        ([[1, 2, 3]], "the counts are for 1 layers and 3 experts, the tracker for 2 and 3"),
        ([1, 2, 3], "the counts are for 1 layers and 3 experts, the tracker for 2 and 3"),
        ([[[1]]], r"the loads have shape \[1, 1, 1\]"),
        ([], "the loads have"),
        ("many", "the loads are of type"),
        ([[1], [2, 3]], "the loads, a list, cannot be read"),
    ],
)
def test_hostile_counts_are_one_sentence_and_change_nothing(counts: Any, sentence: str) -> None:
    tracker = LoadTracker(*SHAPE)
    tracker.add([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(PlacementError, match=f"^{sentence}"):
        tracker.add(counts)
    assert (tracker.num_steps, tracker.loads().tolist()) == (1, [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_layers": 0}, "num_layers is 0; it has to be a whole number"),
        ({"num_experts": 2.5}, r"num_experts is 2\.5; it has to be a whole number"),
        ({"window_size": 0}, "window_size is 0; it has to be a whole number"),
        ({"step_interval": -1}, "step_interval is -1; it has to be a whole number"),
        ({"decay": 1}, "the decay is 1; it has to lie between 0 and 1"),
        ({"decay": 0}, "the decay is 0; it has to lie between 0 and 1"),
        ({"decay": float("nan")}, "the decay is nan; it has to lie between 0 and 1"),
        ({"decay": "half"}, "the decay is 'half'; it has to lie between 0 and 1"),
    ],
)
def test_sizes_that_are_none_are_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlacementError, match=f"^{sentence}"):
        LoadTracker(**({"num_layers": 2, "num_experts": 3} | arguments))


def test_sizes_that_no_memory_holds_are_one_sentence() -> None:
    with pytest.raises(
        PlacementError, match=r"^16777216 layers of 16777216 experts are too many; give 67108864 at most"
    ):
        LoadTracker(2**24, 2**24)
