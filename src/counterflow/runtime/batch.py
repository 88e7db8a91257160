"""What a step is given: of the caller's micro-batches, those that start or end on a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from counterflow.errors import PipelineError
from counterflow.schedule import Kind, Schedule

Microbatches = Sequence[Any] | Mapping[int, Any] | None
"""One entry for each micro-batch, in order, or a table of some; None where a rank needs none."""


@dataclass
class Batch:
    """The inputs of the micro-batches that enter on a rank, the targets of those that leave there."""

    inputs: Mapping[int, Any]
    targets: Mapping[int, Any]
    want_outputs: bool

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        rank: int,
        inputs: Microbatches,
        targets: Microbatches,
        *,
        needs_targets: bool,
        want_outputs: bool,
    ) -> Batch:
        """What ``rank`` needs of the caller's inputs and targets.

        Raises:
            PipelineError: an entry is missing, or they are no list or table.
        """
        parts = [part for action in schedule.rows[rank] for part in action.parts if part.kind is Kind.F]
        enter = [part.microbatch for part in parts if part.stage == 0]
        leave = [part.microbatch for part in parts if part.stage == schedule.num_stages - 1]
        given_inputs = _table("inputs", inputs, schedule.num_microbatches)
        given_targets = _table("targets", targets, schedule.num_microbatches)
        _require(f"rank {rank} got no inputs", given_inputs, enter, "start there")
        if needs_targets:
            _require(f"rank {rank} got no targets", given_targets, leave, "end there")
        return cls(
            {m: given_inputs[m] for m in enter},
            {m: given_targets[m] for m in leave if m in given_targets},
            want_outputs,
        )


def _table(what: str, given: object, count: int) -> Mapping[int, Any]:
    """``given`` by micro-batch."""
    if given is None:
        return {}
    if not isinstance(given, Sequence | Mapping) or len(given) > count:
        came = f"{len(given)} entries" if isinstance(given, Sequence | Mapping) else f"a {type(given).__name__}"
        raise PipelineError(
            f"{what} got {came}; give a list with one entry for each of {count} micro-batches, such as "
            f"batch.chunk({count}), or map micro-batches to entries"
        )
    return given if isinstance(given, Mapping) else dict(enumerate(given))


def _require(who_got_none: str, table: Mapping[int, Any], ids: list[int], which: str) -> None:
    missing = [m for m in ids if m not in table]
    if missing:
        raise PipelineError(
            f"{who_got_none} for micro-batches {', '.join(map(str, missing))}, which {which}; give one entry for each"
        )
