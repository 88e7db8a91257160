"""Causal attention by whichever kernel suits the sizes; which one is settled when they are first met."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of n queries over the m >= n keys that end with their own: [batch, heads, n, width of a value].

    ``query`` is [batch, heads, n, width], ``key`` [batch, heads, m, width], ``value`` [batch, heads, m, any width].
    """
    half_precision = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if key.shape[2] > query.shape[2]:
        return _padded_behind(query, key, value) if half_precision else _masked(query, key, value)
    if half_precision and key.shape[2] == 1:  # which is too short for cuDNN
        return _padded(query, key, value)
    return kernel_for(half_precision, query.shape[3], value.shape[3])(query, key, value)


@cache
def kernel_for(half_precision: bool, width: int, value_width: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel for as many keys as queries.

    torch's own choice on a GPU, for values narrower than keys, is several times slower than either of the others.
    """
    if not half_precision or width == value_width:
        return _plain
    return _cudnn if torch.backends.cudnn.is_available() else _padded  # type: ignore[no-untyped-call]


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _plain(query, key, value)


def _padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With values as wide as keys, as the flash kernel needs them."""
    return _plain(query, key, F.pad(value, (0, key.shape[3] - value.shape[3])))[..., : value.shape[3]]


def _padded_behind(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    wide = F.pad(value, (0, key.shape[3] - value.shape[3]))
    behind = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, wide, attn_mask=behind)[..., : value.shape[3]]


def _masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    before = key.shape[2] - query.shape[2]
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(before)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
