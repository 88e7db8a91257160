"""Ranks in trouble, and ranks in no trouble that look it: ``odd_jobs.py FOLDER JOB ARGUMENT...``.

JOB is one of the functions below. Every rank leaves its process id in ``pid-r``, and ``failed`` when it fails.
"""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.errors import PipelineError
from counterflow.runtime import Pipeline
from counterflow.runtime.transport import Handle, Lane, Message, ProcessGroupTransport
from counterflow.schedule import Action, Kind
from runtime.cases import Case, named_case
from runtime.ranks.fail import failure


def fail_in(folder: Path, name: str, who: str, where: str, how: str, timeout_s: str) -> None:
    """Rank ``who`` fails ``where``: in an action of the second step, such as 1W2, or in one of an evaluation."""
    case, rank = named_case(name), dist.get_rank()
    stages = case.stages_of(rank)
    evaluates = where.startswith("evaluate ")
    if rank == int(who):
        part = Action.parse(where.removeprefix("evaluate "))
        fail_at(stages[part.stage], part, case, rank, lambda: failure(folder, how))
    pipeline = Pipeline(case.schedule, stages, case.loss_fn, timeout_s=float(timeout_s))
    data = case.steps[0]
    pipeline.step(data.inputs, data.targets)
    for _ in range(3):
        (pipeline.evaluate if evaluates else pipeline.step)(data.inputs, data.targets)


def fail_at(stage: nn.Module, part: Action, case: Case, rank: int, fail: Callable[[], None]) -> None:
    """In the second pass over the row: a linear's bias gets its gradients in B and I, its weight in B and W."""
    kinds = {Kind.F: "F", Kind.B: "BW", Kind.I: "BI", Kind.W: "BW"}[part.kind]
    parts = [p for action in case.schedule.rows[rank] for p in action.parts]
    alike = [p for p in parts if p.stage == part.stage and p.kind in kinds]
    left = len(alike) + alike.index(part) + 1

    def passing(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            fail()

    (linear, *_) = (module for module in stage.modules() if isinstance(module, nn.Linear))
    if part.kind is Kind.F:
        stage.register_forward_pre_hook(passing)
    else:
        (linear.bias if part.kind is Kind.I else linear.weight).register_hook(passing)


class ExchangingTwins(ProcessGroupTransport):
    """Calls ``fail`` instead of sending a twin's gradients."""

    fail: Callable[[], None] | None = None

    def send(self, message: Message, tensors: list[Tensor]) -> Handle:
        if message.lane is Lane.TWINS and self.fail is not None:
            self.fail()
        return super().send(message, tensors)


def fail_among_twins(folder: Path, name: str, who: str, how: str, timeout_s: str) -> None:
    """Rank ``who`` has done all actions of its second step, and fails when the twins add up their gradients."""
    case, rank = named_case(name), dist.get_rank()
    pipeline = Pipeline(
        case.schedule, case.stages_of(rank), case.loss_fn, timeout_s=float(timeout_s), transport=ExchangingTwins
    )
    data = case.steps[0]
    pipeline.step(data.inputs, data.targets)
    if rank == int(who):
        ExchangingTwins.fail = staticmethod(lambda: failure(folder, how))
    for _ in range(2):
        pipeline.step(data.inputs, data.targets)


def two_pipelines_and_an_onlooker(folder: Path) -> None:
    """World rank 1 has no part in the two pipelines of the others, in the second of which world rank 2 sleeps."""
    group = dist.new_group([0, 2])
    rank, case = dist.get_rank(group), named_case("1f1b/2/3")
    if dist.get_rank() == 1:
        try:
            Pipeline(case.schedule, case.stages_of(0), case.loss_fn, group=group)
        except PipelineError as error:
            print(error, flush=True)
        time.sleep(1000)
    stages = case.stages_of(rank)
    if rank == 1:
        fail_at(stages[1], Action.parse("1F1"), case, rank, lambda: failure(folder, "sleep"))
    data = case.steps[0]
    for one in (case.stages_of(rank), stages):
        pipeline = Pipeline(case.schedule, one, case.loss_fn, group=group)
        for _ in range(2):
            pipeline.step(data.inputs, data.targets)


def raise_and_linger(folder: Path, seconds: str) -> None:
    """Rank 1 raises; on its way out its peers lose it long before it has ended."""

    def linger() -> None:
        time.sleep(1)  # the others have posted all they can by then, and wait
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
                connection.getpeername()  # which a listening one has not, and gloo would miss that
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(float(seconds))

    if dist.get_rank() == 1:
        atexit.register(linger)
    fail_in(folder, "1f1b/2/3", "1", "1F1", "raise", "30")


def end_well(folder: Path, seconds: str) -> None:
    """Rank 0 closes its pipeline and is busy with something else for a while; the other does not even close it."""

    def nobody_beats() -> None:
        if any("counterflow" in thread.name for thread in threading.enumerate()):
            os._exit(3)

    atexit.register(nobody_beats)  # what is registered first runs last
    case = named_case("1f1b/2/3")
    pipeline = Pipeline(case.schedule, case.stages_of(dist.get_rank()), case.loss_fn, timeout_s=30)
    data = case.steps[0]
    pipeline.step(data.inputs, data.targets)
    if dist.get_rank() == 0:
        pipeline.close()
        time.sleep(float(seconds))


def stop_while_another_ends(folder: Path, seconds: str) -> None:
    """Rank 0 is done and takes long to end, as one does whose GPU waits for another's; then rank 1 is stopped."""
    case = named_case("1f1b/2/3")
    pipeline = Pipeline(case.schedule, case.stages_of(dist.get_rank()), case.loss_fn, timeout_s=30)
    pipeline.step(case.steps[0].inputs, case.steps[0].targets)
    if dist.get_rank() == 0:
        atexit.register(time.sleep, float(seconds))
        return
    time.sleep(1)
    failure(folder, "stop")


JOBS = {
    job.__name__: job
    for job in (
        *(fail_in, fail_among_twins, two_pipelines_and_an_onlooker, raise_and_linger, end_well),
        stop_while_another_ends,
    )
}


def main(folder_name: str, job: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    folder = Path(folder_name)
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()), encoding="utf-8")
    # The first backward loads half of torch; on a busy machine the others would lose patience meanwhile.
    torch.ones(1, requires_grad=True).backward(torch.ones(1))
    dist.init_process_group("gloo")
    JOBS[job](folder, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
