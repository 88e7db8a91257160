"""Products by group against one row at a time, their gradients, and weights that follow from the expert's number."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow.moe.experts import RoutedExperts, gated
from counterflow.moe.grouped import grouped_linear
from counterflow.runtime.weights import LinearSplit
from moe.models import CLOSE, TINY

sizes = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def problem(groups: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights, and where groups end."""
    drawn = torch.Generator().manual_seed(len(groups))
    rows = torch.randn(sum(groups), 3, generator=drawn, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(groups), 2, 3, generator=drawn, dtype=torch.float64, requires_grad=True)
    return rows, weight, torch.tensor(groups).cumsum(0, dtype=torch.int32)


@given(groups=sizes)
def test_each_row_meets_the_weight_of_its_group(groups: list[int]) -> None:
    rows, weight, ends = problem(groups)
    group = [g for g, size in enumerate(groups) for _ in range(size)]
    expected = [weight[g] @ row for g, row in zip(group, rows, strict=True)]
    torch.testing.assert_close(
        grouped_linear(rows, weight, ends), torch.stack(expected) if expected else rows.new_empty(0, 2), **CLOSE
    )


@given(groups=sizes)
def test_gradients_are_those_of_finite_differences(groups: list[int]) -> None:
    rows, weight, ends = problem([*groups, 1])
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, ends), (rows, weight))


@given(groups=sizes, rows_have_gradient=st.booleans())
def test_a_weight_gradient_can_wait_and_is_the_same(groups: list[int], rows_have_gradient: bool) -> None:
    rows, weight, ends = problem([*groups, 2])
    rows, weight = rows.detach().requires_grad_(rows_have_gradient), torch.nn.Parameter(weight.detach())
    grouped_linear(rows, weight, ends).square().sum().backward()
    expected, weight.grad = weight.grad, None
    of_rows, rows.grad = rows.grad, None
    split = LinearSplit(torch.nn.Module())
    with split.recording():
        out = grouped_linear(rows, weight, ends).square().sum()
    split.backward_input([out], [torch.ones_like(out)], [])
    assert weight.grad is None
    split.backward_weight()
    assert split.deferred() == {id(weight)}
    assert expected is not None
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)
    assert rows.grad is of_rows is None or torch.equal(rows.grad, of_rows)  # type: ignore[arg-type]


def test_experts_are_gated_products() -> None:
    experts = RoutedExperts(TINY, [0, 1], ("key",)).double()
    rows = torch.randn(5, TINY.hidden, dtype=torch.float64)
    found = experts(rows, torch.tensor([2, 5], dtype=torch.int32))
    for row, out, slot in zip(rows, found, [0, 0, 1, 1, 1], strict=True):
        gate, up = (experts.gate_up[slot] @ row).chunk(2)
        torch.testing.assert_close(out, experts.down[slot] @ (gate * torch.sigmoid(gate) * up), **CLOSE)


def test_a_weight_follows_from_the_expert_and_not_from_its_slot() -> None:
    one, other = RoutedExperts(TINY, [3, 5, 3], ("a", 1)), RoutedExperts(TINY, [5, 3], ("a", 1))
    for slot, same in ((0, 1), (1, 0), (2, 1)):
        assert all(torch.equal(x, y) for x, y in zip(one.slots()[slot], other.slots()[same], strict=True))
    assert not torch.equal(one.gate_up[0], one.gate_up[1])
    assert not torch.equal(one.gate_up[0], RoutedExperts(TINY, [3], ("a", 2)).gate_up[0])


def test_slots_are_the_weights_themselves() -> None:
    experts = RoutedExperts(TINY, [0, 1], ("key",))
    experts.slots()[1][0].fill_(7.0)
    assert (experts.gate_up[1] == 7.0).all()
    assert (experts.gate_up[0] != 7.0).any()


def test_a_gate_opens_the_other_half() -> None:
    assert gated(torch.tensor([[0.0, 100.0, 2.0, 3.0]])).tolist() == [[0.0, 300.0]]
