"""What the verb replay found, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from counterflow.cli.output import counted, print_table
from counterflow.cli.recording import Recording
from counterflow.cli.ways import Ways, told_copies

if TYPE_CHECKING:
    from counterflow.experts import Replay


class Crossing(NamedTuple):
    """What crosses nodes: under the last placement of each policy (None: not known), and in the ways to place."""

    copies: list[float | None]
    ways: Ways


def replay_as_dict(
    recording: Recording,
    replicas: int,
    served: Sequence[Replay],
    crossing: Crossing | None,
    heatmap: Path | None,
    plot: Path | None,
) -> dict[str, object]:
    """What ``--json`` prints."""
    from counterflow.experts import STALL_ASSUMES

    return {
        **recording.as_dict(),
        "num_replicas": replicas,
        "num_redundant_experts": replicas - recording.windows.shape[2],
        "policies": [
            {
                **_policy_as_dict(each, recording),
                "copies_per_token": None if crossing is None else crossing.copies[index],
            }
            for index, each in enumerate(served)
        ],
        "ways": None if crossing is None else crossing.ways.as_dict(),
        "stall_assumes": None if recording.bytes_per_s is None else STALL_ASSUMES,
        "heatmap": None if heatmap is None else str(heatmap),
        "plot": None if plot is None else str(plot),
    }


def _policy_as_dict(served: Replay, recording: Recording) -> dict[str, object]:
    over_time, layers = served.balancedness.mean(axis=1), served.balancedness.mean(axis=0)
    return {
        "policy": served.policy,
        "balancedness_mean": float(over_time.mean()),
        "balancedness_worst_step": float(over_time.min()),
        "worst_step": int(over_time.argmin()),
        "balancedness_worst_layer": float(layers.min()),
        "worst_layer": int(layers.argmin()),
        "balancedness": over_time.tolist(),
        "balancedness_of_layers": layers.tolist(),
        "slowdown": served.slowdown,
        "rebalances": [
            {"step": each.step, "layers": each.layers, "moves": each.moves, "policy_s": each.policy_s}
            for each in served.due
        ],
        "skipped": len(served.due) - len(served.rebalances),
        "moves": served.moves,
        "share_moved": served.share,
        "bytes_moved": _bytes(served, recording),
        "stall_s": _stall_s(served, recording),
        "policy_s": served.policy_s,
    }


def _bytes(served: Replay, recording: Recording) -> float | None:
    return None if recording.expert_bytes is None else served.moves * recording.expert_bytes


def _stall_s(served: Replay, recording: Recording) -> float | None:
    expert_bytes, bytes_per_s = recording.expert_bytes, recording.bytes_per_s
    return None if expert_bytes is None or bytes_per_s is None else served.stall_s(expert_bytes, bytes_per_s)


def print_replay(recording: Recording, replicas: int, served: Sequence[Replay], crossing: Crossing | None) -> None:
    """A line for each policy, and what the columns mean."""
    from counterflow.experts import STALL_ASSUMES

    (steps, layers, experts), settings = recording.windows.shape, recording.settings
    print(
        f"{counted(steps, 'step')} of {counted(layers, 'layer')} and {experts} experts; {counted(replicas, 'replica')} "
        f"on {counted(recording.num_gpus, 'GPU')}, {counted(replicas - experts, 'redundant expert')}."
    )
    past = f"the last {settings.window_size}" if settings.decay is None else f"all so far, decay {settings.decay}"
    print(f"A rebalance is due every {counted(settings.step_interval, 'step')}, for the loads of {past}.\n")
    rows = [_row(each, served[0], recording) for each in served]
    for index, row in enumerate(rows):
        row.append("" if crossing is None else told_copies(crossing.copies[index]))
    shown = [index for index in range(len(_HEADINGS)) if any(row[index] for row in rows)]
    print_table([_HEADINGS[index] for index in shown], [[row[index] or "-" for index in shown] for row in rows])
    print("\n× even: the time of the experts over that of even GPUs, if a layer takes as long as its fullest GPU.")
    print("Faster: than the first line. Of slots: those that newly receive an expert in the mean rebalance.")
    print("CPU ms: of deciding, the median. The policies: counterflow replay --help.")
    if recording.bytes_per_s is not None:
        print("\n".join(wrap(f"Stall: of all rebalances together, where {STALL_ASSUMES}.", 110)))
    if crossing is not None:
        print("Copies: how many other nodes a token is sent to, under the last placement of each policy.")
        print("\nBelow, placements for all steps together, in different ways.")
        crossing.ways.print_table()


_HEADINGS = (
    *("policy", "balancedness", "worst step", "worst layer", "× even", "faster", "rebalances", "skipped"),
    *("moves", "of slots", "GB moved", "stall ms", "CPU ms", "copies"),
)


def _row(served: Replay, start: Replay, recording: Recording) -> list[str]:
    """A cell for each heading but the last, empty where there is nothing to tell."""
    over_time, layers = served.balancedness.mean(axis=1), served.balancedness.mean(axis=0)
    even = [f"{value:.4f}" for value in (over_time.mean(), over_time.min(), layers.min())]
    faster = "" if served is start else f"{start.slowdown / served.slowdown - 1:.1%}"
    row = [served.policy, *even, f"{served.slowdown:.3f}", faster]
    if not served.due:
        return [*row, *[""] * (len(_HEADINGS) - 1 - len(row))]
    skipped = len(served.due) - len(served.rebalances)
    changed, moved, stall_s = len(served.rebalances), _bytes(served, recording), _stall_s(served, recording)
    row += [str(changed), str(skipped) if skipped else "", str(served.moves), f"{served.share:.1%}"]
    row += ["" if moved is None else f"{moved / 1e9:.3g}", "" if stall_s is None else f"{stall_s * 1e3:.4g}"]
    return [*row, f"{served.policy_s * 1e3:.3g}"]
