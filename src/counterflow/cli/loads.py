"""Recorded loads and routes out of whatever file the caller has, those that torch has to read included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from counterflow.cli.output import about
from counterflow.errors import PlacementError

if TYPE_CHECKING:
    from counterflow.experts.loads import Floats, Ints


def load_windows(file: Path, key: str | None) -> Floats:
    """The recorded loads in ``file`` [windows, layers, experts].

    Raises:
        CounterflowError: it holds no loads, or those of one expert.
    """
    from counterflow.experts import read_loads
    from counterflow.experts.recordings import as_windows

    if _is_recorder(file):
        from counterflow.runtime.recorder import read_recorder

        if key is not None:
            raise PlacementError(
                f"--key {key} chooses from an .npz, .safetensors or .json, and {file} is neither; leave it out"
            )
        counts = read_recorder(file)
        with about(file):
            windows = as_windows(counts)
    else:
        windows = read_loads(file, key)
    if windows.shape[2] == 1:
        raise PlacementError(f"{file}: each layer has one expert, so there is nothing to balance; give at least two")
    return windows


def load_scenarios(files: Sequence[Path], key: str | None) -> dict[str, Floats]:
    """The loads of each file [layers, experts], all its windows together, by the file's name without its ending.

    Raises:
        CounterflowError: a file holds no loads, or is given twice.
    """
    names = [file.stem for file in files]
    if len({*names}) < len(names):
        names = [str(file) for file in files]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlacementError(f"{twice} is given twice, and each file is a scenario of its own; give it once")
    return {name: load_windows(file, key).sum(axis=0) for name, file in zip(names, files, strict=True)}


def load_routes(file: Path | None, loads: Sequence[Path]) -> Ints | None:
    """The routes in ``file``, or those recorded with the ``loads`` where that is one file; None where there are none.

    Raises:
        CounterflowError: ``file`` holds no routes.
    """
    from counterflow.experts import read_routes
    from counterflow.experts.recordings import find_routes

    if file is None and len(loads) > 1:
        return None
    source = loads[0] if file is None else file
    if not _is_recorder(source):
        return find_routes(source) if file is None else read_routes(source)
    from counterflow.runtime.recorder import read_recorded_routes

    routes = read_recorded_routes(source)
    if routes is None and file is not None:
        raise PlacementError(f"{file} holds no routes; record with --expert-distribution-recorder-mode per_token")
    return routes


def _is_recorder(file: Path) -> bool:
    """Whether it is a file, or a folder of files, of SGLang's recorder."""
    return file.suffix == ".pt" or any(file.glob("*.pt"))
