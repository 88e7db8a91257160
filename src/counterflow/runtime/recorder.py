"""Expert loads out of the files of SGLang's expert distribution recorder, which torch has to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterflow.errors import PlacementError


def read_recorder(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The tokens of each expert in every recorded step, [steps, layers, experts], on the CPU.

    Nothing in the file can run code: torch reads it with ``weights_only``.

    Raises:
        PlacementError: it cannot be read, or holds no ``"logical_count"``: the recorder writes that in its modes
            ``stat`` and ``stat_approx``; the message names the file.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from counterflow.runtime.recorder import read_recorder
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "expert_distribution_recorder_1.0.pt"
        >>> torch.save({"rank": 0, "logical_count": torch.tensor([[[3, 1]]])}, path)
        >>> read_recorder(path).tolist()
        [[[3, 1]]]

    Source: SGLang, ``srt/eplb/expert_distribution.py``.
    """
    path = Path(path)
    try:
        import torch
    except ImportError:
        raise PlacementError(f"{path} is read by torch, which is not installed; install counterflow[torch]") from None
    try:
        recorded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise a dozen kinds for what is in a broken file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise PlacementError(
            f"{path} cannot be read as tensors ({reason}); give a file of SGLang's recorder, unchanged"
        ) from None
    counts = recorded.get("logical_count") if isinstance(recorded, dict) else None
    if not isinstance(counts, torch.Tensor):
        raise PlacementError(
            f'{path} has no tensor "logical_count"; record with --expert-distribution-recorder-mode stat'
        )
    return np.asarray((counts.double() if counts.is_floating_point() else counts).numpy())
