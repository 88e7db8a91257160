"""What each rank holds over time, for the curves under a picture's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from counterflow.timeline.intervals import Ns

HELD = "activations held"
"""What the curves show."""
Unit = Literal["activations", "bytes"]
Values = npt.NDArray[np.integer[Any]] | npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Memory:
    """For each rank when what it holds changes, and what it holds from then on, in ``unit``.

    A curve is two arrays of shape [changes]: times in nanoseconds, on the timeline's clock, and values; such as
    ``counterflow.simulator.activations_over_time`` returns for each rank.

    Example:
        >>> from counterflow import Costs, one_f_one_b, simulate
        >>> from counterflow.simulator import activations_over_time
        >>> schedule = one_f_one_b(4, 8)
        >>> Memory(activations_over_time(schedule, simulate(schedule, Costs()))).most
        4
    """

    curves: Sequence[tuple[Ns, Values]]
    unit: Unit = "activations"

    @property
    def most(self) -> int:
        """The largest value of any rank."""
        return max((int(held.max(initial=0)) for _, held in self.curves), default=0)


def without_dips(times: Ns, held: Values) -> Iterator[tuple[int, float]]:
    """The curve's points, without what was held for no time at all, unless it was more than before and after.

    Example:
        >>> import numpy as np
        >>> list(without_dips(np.array([0, 5, 5, 9, 9]), np.array([2, 1, 2, 3, 0])))
        [(0, 2), (5, 2), (9, 3), (9, 0)]
    """
    before = 0.0
    for time, group in groupby(zip(times.tolist(), held.tolist(), strict=True), key=lambda point: point[0]):
        values = [value for _, value in group]
        if max(values) > max(before, values[-1]):
            yield time, max(values)
        before = values[-1]
        yield time, before


def amount(value: int, unit: Unit, short: bool = False) -> str:
    """A value of a curve as text.

    Example:
        >>> amount(1, "activations"), amount(2_500_000, "bytes"), amount(9, "activations", short=True)
        ('1 activation', '2.5 MB', '9')
    """
    if unit == "activations":
        return str(value) if short else f"{value} activation{'s' * (value != 1)}"
    for size, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value} B"
