"""What is this kernel? Decided by how its function's name begins, never by what stands somewhere inside it.

A communication kernel's name may stand in another kernel's template arguments (a CUB transform over
``dpsk::ep::…``), so every pattern is anchored to the start of the function's qualified name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.errors import TraceError
from counterflow.timeline import TWINS_OF
from counterflow.trace.columns import COMMUNICATION_SPAN, COMPUTE_SPAN, KERNEL, GpuWork, Ints

CLASSES = ("compute", "transfer", "waiting", "preparing", "memory", "unknown")
"""Transfers, waiting and preparing are communication: moving data, waiting for peers, counting what to send."""

COMPUTE, TRANSFER, WAITING, PREPARING, MEMORY, UNKNOWN_KERNEL = range(len(CLASSES))
COMMUNICATION = (TRANSFER, WAITING, PREPARING)

_DEEP_EP = r"(?:\w+::)*(?:deep_ep|dpsk::ep|nixl_ep|uccl)::(?:\w+::)*"
_SYMMETRIC = r"(?:c10d::|symmetric_memory::|nvshmem_extension::|at::native::|\{anonymous\}::)*"

# The first rule whose pattern matches the start of the name decides.
RULES: tuple[tuple[str, str, str], ...] = (
    # whose                class        how the function's name begins
    # Inductor names a fusion after the graph's nodes around it, collectives among them: what it runs is compute.
    ("Inductor", "compute", r"triton_[a-z]+_fused_"),
    ("DeepEP and its kin", "waiting", _DEEP_EP + r"(?:notify_\w+|cached_notify\w*|barrier\w*)"),
    ("DeepEP and its kin", "preparing", _DEEP_EP + r"(?:get_dispatch_layout|clean_low_latency_buffer)"),
    ("DeepEP and its kin", "transfer", _DEEP_EP),
    ("NCCL, RCCL", "transfer", r"[nr]ccl\w*Kernel"),
    ("MSCCL", "transfer", r"msccl(?:Kernel\w*|pp::)"),
    ("NVSHMEM", "waiting", r"(?:nvshmem|rocshmem)\w*?(?:barrier|sync|wait|quiet|fence)"),
    ("NVSHMEM", "transfer", r"(?:nvshmem|rocshmem)"),
    ("NVSHMEM", "waiting", r"(?:barrier|sync)\w*_on_stream_kernel"),
    ("NVSHMEM", "transfer", r"(?:broadcast|fcollect|rdxn)\w*_on_stream_kernel"),
    ("symmetric memory", "waiting", _SYMMETRIC + r"(?:(?:barrier|wait_signal)_kernel|exchangeSplitAndOffset)"),
    ("symmetric memory", "transfer", _SYMMETRIC + r"(?:multimem_\w+|(?:one|two)_shot_all_reduce\w*|put_signal_kernel)"),
    ("expert transfers", "preparing", r"(?:\w+::)*moeA2APrepare"),
    ("expert transfers", "transfer", r"(?:\w+::)*(?:a2a_(?:dispatch|combine)|moeA2A(?:Dispatch|Combine))"),
    ("expert transfers", "transfer", r"(?:\w+::)*(?:hybrid_ep|pplx|mori)::|mooncake::(?:\w+::)*(?:dispatch|combine)"),
    ("expert transfers", "transfer", r"Ep(?:Dispatch|Combine)\w*Kernel|kernel_(?:dispatch|combine)_token"),
    ("user buffers", "transfer", r"(?:\w+::)*k?userbuffers_"),
    ("custom all-reduce", "transfer", r"(?:[\w{}]+::)*(?:cross_device_reduce|quickreduce)"),
    (
        "named after a collective",
        "transfer",
        r"(?:[\w{}]+::)*\w*?(?:all_?reduce|all_?gather|reduce_?scatter|all_?to_?all)(?!\w*::)",
    ),
    ("copy between GPUs", "transfer", r"Memcpy (?:PtoP|P2P)"),
    ("AMD's fills and copies", "memory", r"__amd_rocclr_(?:fill|copy)"),  # elsewhere they are no kernels
    ("PyTorch's own", "compute", r"at::native::"),
)

LONG_NS = 50_000
"""A kernel of unknown purpose is worth telling from here on."""

_LONGEST_NAME = 10_000
_NO_FUNCTIONS = ("Memcpy", "Memset", TWINS_OF.format(""))


@dataclass(frozen=True)
class Rule:
    """One line of a rules file: a pattern, a stream, or both, and the class of what they meet."""

    kind: int
    pattern: re.Pattern[str] | None = None
    stream: int | None = None


@dataclass(frozen=True)
class Rules:
    """The built-in rules, with a user's own before them.

    Example:
        >>> from counterflow.trace import Rules
        >>> Rules().of_name("void deep_ep::internode::dispatch<true>(int)")
        'transfer'
        >>> Rules().of_name("void cub::Transform<dpsk::ep::Layout>(int)")
        'compute'
    """

    own: tuple[Rule, ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Rules:
        """Read a rules file: ``{"rules": [{"pattern": "my_all_to_all", "class": "transfer"}, {"stream": 27, …}]}``.

        A pattern is a regular expression, anchored to the start of the function's name.

        Raises:
            TraceError: the file cannot be read, or a rule in it is malformed.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TraceError(f"{path} cannot be read as rules: {error}") from None
        rules = data.get("rules") if isinstance(data, dict) else None
        if not isinstance(rules, list):
            raise TraceError(f'{path} holds no rules; it needs {{"rules": [{{"pattern": …, "class": …}}]}}')
        return cls(tuple(_rule(path, number, rule) for number, rule in enumerate(rules)))

    def of_name(self, name: str) -> str:
        """The class of a kernel's name, its stream and neighbours aside."""
        function = function_of(name)
        for rule in self.own:
            if rule.stream is None and rule.pattern is not None and rule.pattern.match(function):
                return CLASSES[rule.kind]
        told = _built_in(function)
        return CLASSES[COMPUTE if told is None else told]

    def classify(self, work: GpuWork, names: Sequence[str], sms: dict[int, int]) -> Ints:
        """For each piece of work the index of its class in ``CLASSES``, shape [work]."""
        functions = {name: function_of(names[name]) for name in np.unique(work.name).tolist()}
        table = np.full(len(names), COMPUTE, dtype=np.int32)
        strangers = []
        for name, function in functions.items():
            told = _built_in(function)
            if told is None:
                strangers.append(name)
            else:
                table[name] = told
        classes = table[work.name] if len(names) else np.zeros(0, dtype=np.int32)
        classes[(work.kind > KERNEL) & (classes == COMPUTE)] = MEMORY
        classes[work.kind == COMPUTE_SPAN] = COMPUTE
        classes[work.kind == COMMUNICATION_SPAN] = TRANSFER
        classes[_strange(work, classes, sms) & np.isin(work.name, strangers)] = UNKNOWN_KERNEL
        for rule in reversed(self.own):
            met = np.ones(len(work), dtype=bool) if rule.stream is None else work.stream == rule.stream
            if rule.pattern is not None:
                meets = [name for name, function in functions.items() if rule.pattern.match(function)]
                met &= np.isin(work.name, meets)
            classes[met] = rule.kind
        return classes


