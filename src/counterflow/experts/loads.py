"""Whatever holds expert loads becomes one array of float64, or one sentence that says why not."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from counterflow.errors import PlacementError

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

MOST_EXPERTS = 2**24
LARGEST_LOAD = np.float64(np.finfo(np.float32).max)


def as_loads(loads: object) -> Floats:
    """The load of every expert as float64 [layers, experts]; one dimension is one layer.

    ``loads`` is anything numpy reads as numbers, or a torch tensor on any device. The array that comes back may share
    memory with it.

    Raises:
        PlacementError: it holds no numbers, NaN, infinity, a negative load, one beyond float32 (which routers count
            in, and in which the published algorithm computes), no layer or no expert, or has other dimensions.

    Example:
        >>> from counterflow.experts import as_loads
        >>> as_loads([3, 1, 2])
        array([[3., 1., 2.]])
    """
    return checked_loads(_as_array(loads)).astype(np.float64, copy=False)


def as_float32(loads: object) -> NDArray[np.float32]:
    """The load of every expert as the published algorithm sees it: rounded once, from whatever type it came in.

    Raises:
        PlacementError: as ``as_loads``.
    """
    array = checked_loads(_as_array(loads))
    return np.ascontiguousarray(array.astype(np.float32))


def checked_loads(array: NDArray[Any]) -> NDArray[Any]:
    """``array`` as [layers, experts] in its own type, once it is known to hold loads."""
    if array.dtype.kind not in "biuf":
        raise PlacementError(
            f"the loads are of type {array.dtype}; they have to be real numbers: give counts of tokens"
        )
    if array.ndim not in (1, 2):
        raise PlacementError(
            f"the loads have shape {list(array.shape)}; they have to be [layers, experts], or [experts] of one layer: "
            f"sum over the other dimensions"
        )
    array = array.reshape(1, -1) if array.ndim == 1 else array
    if array.size == 0 or array.shape[1] > MOST_EXPERTS:
        raise PlacementError(
            f"the loads have {array.shape[0]} layers and {array.shape[1]} experts; "
            f"at least one layer and 1 to {MOST_EXPERTS} experts are needed: give a row for each layer"
        )
    _refuse_values(array)
    return array


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a torch tensor, told without importing torch."""
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__)


def _is_masked(value: object) -> bool:
    """Whether ``value`` is a masked array, told without importing numpy.ma, a tenth of a first call."""
    return any(kind.__module__.startswith("numpy.ma") for kind in type(value).__mro__)


def _refuse_values(array: NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        layer, expert = np.argwhere(~np.isfinite(array))[0]
        problem, remedy = "has to be finite", "leave out the steps that gave it"
    elif (array < 0).any():
        layer, expert = np.argwhere(array < 0)[0]
        problem, remedy = "cannot be negative", "give counts of tokens"
    elif (array > LARGEST_LOAD).any():
        layer, expert = np.argwhere(array > LARGEST_LOAD)[0]
        problem, remedy = f"has to fit float32, so at most {LARGEST_LOAD:.3g}", "divide all loads by the same number"
    else:
        return
    raise PlacementError(
        f"the load of expert {expert} in layer {layer} is {array[layer, expert]}; a load {problem}: {remedy}"
    )


def _as_array(loads: Any) -> NDArray[Any]:
    if _is_masked(loads):
        raise PlacementError("the loads are a masked array; every expert needs a load: fill the gaps, with .filled(0)")
    try:
        if is_tensor(loads):
            tensor = loads.detach().cpu()
            return np.asarray((tensor.double() if tensor.is_floating_point() else tensor).numpy())
        return np.asarray(loads)
    except Exception as error:  # whatever it is: the caller is owed one sentence about it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlacementError(
            f"the loads, a {type(loads).__name__}, cannot be read as an array ({reason}); "
            f"give rows of equal length: [layers, experts]"
        ) from error
