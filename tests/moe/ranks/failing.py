"""Two pipelines of one rank each that share experts, and one that fails: ``failing.py FOLDER``."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow import dualpipev
from counterflow.moe import stage
from counterflow.runtime import Context, OverlapBlock, Pipeline, ProcessGroupExchange
from moe.models import TINY, tokens
from moe.spreading import next_token_loss


class Failing(OverlapBlock):
    """Fails when a third micro-batch comes."""

    left = 3

    def before(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0 and dist.get_rank() == 1:
            raise ValueError("as asked")
        return x, x[:0].flatten(0, -2)

    def experts(self, received: Tensor, ctx: Context) -> Tensor:
        return received

    def after(self, carry: Tensor, returned: Tensor, ctx: Context) -> Tensor:
        return carry


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = [dist.new_group([rank]) for rank in range(2)]
    exchange = ProcessGroupExchange()
    stages = {index: stage(TINY, index, 2, exchange=exchange, dtype=torch.float64) for index in range(2)}
    stages[1].insert(0, Failing())
    pipeline = Pipeline(dualpipev(1, 4), stages, next_token_loss, group=groups[dist.get_rank()], timeout_s=60)
    data = [tokens(1, 5, seed=m) for m in range(4)]
    pipeline.step(data, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
