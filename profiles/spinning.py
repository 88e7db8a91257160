"""Thread blocks that are there and do nothing: what transfers by multiprocessors cost before they move a byte."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

WARPS = 16  # as many as those of counterflow.runtime.copy_kernel


@triton.jit
def spin_kernel(ns, done):
    """Each block watches the clock for so many nanoseconds."""
    now = globaltimer()
    end = now + ns
    while now < end:
        now = globaltimer()
    tl.store(done + tl.program_id(0), now)


def spin(ctas: int, ms: float) -> None:
    """On the current stream."""
    done = torch.empty(ctas, dtype=torch.int64, device="cuda")
    spin_kernel[(ctas,)](round(ms * 1e6), done, num_warps=WARPS)
