"""Plain loops over integer arrays: compiled where they are long, run as they stand where they are short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

COMPILED_FROM = 400_000
"""For so many turns, of all calls together, plain Python takes as long as numba takes to load what it compiled."""

_turns_so_far = Counter[Callable[..., Any]]()


def run_loop(kernel: Callable[..., Any], turns: int, *arguments: Any) -> Any:
    """``kernel(*arguments)``, by numba from where it has taken ``turns`` enough in this process to be worth it.

    A kernel indexes int64 arrays, writes into them in place and returns a number; it allocates nothing and calls no
    function. So it runs alike on arrays compiled, and on lists as it stands, which plain Python indexes faster.

    Example:
        >>> import numpy as np
        >>> from counterflow.loops import run_loop
        >>> def fill(values, last):
        ...     for index in range(last):
        ...         values[index] = index * index
        ...     return last
        >>> squares = np.zeros(4, dtype=np.int64)
        >>> run_loop(fill, 4, squares, 4), squares.tolist()
        (4, [0, 1, 4, 9])
    """
    _turns_so_far[kernel] += turns
    if _turns_so_far[kernel] >= COMPILED_FROM:
        return compiled(kernel)(*arguments)
    plain = [argument.tolist() if isinstance(argument, np.ndarray) else argument for argument in arguments]
    result = kernel(*plain)
    for argument, values in zip(arguments, plain, strict=True):
        if isinstance(argument, np.ndarray) and argument.flags.writeable:
            argument[:] = values
    return result


@cache
def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` compiled by numba, kept on disk for the next process where a cache can be written."""
    import numba

    try:
        kept = numba.njit(cache=True)(kernel)
    except RuntimeError:  # numba finds no folder for its cache: every process compiles for itself then
        return numba.njit(kernel)  # type: ignore[no-any-return]

    fast: Callable[..., Any] = kept

    def run(*arguments: Any) -> Any:
        nonlocal fast
        if fast is kept:  # what numba raises here it raises before the loop begins
            with suppress(Exception):
                return kept(*arguments)
            with suppress(Exception):  # the disk was full: by now it is compiled, and only not kept
                return kept(*arguments)
            fast = numba.njit(kernel)  # what lies in the cache is damaged
        return fast(*arguments)

    return run
