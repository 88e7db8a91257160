"""The largest load of a GPU, and when one is lower than another."""

from __future__ import annotations

import numpy as np

from counterflow.experts.loads import Floats, Ints

LOWER = 1 - 1e-12
"""What is not lower by this factor is as low: sums of the same loads in another order differ by less."""


def gpu_peaks(load: Floats, slots: Ints, num_gpus: int) -> Floats:
    """The largest GPU load [rows] for ``load`` [rows, experts] and the expert in each of the ``slots`` [rows, slots].

    Example:
        >>> import numpy as np
        >>> from counterflow.experts.peaks import gpu_peaks
        >>> gpu_peaks(np.array([[4.0, 3.0, 1.0]]), np.array([[0, 1, 0, 2]]), 2).tolist()
        [5.0]
    """
    rows, experts = load.shape
    flat = slots + np.arange(rows)[:, None] * experts
    share = load / np.bincount(flat.ravel(), minlength=rows * experts).reshape(load.shape)
    by_gpu = np.take_along_axis(share, slots, axis=1).reshape(rows, num_gpus, slots.shape[1] // num_gpus)
    return np.asarray(by_gpu.sum(axis=2).max(axis=1))
