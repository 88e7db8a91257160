"""Compiled loops run whatever becomes of numba's cache on disk."""

from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from counterflow.loops import compiled


def fill(values: Any, last: int) -> int:
    for index in range(last):
        values[index] += index
    return last


def filled() -> list[int]:
    """What ``fill`` makes of zeros in a process that has not compiled it yet."""
    values = np.zeros(4, dtype=np.int64)
    assert compiled.__wrapped__(fill)(values, 4) == 4
    return values.tolist()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))


def test_a_full_disk_keeps_no_cache_and_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", full)
    assert filled() == [0, 1, 2, 3]


def test_a_damaged_cache_is_passed_by(tmp_path: Path) -> None:
    assert filled() == [0, 1, 2, 3]
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        path.write_bytes(b"cut off")
    assert filled() == [0, 1, 2, 3]
