"""DualPipe and DualPipeV against a plain transcription of the eight published steps.

Written from the published description alone: text first, then numbers. Slow and obvious on purpose;
benchmarks/published_order.py compares with the published code itself.
"""

import re

import pytest

from counterflow import Schedule, dualpipe, dualpipev


def eight_steps(h: int, depth: int, num_microbatches: int) -> str:
    """The steps of one rank as words: 0 is the direction that enters nearer to it, W names nothing yet."""
    middle = h == depth - 1
    first_pair = "F0 B1" if middle else "F0&B1"
    steady = num_microbatches - 2 * depth + h + 1
    one = "F0 " * 2 * (depth - h - 1)
    two = "F0 F1 " * (h + 1)
    three = "I1 W F1 " * (depth - h - 1)
    four = f"{first_pair} F1&B0 " + "F0&B1 F1&B0 " * (steady - 1)
    five = "B1 F1&B0 " * (depth - h - 1)
    six = "B1 B0 " * (h + 1)
    six = six[: len(six) // 2] + six[len(six) // 2 :].replace("B", "I")
    seven = "W I0 " * (depth - h - 1)
    eight = "W " * (h + 1)
    return (one + two + three + four + five + six + seven + eight).strip()


def numbered(steps: str, stages: tuple[int, int], first: tuple[int, int]) -> str:
    """Stages and micro-batches written in, in our text."""
    counters = {kind + direction: first[int(direction)] for kind in "FB" for direction in "01"}
    queue: list[str] = []

    def name(match: re.Match[str]) -> str:
        kind, direction = match.groups()
        if kind == "W":
            return queue.pop(0)
        counter = ("F" if kind == "F" else "B") + direction
        microbatch = counters[counter]
        counters[counter] += 1
        stage = stages[int(direction)]
        if kind == "I":
            queue.append(f"{stage}W{microbatch}")
        return f"{stage}{kind}{microbatch}"

    words = re.sub("([FBIW])([01]?)", name, steps).split()
    return " ".join(f"({word.replace('&', ';')})OVERLAP_F_B" if "&" in word else word for word in words)


def published_dualpipe(num_ranks: int, num_microbatches: int) -> list[str]:
    rows = []
    for rank in range(num_ranks):
        h = min(rank, num_ranks - 1 - rank)
        steps = eight_steps(h, num_ranks // 2, num_microbatches // 2)
        near_half, far_half = (0, num_microbatches // 2) if rank < num_ranks / 2 else (num_microbatches // 2, 0)
        rows.append(numbered(steps, stages=(h, num_ranks - 1 - h), first=(near_half, far_half)))
    return rows


def published_dualpipev(num_ranks: int, num_microbatches: int) -> list[str]:
    return [
        numbered(eight_steps(rank, num_ranks, num_microbatches), (rank, 2 * num_ranks - 1 - rank), first=(0, 0))
        for rank in range(num_ranks)
    ]


def text(schedule: Schedule) -> list[str]:
    return str(schedule).splitlines()


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
def test_dualpipe_runs_the_published_order(num_ranks: int) -> None:
    for num_microbatches in (*range(2 * num_ranks, 2 * num_ranks + 12, 2), 48, 64):
        assert text(dualpipe(num_ranks, num_microbatches)) == published_dualpipe(num_ranks, num_microbatches)


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_dualpipev_runs_the_published_order(num_ranks: int) -> None:
    for num_microbatches in (*range(2 * num_ranks, 2 * num_ranks + 6), 47, 64):
        assert text(dualpipev(num_ranks, num_microbatches)) == published_dualpipev(num_ranks, num_microbatches)
