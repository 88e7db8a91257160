"""A stage as the engine sees it: blocks in a row, what stands between them, and what it would pass by."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from counterflow.errors import PipelineError
from counterflow.runtime.blocks import OverlapBlock


@dataclass(frozen=True)
class Chunk:
    """A module as blocks: ``before[i]`` stands in front of block i, ``behind`` follows the last one."""

    blocks: tuple[OverlapBlock, ...]
    before: tuple[tuple[nn.Module, ...], ...]
    behind: tuple[nn.Module, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Chunk | None:
        """The blocks of ``module``, an ``nn.Sequential`` of blocks and other modules; None where there are none.

        Blocks within other modules run as these do, with nothing hidden; a warning says so.

        Raises:
            PipelineError: a block has a forward or hooks of its own, which the engine would pass by.
        """
        blocks: list[OverlapBlock] = []
        before: list[tuple[nn.Module, ...]] = []
        since: list[nn.Module] = []
        for item in _in_sequence(module):
            if isinstance(item, OverlapBlock):
                blocks.append(item)
                before.append(tuple(since))
                since = []
            else:
                since.append(item)
                _warn_of_blocks_in(item)
        if not blocks:
            return None
        for part in (*blocks, *_opened(module)):
            _refuse_detours(part)
        return cls(tuple(blocks), tuple(before), tuple(since))

    @property
    def shared(self) -> list[bool]:
        """Which blocks have work that needs no rows."""
        return [block.has_shared for block in self.blocks]


def _opens(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _opened(module: nn.Module) -> Iterator[nn.Module]:
    """The sequentials whose items the engine calls itself."""
    if _opens(module):
        yield module
        for item in module.children():
            yield from _opened(item)


def _in_sequence(module: nn.Module) -> Iterator[nn.Module]:
    if _opens(module):
        for item in module:  # not its children, of which a module that stands twice is one
            yield from _in_sequence(item)
    else:
        yield module


def _warn_of_blocks_in(module: nn.Module) -> None:
    if any(isinstance(part, OverlapBlock) for part in module.modules()):
        warnings.warn(
            f"{type(module).__name__} is no nn.Sequential, so nothing hides the transfers of the blocks in it; put "
            "them into an nn.Sequential, or into the stage itself",
            stacklevel=2,
        )


def _refuse_detours(module: nn.Module) -> None:
    name = type(module).__name__
    inherited = type(module).forward in (OverlapBlock.forward, nn.Sequential.forward)
    if not inherited or "forward" in vars(module):
        raise PipelineError(
            f"{name} has a forward of its own, which is not called where its parts are; move what it does into before, "
            "shared, experts or after"
        )
    if any(getattr(module, f"_{hooks}_hooks") for hooks in ("forward", "forward_pre", "backward", "backward_pre")):
        raise PipelineError(
            f"{name} has hooks, which are not called where its parts are; put them on modules inside it"
        )
