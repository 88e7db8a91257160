"""First weights that depend on what a weight is, and not on when or where it is made."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw(weight: Tensor, *key: object) -> None:
    """Fill ``weight`` [..., in] with normal numbers of variance 1/in that follow from ``key``; a meta tensor stays one.

    They are the same in every process on devices of one kind.
    """
    if weight.is_meta:
        return
    number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7])
    generator = torch.Generator(weight.device).manual_seed(number)
    with torch.no_grad():
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
