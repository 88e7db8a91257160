"""The sizes of a decoder, and three sets of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from counterflow.errors import ModelError


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder with latent attention and routed experts.

    Attention has ``heads`` heads. A query is projected down to ``query_rank`` and up again, keys and values down to
    ``latent`` and up again; a head's query and key have ``nope`` features without a position and ``rope`` with one,
    its value ``value``. A token goes to ``top_k`` of ``experts`` experts, which lie in ``top_groups`` of ``groups``
    groups, and to ``shared_experts`` more; each is ``intermediate`` wide. The weights of a token's experts add up to
    ``routed_scaling``.

    Raises:
        ModelError: a size is no whole number of at least 1, or sizes do not fit each other.

    Example:
        >>> from counterflow.moe import PRESETS
        >>> PRESETS["v3-layer"].experts, PRESETS["v3-layer"].latent_width
        (256, 576)
    """

    vocabulary: int
    layers: int
    hidden: int
    heads: int
    query_rank: int
    latent: int
    nope: int
    rope: int
    value: int
    intermediate: int
    experts: int
    groups: int
    top_groups: int
    top_k: int
    shared_experts: int = 1
    routed_scaling: float = 1.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if field.type == "int" and (type(size) is not int or size < 1):
                raise ModelError(f"{field.name} is {size!r}; it has to be a whole number of at least 1")
        if self.rope % 2:
            raise ModelError(f"rope is {self.rope}; it has to be even, for features are turned in pairs")
        if self.experts % self.groups:
            raise ModelError(f"{self.experts} experts do not divide into {self.groups} groups; give a divisor")
        if self.top_groups > self.groups:
            raise ModelError(f"top_groups is {self.top_groups} of {self.groups} groups; give at most {self.groups}")
        open_experts = self.top_groups * (self.experts // self.groups)
        if self.top_k > open_experts:
            raise ModelError(
                f"top_k is {self.top_k}, and {self.top_groups} groups have {open_experts} experts; give at most those"
            )

    @property
    def latent_width(self) -> int:
        """What a cache keeps of a token in a layer: the latent, and the rotated part of its key."""
        return self.latent + self.rope


PRESETS = {
    "tiny": ModelConfig(
        vocabulary=256,
        layers=4,
        hidden=64,
        heads=4,
        query_rank=32,
        latent=32,
        nope=16,
        rope=8,
        value=16,
        intermediate=32,
        experts=16,
        groups=4,
        top_groups=2,
        top_k=4,
        routed_scaling=2.5,
    ),
    "small": ModelConfig(
        vocabulary=32768,
        layers=8,
        hidden=1024,
        heads=16,
        query_rank=512,
        latent=256,
        nope=64,
        rope=32,
        value=64,
        intermediate=512,
        experts=64,
        groups=8,
        top_groups=4,
        top_k=8,
        routed_scaling=2.5,
    ),
    "v3-layer": ModelConfig(
        vocabulary=129280,
        layers=1,
        hidden=7168,
        heads=128,
        query_rank=1536,
        latent=512,
        nope=128,
        rope=64,
        value=128,
        intermediate=2048,
        experts=256,
        groups=8,
        top_groups=4,
        top_k=8,
        routed_scaling=2.5,
    ),
}
"""Parameters of a block, and of all blocks with embedding and head:

| preset | a block | all | what for |
|---|---|---|---|
| tiny | 0.12 million | 0.52 million | tests, in double precision on a CPU |
| small | 105 million | 911 million | one GPU |
| v3-layer | 11,507 million | 13,361 million | one layer of DeepSeek-V3 at its real widths |

Source: the configuration published with DeepSeek-V3 (arXiv 2412.19437, section 4.2).
"""
