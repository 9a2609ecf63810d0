"""Merging pieces of a softmax: the whole from its parts, empty parts, and gradients."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops import merge
from pithwood.ops.merge import add_sink
from tests.numerics import assert_close
from tests.ops.reference import attention, dense_masks, gradients, make_inputs

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("poison")]
NEVER = float("-inf")


def test_attention_over_parts_merges_to_attention_over_all_with_equal_gradients():
    inputs = make_inputs([30, 20], heads=4, kv_heads=2, value_dim=8, dtype=torch.float64)
    masks = dense_masks(inputs.packing, 4)
    parts = [[m & (torch.arange(m.shape[2]) % 3 == i) for m in masks] for i in range(3)]
    whole = attention(*inputs, masks)
    merged = merge([attention(*inputs, part) for part in parts])
    assert_close(merged[0], whole[0])
    assert_close(merged[1], whole[1])
    for found, expected in zip(gradients(*merged, inputs[:3]), gradients(*whole, inputs[:3]), strict=True):
        assert_close(found, expected)


def test_pieces_without_keys_count_nothing_whatever_they_hold():
    o, lse = torch.randn(4, 2, 8), torch.randn(4, 2)
    empty = torch.full((4, 2, 8), float("nan")), torch.full((4, 2), NEVER)
    merged = merge([empty, (o, lse), empty])
    assert_close(merged[0], o, 1e-6)
    assert torch.equal(merged[1], lse)
    nothing = merge([(torch.zeros(4, 2, 8), empty[1])] * 2)
    assert torch.count_nonzero(nothing[0]) == 0
    assert (nothing[1] == NEVER).all()


def test_gradients_with_empty_pieces_are_finite_and_zero_where_nothing_was_seen():
    o = [torch.randn(3, 1, 4, requires_grad=True) for _ in range(2)]
    lse = [
        torch.tensor([[0.0], [NEVER], [NEVER]], requires_grad=True),
        torch.tensor([[1.0], [2.0], [NEVER]], requires_grad=True),
    ]
    out, total = merge(list(zip(o, lse, strict=True)))
    grads = torch.autograd.grad(out.sum() + torch.where(total > NEVER, total, 0.0).sum(), [*o, *lse])
    assert all(g.isfinite().all() for g in grads)
    assert torch.count_nonzero(grads[0][1:]) == 0
    assert torch.count_nonzero(grads[1][2]) == 0


def test_large_logits_do_not_overflow():
    o, lse = torch.randn(2, 1, 4), torch.tensor([[1e4], [-1e4]])
    out, total = merge([(o, lse), (2 * o, lse - 1e3)])
    assert_close(out, o, 1e-6)
    assert_close(total, lse, 1e-6)


def test_half_precision_pieces_are_summed_in_fp32():
    o = [torch.randn(5, 2, 8).bfloat16() for _ in range(3)]
    lse = [torch.randn(5, 2) for _ in range(3)]
    out, total = merge(list(zip(o, lse, strict=True)))
    expected = merge([(x.double(), y.double()) for x, y in zip(o, lse, strict=True)])
    assert out.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert_close(out, expected[0].bfloat16(), 1e-3)


def test_a_sink_is_one_more_logit_without_a_value():
    inputs = make_inputs([12], [9], heads=2, dtype=torch.float64)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    masks = dense_masks(inputs.packing, 2)
    found = add_sink(*attention(*inputs, masks), sink)
    expected = attention(*inputs, masks, sink_H=sink)
    assert_close(found[0], expected[0])
    seen = expected[1] > NEVER
    assert_close(found[1][seen], expected[1][seen])
    assert torch.equal(found[1][~seen], sink.detach().expand(12, 2)[~seen])
    leaves = [*inputs[:3], sink]
    for a, b in zip(gradients(found[0], None, leaves), gradients(expected[0], None, leaves), strict=True):
        assert_close(a, b)


def test_bad_pieces_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match="pieces must agree"):
        merge([(torch.zeros(2, 1, 4), torch.zeros(2, 1)), (torch.zeros(3, 1, 4), torch.zeros(3, 1))])
