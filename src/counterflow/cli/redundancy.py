"""The sweep of the verb replay: how many redundant experts pay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from counterflow.cli.output import about, counted, print_json, print_table, printable
from counterflow.cli.pictures import plot_sweep
from counterflow.cli.recording import Recording, replaying

if TYPE_CHECKING:
    from counterflow.experts import Redundancy


def report_sweep(
    recording: Recording, policy: str, most_replicas: int, slot_cost: float, plot: Path | None, as_json: bool
) -> None:
    """Try every number of replicas up to ``most_replicas``, and tell up to which of them a further slot pays."""
    from counterflow.experts import sweep_replicas, worthwhile

    sizes = most_replicas, recording.num_gpus, recording.num_nodes, recording.num_groups
    with about(recording.file), replaying(1) as part:
        rows = sweep_replicas(recording.windows, policy, *sizes, recording.settings, part(0))
        best = worthwhile(rows, slot_cost)
    if plot is not None:
        plot_sweep(plot, recording.title, rows, policy)
    slot_bytes = None if recording.expert_bytes is None else recording.windows.shape[1] * recording.expert_bytes
    if as_json:
        print_json(
            {
                **recording.as_dict(),
                "policy": policy,
                "slot_cost": slot_cost,
                "pays_up_to": best.num_replicas,
                "sweep": [_as_dict(row, slot_bytes) for row in rows],
                "plot": None if plot is None else str(plot),
            }
        )
        return
    _print(rows, policy, slot_bytes)
    _conclude(rows, best, slot_cost)
    if plot is not None:
        print(f"wrote {printable(str(plot))}")


def _as_dict(row: Redundancy, slot_bytes: float | None) -> dict[str, object]:
    return {
        "num_replicas": row.num_replicas,
        "num_redundant_experts": row.num_redundant_experts,
        "slots": row.slots,
        "balancedness_mean": row.balancedness,
        "slowdown": row.slowdown,
        "gain": row.gain,
        "bytes_per_gpu": None if slot_bytes is None else row.slots * slot_bytes,
    }


def _print(rows: Sequence[Redundancy], policy: str, slot_bytes: float | None) -> None:
    print(f"Redundant experts under the policy {policy}, a slot more on every GPU from line to line:\n")
    headings = ["replicas", "redundant", "slots of a GPU", "balancedness", "× even", "faster by"]
    print_table(
        [*headings, *(["GB on a GPU"] if slot_bytes is not None else [])],
        [
            [
                str(row.num_replicas),
                str(row.num_redundant_experts),
                str(row.slots),
                f"{row.balancedness:.4f}",
                f"{row.slowdown:.3f}",
                "-" if row.gain is None else f"{row.gain:.2%}",
                *([f"{row.slots * slot_bytes / 1e9:.3g}"] if slot_bytes is not None else []),
            ]
            for row in rows
        ],
    )


def _conclude(rows: Sequence[Redundancy], best: Redundancy, slot_cost: float) -> None:
    print("\n× even: the time of the experts over that of even GPUs, if a layer takes as long as its fullest GPU.")
    print("Faster by: what the last slot does to that time. It takes memory on every GPU, one expert of each layer,")
    print(f"which is counted here as {slot_cost:.3g} of the throughput (--slot-cost).")
    if best is rows[0]:
        print("No redundant experts pay: no number of further slots gains as much as it costs.")
        return
    beyond = "there the sweep ends" if best is rows[-1] else "no number of slots beyond gains as much as it costs"
    redundant = counted(best.num_redundant_experts, "redundant expert")
    print(f"They pay up to {best.num_replicas} replicas, {redundant}: {beyond}.")
