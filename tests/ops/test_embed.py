"""Rows of an embedding table and its gradient, added in place by the kernel."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.embed import embed
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_MARKS

pytestmark = pytest.mark.usefixtures("poison")


def make(tokens=200, vocab=23, dim=40, device="cpu"):
    """(ids of which some repeat often, table)."""
    ids = torch.randint(0, vocab, (tokens,))
    ids[: tokens // 3] = vocab // 2
    return ids[torch.randperm(tokens)].to(device), torch.randn(vocab, dim, device=device).requires_grad_()


def gradient(impl, ids, table, upstream, dtype=torch.float32):
    """The table's gradient, wherever it went."""
    table = table.detach().clone().requires_grad_()
    embed(ids, table, dtype, impl=impl).backward(upstream)
    return table.grad


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_is_the_definition(dtype):
    ids, table = make()
    assert torch.equal(embed(ids, table, dtype), embed(ids, table, dtype, impl="ref"))
    upstream = torch.randn(200, 40).to(dtype)
    assert_close(gradient("torch", ids, table, upstream, dtype), gradient("ref", ids, table, upstream, dtype))


@pytest.mark.quick
def test_a_batch_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"tokens \[T\] and a table \[X, D\], got \(2, 3\), \(23, 40\)"):
        embed(torch.zeros(2, 3, dtype=torch.int64), make()[1], torch.float32)


class TestKernel:
    """On a GPU, or in the interpreter."""

    pytestmark = KERNEL_MARKS

    @pytest.mark.parametrize(("tokens", "vocab", "dim"), [(200, 23, 40), (1, 1, 1), (0, 5, 8), (17, 90, 600)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_rows_and_gradient_are_those_of_the_definition(self, dtype, tokens, vocab, dim):
        ids, table = make(tokens, vocab, dim, DEVICE)
        assert torch.equal(embed(ids, table, dtype, impl="triton"), embed(ids, table, dtype, impl="ref"))
        upstream = torch.randn(tokens, dim, device=DEVICE).to(dtype)
        found = gradient("triton", ids, table, upstream, dtype)
        # the reference rounds each sum to the rows' dtype where that is how autograd adds
        expected = torch.zeros(vocab, dim, dtype=torch.float64, device=DEVICE).index_add_(0, ids, upstream.double())
        assert_close(found, expected, 1e-6)

    def test_it_is_added_to_what_is_there_and_leaves_other_rows_alone(self):
        ids, table = make(device=DEVICE)
        ids = ids.clamp(max=20)
        before = torch.randn_like(table)
        table.grad = before.clone()
        upstream = torch.randn(200, 40, device=DEVICE)
        embed(ids, table, torch.float32, impl="triton").backward(upstream)
        assert torch.equal(table.grad[21:], before[21:])
        expected = before.double().index_add_(0, ids, upstream.double())
        assert_close(table.grad, expected, 1e-6)

    def test_it_repeats_to_the_last_digit(self):
        ids, table = make(device=DEVICE)
        upstream = torch.randn(200, 40, device=DEVICE)
        assert torch.equal(*(gradient("triton", ids, table, upstream) for _ in range(2)))

    def test_a_table_that_is_no_leaf_gets_its_gradient_from_autograd(self):
        ids, table = make(device=DEVICE)
        upstream = torch.randn(200, 40, device=DEVICE)
        found, expected = (
            torch.autograd.grad(embed(ids, table * 2.0, torch.float32, impl=impl), table, upstream)[0]
            for impl in ("triton", "ref")
        )
        assert_close(found, expected)

    def test_a_tied_table_has_both_gradients(self):
        from pithwood.ops.linear_nll import linear_nll

        ids, table = make(60, 23, 16, DEVICE)
        target, counts = torch.randint(0, 23, (60,), device=DEVICE), torch.rand(60, device=DEVICE)

        def total(impl):
            own = table.detach().clone().requires_grad_()
            linear_nll(embed(ids, own, torch.float32, impl=impl), own, target, counts, impl=impl).backward()
            return own.grad

        assert_close(total("triton"), total("ref"))
