"""Communication that takes SMs: rows leave the GPU and come back, all of it done by a number of thread blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARPS = 32
"""So large that no more than two blocks get into one multiprocessor, which alone could not fill the wire."""
_AWAY = 4
"""So many pieces of a block have room in host memory; one comes back while the next one leaves."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def loopback_kernel(source, target, host, abroad, BLOCK: tl.constexpr, AWAY: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Each block carries every so many-th piece of ``BLOCK`` words of 8 bytes, with room of its own in ``host``."""
    place = tl.arange(0, BLOCK)
    room = host + tl.program_id(0) * AWAY * BLOCK
    step = tl.num_programs(0) * BLOCK
    first = tl.program_id(0) * BLOCK
    pieces = tl.cdiv(abroad - first, step)
    for number in range(0, pieces + 1):
        if number > 0:
            back = first + (number - 1) * step + place
            came = tl.load(room + ((number - 1) % AWAY) * BLOCK + place, mask=back < abroad)
            tl.store(target + back, came, mask=back < abroad)
        if number < pieces:
            out = first + number * step + place
            tl.store(
                room + (number % AWAY) * BLOCK + place, tl.load(source + out, mask=out < abroad), mask=out < abroad
            )
        # A thread block reads what its own threads have written, so a barrier among them is enough.
        tl.debug_barrier()


def host_bytes(ctas: int) -> int:
    """How much pinned memory ``carry`` needs."""
    return ctas * _AWAY * _words(ctas) * 8


def _words(ctas: int) -> int:
    """Of a piece: together just enough to fill the wire, for more on their way to the host delay everyone's memory."""
    return 1 << (8191 // ctas).bit_length()  # a power of 2, for a tile


def carry(target: Tensor, source: Tensor, host: Tensor, ctas: int) -> None:
    """``source`` to ``target`` through ``host``, by ``ctas`` blocks on the current stream.

    All are flat, of bytes, and of a multiple of 8.
    """
    words = [tensor.view(torch.int64) for tensor in (source, target, host)]
    loopback_kernel[(ctas,)](*words, len(words[0]), BLOCK=_words(ctas), AWAY=_AWAY, num_warps=_WARPS)
