"""Clocks of ranks that share no collective, by what their actions need of each other."""

from __future__ import annotations

from collections.abc import Iterator

from counterflow.schedule.transfers import needs, produces
from counterflow.trace.alignment import Alignment
from counterflow.trace.rounds import RankRow


def align_by_needs(steps: list[list[RankRow]]) -> Alignment:
    """Clocks by what actions need: moved only where something would be used before it was made.

    What rank a makes for rank b bounds b's clock from one side, what comes back from the other; the middle is taken.
    """
    count = 1 + max(row.place for row in steps[0])
    room: dict[tuple[int, int], int] = {}
    for step in steps:
        for (maker, user), slack_ns in _slacks(step):
            room[maker, user] = min(room.get((maker, user), slack_ns), slack_ns)
    offsets: dict[int, int] = {0: 0}
    errors = []
    while fresh := [(a, b) for a, b in sorted(room) if a in offsets and b not in offsets and (b, a) in room]:
        a, b = fresh[0]
        low, high = -room[b, a], room[a, b]
        errors.append((high - low) / 2)
        offsets[b] = offsets[a] + (0 if low <= 0 <= high else (low + high) // 2)
    if not errors:
        return Alignment.none(count)
    shifts = tuple(offsets.get(index, 0) / 1000 for index in range(count))
    apart = tuple(index for index in range(count) if index not in offsets)
    return Alignment(shifts, max(map(abs, errors)) / 1000, 0, "actions", apart)


def _slacks(step: list[RankRow]) -> Iterator[tuple[tuple[int, int], int]]:
    """For each transfer its two traces, and how long after it was made it was used."""
    num_stages = 1 + max(part.stage for row in step for one in row.ran for part in one.action.parts)
    made = {
        (produces(part), part.stage, part.microbatch): (row.place, one.end_ns)
        for row in step
        for one in row.ran
        for part in one.action.parts
    }
    for row in step:
        for one in row.ran:
            for part in one.action.parts:
                need = needs(part, num_stages)
                maker = made.get((*need, part.microbatch)) if need else None
                if maker is not None and maker[0] != row.place:
                    yield (maker[0], row.place), one.start_ns - maker[1]
