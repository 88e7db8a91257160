"""What the demo trains: a byte-level decoder, cut into stages, on the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
CONTEXT = 128
WIDTH = 192
HEADS = 3
BLOCKS = 8


class Block(nn.Module):
    """Causal self-attention, then an MLP, each on a normed residual: [batch, time, width] in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        batch, time, _ = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, time, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        out: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return out


class DecoderStage(nn.Module):
    """A contiguous slice of the decoder: bytes come into the first, logits leave the last.

    An ordinary module: nothing in it knows of pipelines.
    """

    def __init__(self, index: int, num_stages: int) -> None:
        super().__init__()
        torch.manual_seed(index)
        first, last = index == 0, index == num_stages - 1
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if first else None
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH)) if first else None
        self.blocks = nn.ModuleList(Block() for _ in range(blocks_of(index, num_stages)))
        self.norm = nn.LayerNorm(WIDTH) if last else None
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False) if last else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time] bytes or [batch, time, width] hidden, to hidden or [batch, time, 256] logits."""
        if self.embed is not None and self.position is not None:
            x = self.embed(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def blocks_of(index: int, num_stages: int) -> int:
    """How many of the decoder's blocks stage ``index`` holds: as even as can be, at least one."""
    blocks = max(BLOCKS, num_stages)
    return (index + 1) * blocks // num_stages - index * blocks // num_stages


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean loss in nats for each byte; logits [batch, time, 256], target [batch, time]."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class StandardLibrary:
    """The .py files of this Python's standard library as one text; its last twentieth is held out."""

    def __init__(self) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(data) * 19 // 20
        self.num_bytes = len(data)
        self._parts = {"train": data[:cut], "held out": data[cut:]}

    def batch(self, part: str, seed: int, num_microbatches: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and targets of each micro-batch, [size, 128] bytes; the same on every rank for the same ``seed``."""
        data = self._parts[part]
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(data) - CONTEXT - 1, (num_microbatches * size,), generator=generator)
        windows = torch.stack([data[start : start + CONTEXT + 1] for start in starts.tolist()])
        chunks = windows.chunk(num_microbatches)
        return [chunk[:, :-1] for chunk in chunks], [chunk[:, 1:] for chunk in chunks]
