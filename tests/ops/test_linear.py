"""Linear maps on master weights: values, gradients, and where gradients are added up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pithwood.ops.linear import _Linears, add_product, add_weight_gradient, linear, linears, product_adds_fp32
from pithwood.ops.master import deferred_gradients, keep_copies, run_deferred
from tests.numerics import assert_close

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("poison")]
BF16 = torch.bfloat16


def make(dtype=BF16, bias=True, device="cpu"):
    """(x, three weights that share it, their biases), leaves."""
    x = torch.randn(7, 5, 24, device=device).to(dtype).requires_grad_()
    weights = [torch.nn.Parameter(torch.randn(width, 24, device=device)) for width in (40, 8, 16)]
    biases = [torch.nn.Parameter(torch.randn(w.shape[0], device=device)) if bias else None for w in weights]
    return x, weights, biases


def exact(x, weights, biases, upstream):
    """(outputs, gradients of x, weights and biases) in fp64 from the rounded operands."""
    x = x.detach().double().requires_grad_()
    weights = [w.detach().to(BF16).double().requires_grad_() for w in weights]
    biases = [None if b is None else b.detach().to(BF16).double().requires_grad_() for b in biases]
    outs = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    leaves = [x, *weights, *(b for b in biases if b is not None)]
    return outs, torch.autograd.grad(outs, leaves, [g.double() for g in upstream])


def check_fast_path(device, bias=True, defer=False):
    """The fast path's values and gradients, added to what `.grad` held; at once, or after the backward pass."""
    x, weights, biases = make(bias=bias, device=device)
    outs = _Linears.apply(x, 3, *weights, *biases)
    upstream = [torch.randn(out.shape, device=device).to(BF16) for out in outs]
    expected, grads = exact(x, weights, biases, upstream)
    for out, want in zip(outs, expected, strict=True):
        assert out.dtype == BF16
        assert_close(out, want)
    before = torch.randn(40, 24, device=device)
    weights[0].grad = before.clone()
    if defer:
        queue = []
        with deferred_gradients(queue):
            torch.autograd.backward(outs, upstream)
        assert torch.equal(weights[0].grad, before)
        assert weights[1].grad is None
        run_deferred(queue)
    else:
        torch.autograd.backward(outs, upstream)
    assert_close(x.grad, grads[0])
    found = [weights[0].grad - before, *(p.grad for p in (*weights[1:], *(b for b in biases if b is not None)))]
    for grad, want in zip(found, grads[1:], strict=True):
        assert grad.dtype == torch.float32
        # products of bf16 operands in fp32: no rounding to bf16 in between
        assert_close(grad, want, 1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fast_path_adds_fp32_gradients_to_the_weights(bias):
    check_fast_path("cpu", bias)


def test_gradients_of_the_weights_can_wait_until_after_the_backward_pass():
    check_fast_path("cpu", defer=True)


@pytest.mark.gpu
def test_they_wait_on_a_gpu_too_whose_backward_pass_runs_in_a_thread_of_its_own():
    check_fast_path("cuda", defer=True)


def test_on_a_cpu_master_weights_are_cast_and_their_gradients_returned():
    x, weights, biases = make()
    outs = linears(x, weights, biases)
    for out, weight, bias in zip(outs, weights, biases, strict=True):
        assert torch.equal(out, F.linear(x, weight.to(BF16), bias.to(BF16)))
        assert torch.equal(out, linear(x, weight, bias))
    grads = torch.autograd.grad([out.sum() for out in outs], [x, *weights, *biases])
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, [x, *weights, *biases], strict=True))
    assert all(weight.grad is None for weight in weights)


def test_the_fast_path_multiplies_by_the_kept_copy():
    x, weights, biases = make(bias=False)
    keep_copies(weights, BF16)
    weights[0].kept_copy[0].zero_()  # what no cast of the weight would give
    outs = _Linears.apply(x, 3, *weights, *biases)
    assert not outs[0].any()
    assert outs[1].any()


def test_an_output_without_gradient_leaves_its_weight_alone():
    x, weights, biases = make(bias=False)
    _, second, _ = _Linears.apply(x, 3, *weights, *biases)
    second.sum().backward()
    assert weights[0].grad is None
    assert weights[1].grad is not None
    assert x.grad is not None


def test_a_weight_that_is_no_leaf_gets_its_gradient_from_autograd():
    x, weights, biases = make(bias=False)
    leaf = torch.nn.Parameter(torch.randn(24))
    outs = _Linears.apply(x, 3, weights[0] * leaf, *weights[1:], *biases)
    outs[0].sum().backward()
    expected = x.detach().float().sum((0, 1)) * weights[0].detach().sum(0)
    assert_close(leaf.grad, expected)


def test_a_sink_is_overwritten_first_and_added_to_after():
    weight = torch.nn.Parameter(torch.randn(8, 24))
    grad, x = torch.randn(10, 8), torch.randn(10, 24)
    for times in (1, 2):
        assert add_weight_gradient(weight, grad, x) is None
        assert_close(weight.grad, times * grad.t() @ x)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_the_fast_path_on_a_gpu(bias):
    check_fast_path("cuda", bias)


@pytest.mark.gpu
def test_linear_takes_the_fast_path_and_the_host_never_waits():
    x, weights, _ = make(device="cuda")
    keep_copies(weights, BF16)
    (linear(x, weights[0]).sum() + sum(out.sum() for out in linears(x, weights, [None] * 3))).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (linear(x, weights[0]).sum() + sum(out.sum() for out in linears(x, weights, [None] * 3))).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ones = torch.ones(35, 40, device="cuda", dtype=BF16)
    assert_close(weights[0].grad, 4 * (ones.float().t() @ x.detach().float().flatten(0, 1)), 1e-5)


@pytest.mark.gpu
def test_a_product_adds_to_an_fp32_sum_in_place():
    assert product_adds_fp32(torch.device("cuda"))
    grad, x = (torch.randn(300, width, device="cuda").to(BF16) for width in (64, 96))
    total = torch.randn(64, 96, device="cuda")
    expected = total.double() + grad.double().t() @ x.double()
    assert add_product(total, grad, x, True) is total
    assert_close(total, expected, 1e-5)
