"""What GPUs hold, and elements of rows, against loops and numpy that say the same slowly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.experts.peaks import co_located, gpu_peaks
from counterflow.experts.rows import from_rows


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_gpus_hold_what_loops_count(rows: int, gpus: int, room: int, experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots, load = rng.integers(0, experts, (rows, gpus * room)), rng.random((rows, experts))
    peaks, again = [], []
    for row, held in zip(load.tolist(), slots.tolist(), strict=True):
        by_gpu = [held[gpu * room : gpu * room + room] for gpu in range(gpus)]
        peaks.append(max(sum(row[expert] / held.count(expert) for expert in on_gpu) for on_gpu in by_gpu))
        again.append([expert in on_gpu[:place] for on_gpu in by_gpu for place, expert in enumerate(on_gpu)])
    assert gpu_peaks(load, slots, gpus).tolist() == pytest.approx(peaks, rel=1e-14)
    assert co_located(slots, gpus).tolist() == again


@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_elements_of_rows_as_numpy_picks_them(rows: int, n: int, m: int, contiguous: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((rows, n)) if contiguous else rng.random((n, rows)).T
    places = rng.integers(0, n, (rows, m))
    assert np.array_equal(from_rows(values, places), np.take_along_axis(values, places, axis=1))
