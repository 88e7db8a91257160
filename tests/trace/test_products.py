"""What products of matrices are for, by the kernels around them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.trace.hints import hint_of
from counterflow.trace.products import OF_ATTENTION, OF_MLP, OF_ROUTER, UNKNOWN, products_of
from graph_traces import work_of

NORM, CORE, ROUTER, SILU = "rms_norm", "flash_fwd", "topk_gating", "silu"


A, M, R, X = OF_ATTENTION, OF_MLP, OF_ROUTER, UNKNOWN


@pytest.mark.parametrize(
    ("names", "us", "purposes"),
    [
        # Both products up in one, then what experts sent back is summed; the same kernel goes up and down.
        ([NORM, "gemm", SILU, "gemm", "gemm_sum", NORM], [4, 40, 3, 20, 9, 4], [X, M, X, M, A, X]),
        # Two products up before the activation, and one before and one after it.
        ([NORM, "gemm", "gemm", SILU, "gemm2", NORM], [4, 20, 20, 3, 20, 4], [X, M, M, X, M, X]),
        ([NORM, "gemm", SILU, "gemm", "mul", "gemm2", NORM], [4, 20, 3, 20, 2, 20, 4], [X, M, X, M, X, M, X]),
        # Attention around its core, and a router.
        (
            [NORM, "gemm", NORM, "gemm", CORE, "gemm", NORM, "gemm", ROUTER, "gemm", SILU, "gemm2", NORM],
            [4] * 13,
            [X, A, X, A, X, A, X, R, X, M, X, M, X],
        ),
        # Experts behind the router and shared ones; only the names of the former tell.
        (
            [ROUTER, "grouped_mm", SILU, "grouped_mm", "gemm", SILU, "gemm2", NORM],
            [4, 90, 4, 50, 9, 4, 5, 4],
            [X, X, X, X, M, X, M, X],
        ),
        # What only attention runs parts its products from those of experts, whose names may not tell a product.
        (
            [NORM, "gemm", "rope", "fused_moe_kernel", SILU, "fused_moe_kernel", "gemm", NORM],
            [4, 20, 4, 90, 4, 50, 9, 4],
            [X, A, X, X, X, X, A, X],
        ),
        (
            [NORM, "gemm", "fused_moe_kernel", SILU, "fused_moe_kernel", NORM],
            [4, 20, 90, 4, 50, 4],
            [X, A, X, X, X, X],
        ),
        # A product with the activation in it.
        ([NORM, "gemm_swiglu", "gemm", "gemm2", NORM], [4, 30, 20, 9, 4], [X, X, M, A, X]),
        # Beyond both ends of a trace may stand what tells; a head with the choice of a token is of no layer.
        (["gemm", NORM, "gemm", SILU, NORM, "gemm"], [9] * 6, [X, X, M, X, X, X]),
        ([NORM, "gemm", SILU, "gemm2", NORM, "gemm", "argmax"], [9] * 7, [X, M, X, M, X, X, X]),
        # No activation at all: the MLPs are of another kind.
        ([NORM, "gemm", "gemm", NORM], [9] * 4, [X, X, X, X]),
    ],
)
def test_products_of_an_mlp_stand_around_its_activation(names, us, purposes) -> None:
    assert products_of(work_of(names, us), [hint_of(name) for name in names]).tolist() == purposes


kinds = st.sampled_from([NORM, CORE, ROUTER, SILU, "gemm", "gemm2", "grouped_mm", "gemm_swiglu", "argmax", "other"])


@given(st.lists(st.tuples(kinds, st.integers(1, 50)), max_size=20))
def test_only_products_without_a_part_have_a_purpose_and_each_activation_few(drawn) -> None:
    names, us = [name for name, _ in drawn], [us for _, us in drawn]
    purposes = products_of(work_of(names, us), [hint_of(name) for name in names])
    assert all(name.startswith("gemm") and name != "gemm_swiglu" for name, p in zip(names, purposes, strict=True) if p)
    assert np.count_nonzero(purposes == OF_MLP) <= 3 * sum(name in (SILU, "gemm_swiglu") for name in names)
