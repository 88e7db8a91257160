"""The loopback carries rows unchanged, whatever its pieces are; what it does on a GPU, test_cuda.py holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import PipelineError
from counterflow.runtime.exchange import Rows
from counterflow.runtime.loopback import LoopbackExchange

KIB = 1024


@given(
    rows=st.integers(0, 40),
    abroad=st.integers(0, 100 * KIB),
    piece=st.integers(1, 8),
    num_pieces=st.integers(1, 4),
    returning=st.booleans(),
)
def test_rows_come_back_as_they_left(rows: int, abroad: int, piece: int, num_pieces: int, returning: bool) -> None:
    exchange = LoopbackExchange(
        0 if returning else abroad, abroad if returning else 0, piece_bytes=piece * 4 * KIB, num_pieces=num_pieces
    )
    source = torch.randn(rows, 512, dtype=torch.float64)
    target = torch.full_like(source, torch.nan)
    exchange.start(source, target, Rows((rows,), (rows,), returning), None).wait()
    assert torch.equal(target, source)


def test_it_can_stand_for_one_rank_of_many() -> None:
    exchange = LoopbackExchange(4096, 8192, num_ranks=4)
    counts = torch.arange(8).view(4, 2)
    assert exchange.counts(counts).tolist() == [[6, 7]] * 4


@given(going=st.integers(1, 20), coming=st.integers(0, 50), abroad=st.integers(0, 100 * KIB))
def test_more_rows_may_come_than_go_and_fewer(going: int, coming: int, abroad: int) -> None:
    source = torch.randn(going, 512, dtype=torch.float64)
    target = torch.full((coming, 512), torch.nan, dtype=torch.float64)
    LoopbackExchange(abroad, 0, num_ranks=2).start(source, target, Rows((0, going), (coming, 0)), None).wait()
    assert torch.equal(target, source[torch.arange(coming) % going])


def test_a_negative_number_of_blocks_is_refused() -> None:
    with pytest.raises(PipelineError, match="got -2 CTAs; give 0 for copy engines, or how many"):
        LoopbackExchange(1, 1, ctas=-2)


def test_a_negative_number_of_bytes_is_refused() -> None:
    with pytest.raises(PipelineError, match="got -1 and 5 bytes for dispatch and combine; give none below 0"):
        LoopbackExchange(-1, 5)
