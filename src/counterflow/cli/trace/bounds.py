"""What trace pipeline prints where nobody named actions: the bounds of each rank's bubble."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from counterflow.cli.output import number, print_json, print_table, printable
from counterflow.cli.trace.clocks import clocks, print_stragglers

if TYPE_CHECKING:
    from counterflow.trace import Alignment, BubbleBounds


def report_bounds(bounds: list[BubbleBounds], alignment: Alignment, as_json: bool) -> None:
    """Print them for people, or as JSON."""
    from counterflow.trace import ASSUMPTIONS

    if as_json:
        print_json(
            {
                "named_by": None,
                "bounds": [asdict(one) | {"uncertainty_us": one.uncertainty_us} for one in bounds],
                "assumptions": list(ASSUMPTIONS),
                "clocks": asdict(alignment),
            }
        )
        return
    print(f"no named actions: the bubble lies between two bounds; {clocks(alignment)}\n")
    print_table(
        ["rank", "step", "window µs", "computes µs", "bubble at least µs", "at most µs", "of the window", "messages"],
        [
            [
                str(one.rank),
                printable(one.step.removeprefix("ProfilerStep#")),
                *(number(us) for us in (one.window_us, one.compute_us, one.least_us, one.most_us)),
                f"{one.least_us / max(one.window_us, 1e-9):.1%} to {one.most_us / max(one.window_us, 1e-9):.1%}",
                str(one.num_messages),
            ]
            for one in bounds
        ],
    )
    moving, least = sum(one.moving_us for one in bounds), sum(one.least_us for one in bounds)
    if any(one.num_messages for one in bounds):
        print(
            f"\nof the least, {number(least)} µs in all, at most {number(moving)} µs moved data; the rest was waiting"
        )
    else:
        print("\nno kernel sent to or received from another rank: nothing tells a wait from another gap")
    for line in ASSUMPTIONS:
        print(f"  {line}")
    print_stragglers(alignment)