def function_of(name: str) -> str:
    """A kernel's qualified name, without return type, template arguments and parameters.

    Example:
        >>> function_of("void dpsk::ep::internode::combine<false>(int4*)")
        'dpsk::ep::internode::combine'
        >>> function_of("std::enable_if<((8)>(0))>::type vllm::norm<int>(int, float)")
        'vllm::norm'
        >>> function_of("_ZN7deep_ep9intranode8dispatchILi8EEEvPi")
        'deep_ep::intranode::dispatch'
    """
    name = name.strip().replace("(anonymous namespace)", "{anonymous}")
    if name.startswith("_ZN"):
        return "::".join(_parts(name[3:])) or name
    if name.startswith(_NO_FUNCTIONS):
        return name
    open_brackets: list[str] = []
    outside: list[str] = []
    for letter in name[:_LONGEST_NAME]:
        if letter in "<(":
            if letter == "(" and not open_brackets:
                break
            open_brackets.append(letter)
        elif letter == ")":
            while open_brackets and open_brackets.pop() != "(":
                pass
        elif letter == ">" and open_brackets and open_brackets[-1] == "<":
            open_brackets.pop()
        elif not open_brackets:
            outside.append(letter)
    words = "".join(outside).split()
    return words[-1] if words else name


def _parts(mangled: str) -> list[str]:
    parts = []
    while found := re.match(r"[1-9]\d{0,2}", mangled):
        size = int(found[0])
        parts.append(mangled[found.end() : found.end() + size])
        mangled = mangled[found.end() + size :]
    return parts


_BUILT_IN = tuple(
    (re.compile(pattern, re.IGNORECASE if whose.startswith("named") else 0), CLASSES.index(kind))
    for whose, kind, pattern in RULES
)


def _built_in(function: str) -> int | None:
    """The class by the first rule that knows the name; None where none does."""
    return next((kind for pattern, kind in _BUILT_IN if pattern.match(function)), None)


def _strange(work: GpuWork, classes: Ints, sms: dict[int, int]) -> npt.NDArray[np.bool_]:
    """Long kernels on few blocks, on a stream that has no others, beside one that has: maybe a new communication."""

    def small(here: npt.NDArray[np.bool_], device: int) -> bool:
        blocks = work.blocks[here]
        return bool(blocks.min() > 0 and blocks.max() <= sms.get(device, 0) // 2)

    kernels = (work.kind == KERNEL) & (classes == COMPUTE)
    strange = np.zeros(len(work), dtype=bool)
    for device in np.unique(work.device).tolist():
        on = kernels & (work.device == device)
        few = [stream for stream in np.unique(work.stream[on]).tolist() if small(on & (work.stream == stream), device)]
        if not np.isin(work.stream[on], few).all():
            strange |= on & np.isin(work.stream, few) & (work.end_ns - work.start_ns >= LONG_NS)
    return strange


def _rule(path: object, number: int, rule: Any) -> Rule:
    where = f"{path}: rule {number}"
    if not isinstance(rule, dict) or rule.get("class") not in (*CLASSES, "communication"):
        raise TraceError(f'{where} has no class; it needs "class", one of {", ".join(CLASSES)}')
    kind = "transfer" if rule["class"] == "communication" else rule["class"]
    pattern, stream = rule.get("pattern"), rule.get("stream")
    if pattern is None and stream is None:
        raise TraceError(f'{where} meets nothing; it needs a "pattern" of text, a "stream" number, or both')
    if not isinstance(pattern, str | None) or not (stream is None or type(stream) is int):
        raise TraceError(f'{where} has a "pattern" that is no text, or a "stream" that is no whole number')
    try:
        compiled = None if pattern is None else re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise TraceError(f"{where} has the pattern {pattern!r}, which is no regular expression: {error}") from None
    return Rule(CLASSES.index(kind), compiled, stream)
