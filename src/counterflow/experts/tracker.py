"""What the experts have had to do lately, step by step: the load that the next placement is made for."""

from __future__ import annotations

import io
import math
import operator
import os
import reprlib
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.errors import PlacementError
from counterflow.experts.loads import Floats, as_loads
from counterflow.experts.placement import whole_number
from counterflow.files import write_bytes

FORMAT = 1
MOST_COUNTS = 2**26  # half a GiB for every step of the window
_ARRAYS = ("format", "window_size", "step_interval", "decay", "num_steps", "older", "recent")


class LoadTracker:
    """The load of every expert [layers, experts] out of a router's counts, which come step by step.

    It is the sum over the last ``window_size`` steps; with a ``decay`` between 0 and 1 it is the weighted average over
    all steps instead, in which a step weighs ``decay`` times as much as the one after it. Either costs the same small
    work for every step, on average over a window, and a window keeps its steps in memory (8 bytes for each count).
    Every ``step_interval`` steps a rebalance is ``due``. Before the first step the tracker is ``cold``: all loads are
    equal.

    Raises:
        PlacementError: a number is no whole number of at least 1, or more than can be meant, or ``decay`` is not
            between 0 and 1.

    Example:
        >>> from counterflow import LoadTracker
        >>> tracker = LoadTracker(num_layers=1, num_experts=2, window_size=2, step_interval=3)
        >>> tracker.cold, tracker.loads().tolist()
        (True, [[1.0, 1.0]])
        >>> for counts in [[9, 0]], [[1, 3]], [[2, 2]]:
        ...     tracker.add(counts)
        >>> tracker.loads().tolist(), tracker.due()
        ([[3.0, 5.0]], True)
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        window_size: int = 1000,
        step_interval: int = 3000,
        decay: float | None = None,
    ) -> None:
        self.num_layers = whole_number("num_layers", num_layers)
        self.num_experts = whole_number("num_experts", num_experts)
        if self.num_layers * self.num_experts > MOST_COUNTS:
            raise PlacementError(
                f"{self.num_layers} layers of {self.num_experts} experts are too many; give {MOST_COUNTS} at most"
            )
        self.window_size = whole_number("window_size", window_size)
        self.step_interval = whole_number("step_interval", step_interval)
        self.decay = None if decay is None else _as_decay(decay)
        self.num_steps = 0
        # Two stacks make a queue without a subtraction, after which small loads would carry the error of large ones
        # long gone: of the newer steps there is the sum, of the older ones all sums that end with the newest of them.
        self._recent: list[Floats] = []
        self._recent_sum: Floats = np.zeros((self.num_layers, self.num_experts))
        self._older: list[Floats] = []

    @property
    def cold(self) -> bool:
        """Whether there has been no step yet, so that the loads are equal for want of anything better."""
        return self.num_steps == 0

    def add(self, counts: object) -> None:
        """Take in one step: the tokens that the router sent to each expert, [layers, experts].

        Raises:
            PlacementError: the counts are no loads (see ``as_loads``), or of other layers and experts; nothing has
                changed then.
        """
        step = as_loads(counts)
        if step.shape != (self.num_layers, self.num_experts):
            raise PlacementError(
                f"the counts are for {step.shape[0]} layers and {step.shape[1]} experts, the tracker for "
                f"{self.num_layers} and {self.num_experts}: add the counts of the model it was made for"
            )
        self.num_steps += 1
        if self.decay is not None:
            self._recent_sum = self._recent_sum * self.decay + step
            return
        self._recent.append(step.copy())
        self._recent_sum = self._recent_sum + step
        if self.num_steps > self.window_size:
            if not self._older:
                self._older = list(accumulate(reversed(self._recent), np.add))
                self._recent, self._recent_sum = [], np.zeros_like(step)
            self._older.pop()

    def loads(self) -> Floats:
        """The load of every expert, float64 [layers, experts]: the window's sum, or the average; all 1 while cold."""
        if self.cold:
            return np.ones((self.num_layers, self.num_experts))
        if self.decay is not None:
            weight = -math.expm1(self.num_steps * math.log(self.decay)) / (1.0 - self.decay)
            return self._recent_sum / weight
        return self._recent_sum + self._older[-1] if self._older else self._recent_sum.copy()

    def due(self) -> bool:
        """Whether this is the moment for a rebalance: just after every ``step_interval``-th step."""
        return not self.cold and self.num_steps % self.step_interval == 0

    @staticmethod
    def merge(trackers: Iterable[LoadTracker]) -> LoadTracker:
        """One tracker that has seen, in every step, what all of these together have seen: those of several ranks.

        Raises:
            PlacementError: there is none, one of them is something else, or they differ in size, in how they forget,
                or in the steps they have seen.

        Example:
            >>> from counterflow import LoadTracker
            >>> ranks = [LoadTracker(1, 2), LoadTracker(1, 2)]
            >>> ranks[0].add([[5, 1]]), ranks[1].add([[0, 2]])
            (None, None)
            >>> LoadTracker.merge(ranks).loads().tolist()
            [[5.0, 3.0]]
        """
        if not isinstance(trackers, Iterable):
            raise PlacementError(f"the trackers are a {type(trackers).__name__}; give a list, with that of each rank")
        together = list(trackers)
        if not together:
            raise PlacementError("there is no tracker to merge; give at least one")
        first = together[0]
        for number, other in enumerate(together):
            if not isinstance(other, LoadTracker):
                raise PlacementError(f"tracker {number} is a {type(other).__name__}; give the LoadTracker of each rank")
            for name in ("num_layers", "num_experts", "window_size", "step_interval", "decay", "num_steps"):
                ours, theirs = getattr(first, name), getattr(other, name)
                if ours != theirs:
                    raise PlacementError(
                        f"tracker {number} has {name} {theirs}, tracker 0 {ours}; "
                        f"merge those of ranks that have taken in the same steps"
                    )
        merged = LoadTracker(first.num_layers, first.num_experts, first.window_size, first.step_interval, first.decay)
        merged.num_steps = first.num_steps
        merged._recent_sum = _sum([tracker._recent_sum for tracker in together])
        merged._recent = [_sum(steps) for steps in zip(*(tracker._recent for tracker in together), strict=True)]
        merged._older = [_sum(steps) for steps in zip(*(tracker._older for tracker in together), strict=True)]
        return merged

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to ``path`` as .npz, wholly or not at all, so that ``load`` goes on where it stands.

        Raises:
            OSError: the folder cannot be made or written to.

        Example:
            >>> import tempfile, pathlib
            >>> from counterflow import LoadTracker
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "loads.npz"
            >>> tracker = LoadTracker(1, 2, decay=0.5)
            >>> tracker.add([[3, 1]])
            >>> tracker.save(path)
            >>> LoadTracker.load(path).loads().tolist()
            [[3.0, 1.0]]
        """
        kept = self._recent if self.decay is None else [self._recent_sum]
        shape = (-1, self.num_layers, self.num_experts)
        data = io.BytesIO()
        np.savez(
            data,
            format=FORMAT,
            window_size=self.window_size,
            step_interval=self.step_interval,
            decay=0.0 if self.decay is None else self.decay,
            num_steps=self.num_steps,
            older=np.reshape(self._older, shape),
            recent=np.reshape(kept, shape),
        )
        write_bytes(path, data.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoadTracker:
        """The tracker that ``save`` wrote to ``path``.

        Raises:
            PlacementError: it cannot be read, or holds no tracker; the message names the file.
        """
        path = Path(path)
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = {name: np.asarray(file[name]) for name in _ARRAYS}
        except Exception as error:  # numpy and zipfile raise a dozen kinds for what is in a broken file
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise PlacementError(f"{path}: no tracker can be read ({reason}); give a file that save wrote") from None
        if arrays["format"].tolist() != FORMAT:
            raise PlacementError(
                f"{path}: the tracker has format {reprlib.repr(arrays['format'].tolist())}; "
                f"this version reads format {FORMAT}"
            )
        try:
            return cls._from_arrays(arrays)
        except (PlacementError, ValueError, TypeError, OverflowError) as error:
            raise PlacementError(f"{path}: this is no whole tracker ({error}); write it with save") from None

    @classmethod
    def _from_arrays(cls, arrays: dict[str, np.ndarray[Any, Any]]) -> LoadTracker:
        older, recent = arrays["older"], arrays["recent"]
        for sums in (older, recent):
            if sums.dtype != np.float64 or sums.ndim != 3 or not (np.isfinite(sums) & (sums >= 0)).all():
                raise PlacementError("the steps it kept are no loads")
        window_size, step_interval, num_steps = (
            operator.index(arrays[name].item()) for name in ("window_size", "step_interval", "num_steps")
        )
        decay = arrays["decay"].item() or None
        tracker = cls(recent.shape[1], recent.shape[2], window_size, step_interval, decay)
        kept = min(num_steps, window_size) if decay is None else 1
        if older.shape[1:] != recent.shape[1:] or len(older) + len(recent) != kept:
            raise PlacementError(f"of {num_steps} steps it kept {len(older)} and {len(recent)}")
        tracker.num_steps = num_steps
        tracker._older, tracker._recent = list(older), list(recent) if decay is None else []
        tracker._recent_sum = sum(recent, tracker._recent_sum)
        return tracker


def _as_decay(value: Any) -> float:
    try:
        decay = float(value)
    except Exception:  # whatever it is: the caller is owed one sentence about it
        decay = math.nan
    if not 0.0 < decay < 1.0:
        raise PlacementError(f"the decay is {reprlib.repr(value)}; it has to lie between 0 and 1, such as 0.99")
    return decay


def _sum(arrays: Iterable[Floats]) -> Floats:
    return np.asarray(np.sum(list(arrays), axis=0))
