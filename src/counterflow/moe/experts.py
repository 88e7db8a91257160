"""The experts: gated products, one for all tokens or one for each group of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow.moe.config import ModelConfig
from counterflow.moe.draw import draw
from counterflow.moe.grouped import grouped_linear
from counterflow.moe.kernels import kernels_run_in_bfloat16, multiplying_pays


class SharedExpert(nn.Module):
    """The experts that every token goes to, as one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.shared_experts * config.intermediate
        self.gate_up = nn.Linear(config.hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        out: Tensor = self.down(gated(self.gate_up(x)))
        return out


class RoutedExperts(nn.Module):
    """The experts in the slots of one rank; ``experts`` says which one is in each.

    Their weights follow from ``key`` and the number of the expert, so that copies of an expert are equal wherever
    they are.
    """

    def __init__(self, config: ModelConfig, experts: Sequence[int], key: tuple[object, ...]) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(len(experts), 2 * config.intermediate, config.hidden))
        self.down = nn.Parameter(torch.empty(len(experts), config.hidden, config.intermediate))
        for (gate_up, down), expert in zip(self.slots(), experts, strict=True):
            draw(gate_up, *key, "gate_up", expert)
            draw(down, *key, "down", expert)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """``rows`` [rows, hidden], those for slot 0 first; ``ends``, int32 [slots], says behind which row each ends."""
        if not multiplying_pays(rows, self.gate_up, self.down):
            return grouped_linear(gated(grouped_linear(rows, self.gate_up, ends)), self.down, ends)
        from counterflow.moe.kernels.grouped_kernel import product_by_kernel

        return product_by_kernel(product_by_kernel(rows, self.gate_up, ends, gated=True), self.down, ends, gated=False)

    def slots(self) -> list[list[Tensor]]:
        """The weights in each slot, as they are in memory: what a ``Migration`` copies experts into."""
        return [[gate_up, down] for gate_up, down in zip(self.gate_up.detach(), self.down.detach(), strict=True)]


def gated(x: Tensor) -> Tensor:
    """The first half of the features [..., 2 width] opens the second: [..., width]."""
    if kernels_run_in_bfloat16(x):
        from counterflow.moe.kernels.rows_kernel import gate_by_kernel

        return gate_by_kernel(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
