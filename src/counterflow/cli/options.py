"""What several verbs ask for: costs, and the surplus of the first and the last stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterflow.errors import CounterflowError

if TYPE_CHECKING:
    from counterflow.simulator import Costs

Json = Annotated[bool, typer.Option("--json", help="Print plain data with stable keys.")]
CostsFile = Annotated[Path | None, typer.Option("--costs", help="A costs.json, instead of the costs below.")]
Forward = Annotated[float | None, typer.Option("--forward-us", help="F  [default: 1]")]
Backward = Annotated[float | None, typer.Option("--backward-us", help="B  [default: twice F]")]
Weight = Annotated[float | None, typer.Option("--weight-us", help="W, the rest of B being I  [default: half of B]")]
Overlapped = Annotated[float | None, typer.Option("--overlapped-us", help="F&B  [default: F + B]")]
Latency = Annotated[float | None, typer.Option("--latency-us", help="Of every transfer  [default: 0]")]
FirstWeight = Annotated[
    float, typer.Option("--first-stage-weight", help="How many times as long the first stage takes (embedding).")
]
LastWeight = Annotated[
    float, typer.Option("--last-stage-weight", help="How many times as long the last stage takes (head).")
]


def costs_of(
    file: Path | None,
    forward_us: float | None,
    backward_us: float | None,
    weight_us: float | None,
    overlapped_us: float | None,
    latency_us: float | None,
) -> Costs:
    """The costs in ``file``, or those given one by one.

    Raises:
        CounterflowError: both were given.
    """
    from counterflow.simulator import Costs, read_costs

    if file is not None:
        if any(us is not None for us in (forward_us, backward_us, weight_us, overlapped_us, latency_us)):
            raise CounterflowError(f"--costs {file} states every cost; leave out the single ones, or write them there")
        return read_costs(file)
    # What is not given scales with what is: F alone in real microseconds must not meet a B of 2.
    forward = 1.0 if forward_us is None else forward_us
    backward = 2 * forward if backward_us is None else backward_us
    weight = backward / 2 if weight_us is None else weight_us
    if weight > backward >= 0:
        raise CounterflowError(
            f"--weight-us {weight:g} is more than B, {backward:g}; W is a part of it: give at most that, "
            "or a longer --backward-us"
        )
    return Costs(forward, backward, None, weight, overlapped_us, latency_us or 0.0)
