"""What each further move brings, as plain data and as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from counterflow.cli.output import counted, print_table

if TYPE_CHECKING:
    from counterflow.experts import Frontier

_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of what all moves bring: the points that the table has."""


def frontier_as_dict(frontier: Frontier) -> dict[str, object]:
    """With keys that others rely on; the knee and the level of the published algorithm are numbers of moves."""
    return {
        "moves": frontier.moves.tolist(),
        "balancedness": frontier.balancedness.tolist(),
        "balancedness_worst_layer": frontier.worst.tolist(),
        "knee": int(frontier.moves[frontier.knee]),
        "as_published": int(frontier.moves[frontier.as_published]),
    }


def print_frontier(frontier: Frontier) -> None:
    """A dozen points of it, and where further moves begin to bring less."""
    import numpy as np

    moves, even, knee = frontier.moves, frontier.balancedness, frontier.knee
    last, gain = len(moves) - 1, float(even[-1] - even[0])
    if last == 0:
        print("\nFrontier: no number of moves makes it more balanced.")
        return
    places = frontier.current.num_layers * frontier.current.num_slots
    points = {int(np.argmax(even - even[0] >= share * gain - 1e-12)) for share in _SHARES}
    rows = []
    for point in sorted({0, knee, frontier.as_published, last, *points}):
        marks = {knee: "knee", frontier.as_published: "as even as published", last: "most even"}
        brought = f"{(even[point] - even[0]) / gain:.1%}"
        even_there = [f"{even[point]:.4f}", f"{frontier.worst[point]:.4f}"]
        rows.append([str(moves[point]), f"{moves[point] / places:.1%}", *even_there, brought, marks.get(point, "")])
    print("\nFrontier: the balancedness that so many moves reach, of what all of them bring, and where each stands.\n")
    print_table(["moves", "of slots", "balancedness", "worst layer", "of the gain", ""], rows)
    share = (even[knee] - even[0]) / gain
    told = f"{counted(int(moves[knee]), 'move')} ({moves[knee] / places:.1%} of the slots) bring {share:.0%}"
    print(
        f"\nThe knee: {told} of what all {int(moves[-1])} bring; beyond it a move brings less than they do on average."
    )
