"""In sentences: how the clocks of ranks were put together, and who comes last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from counterflow.cli.output import counted, number, printable

if TYPE_CHECKING:
    from counterflow.trace import Alignment


def clocks(alignment: Alignment) -> str:
    """How the clocks were put together, and how exactly."""
    error = "" if alignment.error_us is None else f" to {number(alignment.error_us)} µs"
    apart = f", but for {counted(len(alignment.apart), 'trace')} that share none" if alignment.apart else ""
    match alignment.basis:
        case "collectives":
            largest = max(map(abs, alignment.offsets_us))
            known = f"{counted(alignment.shared, 'shared collective')}{error}"
            return f"clocks put together by {known}, moved by up to {number(largest)} µs{apart}"
        case "actions":
            return f"clocks held to what actions need of each other, known{error}{apart}"
    return "clocks taken as they are"


def print_stragglers(alignment: Alignment) -> None:
    """Who came last, and how long the others waited for it."""
    for one in alignment.stragglers:
        what = printable(f"{one.name} of group {one.group}" if one.group else one.name)
        print(
            f"\nrank {one.rank} came last to {one.late} of {one.count} collectives ({what}): the others waited "
            f"{number(one.waited_us)} µs for it in all, at most {number(one.most_us)} µs at once"
        )
