"""What a kernel's name hints at: a part of a layer, a direction, the edge of a block.

One hint proves nothing (recomputation runs forward kernels in a backward, a GEMM serves every part): they are weighed
along the whole order of kernels in ``kernel_phases``. Unlike the rules that tell communication, these patterns look
anywhere in the name, for attention and grouped GEMMs stand in the template arguments of a general kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LONGEST_NAME = 4_000


@dataclass(frozen=True)
class Hint:
    """``part`` is "attention", "router", "experts", "other" or ""; ``direction`` "F", "B", "W" or "".

    ``routed``: only experts behind a router run it. ``core``: attention itself, or a grouped GEMM. ``opens`` and
    ``closes``: a block of the model often begins, or ends, with it. ``prepares``: it makes grouped products ready, of
    any direction.
    """

    part: str = ""
    direction: str = ""
    routed: bool = False
    core: bool = False
    gemm: bool = False
    opens: bool = False
    closes: bool = False
    prepares: bool = False

    @property
    def router(self) -> bool:
        """Whether it decides which experts a token goes to."""
        return self.part == "router"

    @property
    def activates(self) -> bool:
        """Whether it is the activation inside an MLP, alone or behind a product."""
        return self.part == "experts" and not self.routed


# The first that is found decides the part.
PARTS: tuple[tuple[str, str], ...] = (
    # part       found anywhere in the name, in small letters
    ("routed", r"(?<![a-z])[mk]_grouped|groupproblemshape|group(?:ed)?_?gemm(?!::)|gemmtype\)[12]|grouped_?mm"),
    ("router", r"top_?k(?![a-z]*sampl)|(?<!moe)routing|router|gating|fused_gate"),
    ("routed", r"fused_?moe|fmoe|moe_|moe::|expert|ep_(?:scatter|gather)|permute_(?:kernel|tokens|with)"),
    ("core", r"fmha|sdpa|flash_?(?:fwd|bwd|attn)|flash::|attn_(?:fwd|bwd)|attention|dot_do_o|convert_dq"),
    ("core", r"mla_|_mla|flashinfer::\w*(?:prefill|decode|mla)|flex_attention|(?<![a-z])attn"),
    ("attention", r"rotary|(?<![a-z])rope(?![a-z])|kv_?cache|reshape_and_cache|qk_?norm"),
    ("activation", r"swiglu|silu|geglu|gelu|act_and_mul|swish"),
    ("router", r"(?<!log)(?<!log_)sigmoid"),
    ("other", r"adam|multi_tensor|nll_loss|cross_entropy|argmax|sampling|embedding|multinomial"),
)
BACKWARD = r"backward|bwd|bprop|dgrad|grad_?input|_grad_|computegrad|dot_do_o|convert_dq|cutlassb_"
WEIGHTS = r"wgrad|weight_?grad|grad_?weight|dweight|(?<![a-z])k_grouped|_acc(?:::|\b)|accumulate_?grad"
FORWARD = r"fwd|forward|fprop|cutlassf_"
GEMM = r"gemm|(?<![a-z])bmm_|nvjet|(?<![a-z])cijk_|xmma|matmul|grouped_?mm"
PREPARES = r"(?:prepare|set_?up|compute|get|fill)_\w*(?:gemm|problem|expert)"
NORM = r"(?:layer|rms|group)_?norm|(?<![a-z])ln_(?:fwd|bwd)|rsqrt|pow_tensor"

# Gradients of weights multiply two tensors along their tokens, the outer axis of both: "nt", whoever wrote the model.
_TRANSPOSED = r"nvjet\w*_nt[nt]\b|(?:gemm|xmma)\w*_nt(?:_|\b)|majore1els\w{1,4}_1e|major\)1, ?\([\w:]*major\)1"
_STRIDES = re.compile(r"tuple<(?:cute::c<1>, ?long|long, ?cute::c<1>)")

_PARTS = tuple((part, re.compile(pattern)) for part, pattern in PARTS)
_BACKWARD, _FORWARD, _GEMM, _NORM, _PREPARES = map(re.compile, (BACKWARD, FORWARD, GEMM, NORM, PREPARES))
_WEIGHTS = re.compile(f"{WEIGHTS}|{_TRANSPOSED}")


def hint_of(name: str) -> Hint:
    """What one kernel's name hints at.

    Example:
        >>> hint_of("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<int>(int)").direction
        'B'
        >>> hint_of("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN").direction
        'W'
        >>> hint_of("cutlass::device_kernel<moe::m_grouped_fp8::GemmKernel>").part
        'experts'
    """
    name = name[:_LONGEST_NAME].lower()
    kind = next((part for part, pattern in _PARTS if pattern.search(name)), "")
    direction = _direction(name) or ("F" if kind in ("core", "activation") else "")
    norm = bool(_NORM.search(name))
    prepares = kind == "routed" and bool(_PREPARES.search(name))
    return Hint(
        part={"core": "attention", "routed": "experts", "activation": "experts"}.get(kind, kind),
        direction=direction,
        routed=kind == "routed",
        core=kind == "core",
        gemm=kind != "core" and not prepares and bool(_GEMM.search(name)) and "::utils::" not in name,
        opens=norm and direction != "B",
        closes=norm and direction == "B",
        prepares=prepares,
    )


def _direction(name: str) -> str:
    if _BACKWARD.search(name):
        return "B"
    if _WEIGHTS.search(name) or _sums_over_tokens(name):
        return "W"
    return "F" if _FORWARD.search(name) else ""


def _sums_over_tokens(name: str) -> bool:
    """Whether the first operand of a grouped GEMM lies with its tokens innermost."""
    first = _STRIDES.search(name) if "groupproblemshape" in name else None
    return first is not None and first[0].startswith("tuple<cute::c<1>")
