"""Root mean square norms: in one kernel where there is one, else torch's own."""

from __future__ import annotations

from torch import Tensor, nn

from counterflow.moe.kernels import kernels_run_in_bfloat16


class Norm(nn.RMSNorm):
    """torch's norm of the last features; in bfloat16 on a GPU, without gradient, by a kernel quick with few rows."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width)
        self.eps: float = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., width], normed."""
        if not kernels_run_in_bfloat16(x):
            return super().forward(x)
        from counterflow.moe.kernels.rows_kernel import norm_by_kernel

        return norm_by_kernel(x, self.weight, self.eps)[1]

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both [..., width], and that normed."""
        if not kernels_run_in_bfloat16(x):
            total = x + added
            return total, self(total)
        from counterflow.moe.kernels.rows_kernel import norm_by_kernel

        return norm_by_kernel(x, self.weight, self.eps, added)
