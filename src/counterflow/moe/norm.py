"""Root mean square norms: in one kernel where there is one, else torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterflow.moe.kernels import kernels_run


class Norm(nn.RMSNorm):
    """torch's norm of the last features; in bfloat16 on a GPU, without gradient, by a kernel quick with few rows."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width)
        self.eps: float = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., width], normed."""
        if not self._has_kernel(x):
            return super().forward(x)
        from counterflow.moe.kernels.rows_kernel import norm_by_kernel

        return norm_by_kernel(x, self.weight, self.eps)[1]

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both [..., width], and that normed."""
        if not self._has_kernel(x):
            total = x + added
            return total, self(total)
        from counterflow.moe.kernels.rows_kernel import norm_by_kernel

        return norm_by_kernel(x, self.weight, self.eps, added)

    def _has_kernel(self, x: Tensor) -> bool:
        return x.dtype == torch.bfloat16 and kernels_run(x)
