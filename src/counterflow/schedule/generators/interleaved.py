"""Interleaved 1F1B: several chunks of the model on each rank, so that the pipeline fills and empties faster."""

from counterflow.schedule.generators.sizes import require_rounds
from counterflow.schedule.generators.steps import Step, from_steps
from counterflow.schedule.schedule import Schedule


def interleaved_1f1b(num_ranks: int, num_microbatches: int, chunks: int = 2, overlap: bool = False) -> Schedule:
    """1F1B over ``chunks`` stages on each rank, stage c·R + r on rank r: 1F1B's bubble divided by ``chunks``.

    Micro-batches go in rounds: each round passes the first chunk of all ranks, then the second. The rounds are equally
    long and, if there are several, of at least R micro-batches. With ``overlap`` each rank runs one forward more
    before its first backward, so that the two of a pair are of different micro-batches and run as one F&B.

    2 ranks, 4 micro-batches, B twice as long as F::

        F0 F1 F0 F1 F2 .  B0--- F3 B1--- F2 B0--- F3 B1--- .  B2--- .  B3--- B2--- B3---
        .  F0 F1 F0 B0--- F1 B1--- F2 B0--- F3 B1--- F2 B2--- F3 B3--- B2--- B3--- .  .

    2 ranks, 4 micro-batches with ``overlap``, F&B three times as long as F::

        F0 F1 F0 F1 F2 .  .  F3&B0--- F2&B1--- F3&B0--- B1--- .  B2--- B3--- B2--- B3---
        .  F0 F1 F0 F1&B0--- F2&B1--- F3&B0--- F2&B1--- F3&B2--- B3--- B2--- B3--- .  .

    Raises:
        ScheduleError: fewer than one rank, micro-batch or chunk, or M no multiple of its M // R rounds.

    Example:
        >>> from counterflow import interleaved_1f1b
        >>> print(interleaved_1f1b(2, 2))
        0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
        1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2 and figure 4; rounds as in torch's ``ScheduleInterleaved1F1B``; overlap as in Megatron-LM's
    ``--overlap-moe-expert-parallel-comm`` (``get_pp_rank_microbatches`` in core/pipeline_parallel/schedules.py).
    """
    name = "interleaved-1f1b-overlap" if overlap else "interleaved-1f1b"
    size = require_rounds(name, num_ranks, num_microbatches, chunks)
    order = [chunk for _ in range(num_microbatches // size) for chunk in range(chunks) for _ in range(size)]
    rows: list[list[Step]] = []
    for rank in range(num_ranks):
        forwards = [chunk * num_ranks + rank for chunk in order]
        backwards = [(chunks - 1 - chunk) * num_ranks + rank for chunk in order]
        warm_up = min((chunks - 1) * size + 2 * (num_ranks - 1 - rank) + overlap, len(order))
        row: list[Step] = [("F", stage) for stage in forwards[:warm_up]]
        for pair in zip(forwards[warm_up:], backwards, strict=False):
            row += [("F&B", *pair)] if overlap else zip("FB", pair, strict=True)
        rows.append(row + [("B", stage) for stage in backwards[len(order) - warm_up :]])
    return from_steps(name, rows, chunks * num_ranks, num_microbatches)
