"""Train a decoder under DualPipe with torchrun: copy this file, put your model in the place of the demo's.

    torchrun --nproc-per-node 4 examples/train.py --schedule dualpipe --microbatches 8 --steps 50

One process is one rank: on the CPU over gloo, with a GPU for each rank over NCCL.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from counterflow import Costs, simulate
from counterflow.demo.model import DecoderStage, StandardLibrary, cross_entropy
from counterflow.runtime import Pipeline
from counterflow.schedule import generate
from counterflow.timeline import write_chrome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="dualpipe", help="gpipe, 1f1b, zb1p, dualpipe or dualpipev")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--save", type=Path, help="folder for the weights, one file for each stage")
    args = parser.parse_args()

    # 1. One process group; its ranks are the pipeline's.
    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()

    # 2. A schedule says which stages this rank holds; under DualPipe every stage stands on two ranks.
    schedule = generate(args.schedule, num_ranks, args.microbatches)
    stages = {stage: DecoderStage(stage, schedule.num_stages).to(device) for stage in schedule.stages_of(rank)}

    # 3. The pipeline runs it. Gradients are sums over the micro-batches, so the loss is divided by their number.
    pipeline = Pipeline(schedule, stages, lambda logits, target: cross_entropy(logits, target) / args.microbatches)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=2e-3)

    # 4. Train as ever. Each rank uses the inputs and targets of the micro-batches that start or end on it.
    text = StandardLibrary()
    for step in range(args.steps):
        inputs, targets = text.batch("train", seed=step, num_microbatches=args.microbatches, size=4)
        result = pipeline.step([x.to(device) for x in inputs], [y.to(device) for y in targets])
        optimizer.step()
        optimizer.zero_grad()
        report(f"step {step + 1}: loss", result.losses, device)

    # 5. What the last step took, and what it would have taken by its own costs if nothing got in the way.
    measured = pipeline.gather_timeline()
    predicted = simulate(schedule, Costs.from_timeline(measured))
    if rank == 0:
        write_chrome(measured, "out/example/measured.json")
        print(f"the step took {measured.makespan_ns / 1e6:.0f} ms, predicted {predicted.makespan_ns / 1e6:.0f} ms")

    # 6. Evaluate: the same schedule's forwards alone.
    inputs, targets = text.batch("held out", seed=0, num_microbatches=args.microbatches, size=4)
    result = pipeline.evaluate([x.to(device) for x in inputs], [y.to(device) for y in targets])
    report("held out: loss", result.losses, device)

    # 7. Twins hold the same weights, bit for bit: the first holder saves each stage.
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        for stage, module in stages.items():
            if rank == schedule.ranks_of(stage)[0]:
                torch.save(module.state_dict(), args.save / f"stage-{stage}.pt")

    pipeline.close()
    dist.destroy_process_group()


def report(what: str, losses: dict[int, torch.Tensor], device: torch.device) -> None:
    """Print the sum of the losses, which lie on the ranks that hold the last stage."""
    total = torch.stack([torch.zeros((), device=device), *losses.values()]).sum()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"{what} {total.item():.3f}")


if __name__ == "__main__":
    main()
