"""A decoder with latent attention and routed experts, small to read, whose blocks can hide their communication."""

from counterflow.moe.block import MixtureBlock
from counterflow.moe.cache import Decode, LatentCache, Part, Prefill
from counterflow.moe.config import PRESETS, ModelConfig
from counterflow.moe.inference.generate import generate
from counterflow.moe.inference.prefill import prefill, split_prompts
from counterflow.moe.model import balance_routing, mixture_blocks, run, stage, stages, take_counts

__all__ = [
    "PRESETS",
    "Decode",
    "LatentCache",
    "MixtureBlock",
    "ModelConfig",
    "Part",
    "Prefill",
    "balance_routing",
    "generate",
    "mixture_blocks",
    "prefill",
    "run",
    "split_prompts",
    "stage",
    "stages",
    "take_counts",
]
