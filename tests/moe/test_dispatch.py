"""Rows go to the right expert in the promised order and come back, and so do gradients."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.func import functional_call

from pithwood.moe.dispatch import combine_tokens
from pithwood.moe.experts import GroupedExperts
from tests.moe.helpers import dense_moe, dispatched, filled
from tests.numerics import assert_close

IDS = {
    "plain": torch.tensor([[0, 2], [1, 2], [2, 0], [3, 1], [0, 3]]),
    "one_expert_takes_all": torch.tensor([[2], [2], [2], [2], [2]]),
    "some_none": torch.tensor([[0, -1], [-1, -1], [3, 0], [-1, 3], [1, 0]]),
    "all_none": torch.full((5, 2), -1),
    "all_experts": torch.tensor([[3, 2, 1, 0]] * 5),
}


@pytest.mark.quick
@given(st.integers(0, 30), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_sorted_by_expert_then_token_then_slot(num_tokens: int, num_experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 3))
    ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=num_tokens * k, max_size=num_tokens * k))
    ids_Tk = torch.tensor(ids, dtype=torch.int64).view(num_tokens, k)
    x_TD = torch.arange(num_tokens, dtype=torch.float32)[:, None] + 1
    rows_RD, _, plan = dispatched(x_TD, ids_Tk, torch.ones(num_tokens, k), num_experts)
    offsets = plan.offsets
    expected = [[t for t in range(num_tokens) for j in range(k) if ids[t * k + j] == e] for e in range(num_experts)]
    assert offsets.dtype == torch.int32
    for e, tokens in enumerate(expected):
        assert rows_RD[offsets[e] : offsets[e + 1], 0].tolist() == [t + 1 for t in tokens]
    count_T = (ids_Tk >= 0).sum(-1).float()
    back = combine_tokens(rows_RD, plan)
    assert torch.equal(back[:, 0], x_TD[:, 0] * count_T)


def through_experts(x_TD: Tensor, ids_Tk: Tensor, weight_Tk: Tensor, experts: GroupedExperts) -> Tensor:
    rows_RD, weight_R, plan = dispatched(x_TD, ids_Tk, weight_Tk, experts.down_proj.shape[0])
    return combine_tokens(experts(rows_RD, plan.offsets, weight_R), plan)


@pytest.mark.quick
@pytest.mark.parametrize("case", IDS)
def test_values_and_gradients_agree_with_a_dense_loop(case: str) -> None:
    ids_Tk = IDS[case]
    experts = filled(GroupedExperts(4, 6, 3)).double()
    assert isinstance(experts, GroupedExperts)
    x_TD = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight_Tk = torch.rand(ids_Tk.shape, dtype=torch.float64, requires_grad=True)
    inputs = (x_TD, weight_Tk, experts.gate_up_proj, experts.down_proj)
    actual = through_experts(x_TD, ids_Tk, weight_Tk, experts)
    expected = dense_moe(x_TD, ids_Tk, weight_Tk, experts.gate_up_proj, experts.down_proj)
    assert_close(actual, expected)
    pull = torch.randn(5, 6, dtype=torch.float64)
    grads = torch.autograd.grad((actual * pull).sum(), inputs)
    if case == "all_none":
        assert all(g.eq(0).all() for g in grads)
        return
    for grad, want in zip(grads, torch.autograd.grad((expected * pull).sum(), inputs), strict=True):
        assert_close(grad, want)


@pytest.mark.parametrize("case", IDS)
def test_gradients_agree_with_finite_differences(case: str) -> None:
    ids_Tk = IDS[case]
    experts = filled(GroupedExperts(4, 4, 3)).double()
    assert isinstance(experts, GroupedExperts)
    x_TD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight_Tk = torch.rand(ids_Tk.shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows_RD, weight_R, plan = dispatched(x, ids_Tk, weight, 4)
        named = {"gate_up_proj": gate_up, "down_proj": down}
        return combine_tokens(functional_call(experts, named, (rows_RD, plan.offsets, weight_R)), plan)

    assert torch.autograd.gradcheck(run, (x_TD, weight_Tk, experts.gate_up_proj, experts.down_proj))


def test_rows_without_an_expert_are_never_read_even_if_nan() -> None:
    ids_Tk = IDS["some_none"]
    experts = filled(GroupedExperts(4, 6, 3))
    x_TD = torch.randn(5, 6, requires_grad=True)
    weight_Tk = torch.rand(5, 2, requires_grad=True)
    rows_RD, weight_R, plan = dispatched(x_TD, ids_Tk, weight_Tk, 4)
    behind = plan.offsets[-1]
    poisoned = rows_RD.detach().clone()
    poisoned[behind:] = float("nan")
    poisoned.requires_grad_()
    out_RD = experts(poisoned, plan.offsets, weight_R)
    spoilt = out_RD.detach().clone()
    spoilt[behind:] = float("nan")
    spoilt.requires_grad_()
    out_TD = combine_tokens(spoilt, plan)
    assert_close(out_TD, dense_moe(x_TD, ids_Tk, weight_Tk, experts.gate_up_proj, experts.down_proj))
    (grad_out,) = torch.autograd.grad(out_TD.sum(), spoilt)
    grad_out[behind:] = float("nan")
    inputs = (poisoned, weight_Tk, experts.gate_up_proj, experts.down_proj)
    grad_rows, *others = torch.autograd.grad(out_RD, inputs, grad_out)
    assert all(torch.isfinite(grad).all() for grad in others)
    assert others[0][ids_Tk < 0].eq(0).all()
    grad_rows[behind:] = float("nan")
    (grad_x,) = torch.autograd.grad(rows_RD, x_TD, grad_rows)
    want = torch.autograd.grad(
        dense_moe(x_TD, ids_Tk, weight_Tk, experts.gate_up_proj, experts.down_proj).sum(), (x_TD, weight_Tk)
    )
    assert_close(grad_x, want[0])
    assert_close(others[0], want[1])


def test_combine_accumulates_low_precision_in_fp32() -> None:
    # 256 + 1 + 1 - 256 is 2; with a bf16 accumulator the ones vanish.
    ids_Tk = torch.tensor([[0, 1, 2, 3]])
    plan = dispatched(torch.zeros(1, 1), ids_Tk, torch.ones(1, 4), 4).plan
    rows_RD = torch.tensor([[256.0], [1.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    out_TD = combine_tokens(rows_RD, plan)
    assert out_TD.dtype == torch.bfloat16
    assert out_TD.item() == 2.0


def test_dispatch_backward_accumulates_low_precision_in_fp32() -> None:
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows_RD = dispatched(x_TD, torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4), 4).rows_RD
    pull = torch.tensor([[256.0], [1.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(rows_RD, x_TD, pull)
    assert grad.item() == 2.0


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    ids_Tk = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be \[tokens, top_k\] for 3 tokens"):
        dispatched(torch.zeros(3, 2), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2), 2)
    with pytest.raises(ValueError, match="must fit the plan"):
        dispatched(torch.zeros(3, 2), ids_Tk, torch.zeros(3, 1), 2)
    rows_RD, _, plan = dispatched(torch.zeros(3, 2), ids_Tk, torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match="5 rows, but the plan has 6"):
        combine_tokens(rows_RD[:5], plan)
