"""The kernels of the RMS norm against its definition: values, every gradient, the fused sum, strides, repeatability."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.rms_norm import add_rms_norm, branch_rms_norm, rms_norm
from tests.numerics import assert_close
from tests.ops.devices import DEVICE, KERNEL_DTYPES, KERNEL_MARKS

pytestmark = [pytest.mark.usefixtures("poison"), *KERNEL_MARKS]

SHAPES = [(5, 3, 8), (1, 3), (0, 4), (37, 129), (9, 2048), (700, 40)]


def leaves(shape, dtype, count=1):
    """`count` tensors of a shape, a weight, and as many gradients, where kernels run."""
    made = [torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE).requires_grad_() for _ in range(count)]
    weight = torch.randn(shape[-1]).to(DEVICE).requires_grad_()
    return made, weight, [torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_norm_and_its_gradients_are_those_of_the_definition(dtype, shape):
    (x,), weight, (upstream,) = leaves(shape, dtype)
    found, expected = (rms_norm(x, weight, 1e-5, impl=impl) for impl in ("triton", "ref"))
    assert found.dtype == dtype
    assert_close(found, expected)
    grads, wanted = (torch.autograd.grad(y, [x, weight], upstream) for y in (found, expected))
    assert_close(grads[0], wanted[0])
    assert grads[1].dtype == torch.float32
    assert_close(grads[1], wanted[1], 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_norm_of_a_sum_has_both_values_and_the_sum_of_both_gradients(dtype, shape):
    (x, y), weight, upstream = leaves(shape, dtype, 2)
    found, expected = (add_rms_norm(x, y, weight, 1e-5, impl=impl) for impl in ("triton", "ref"))
    assert torch.equal(found[0], x + y)
    assert_close(found[1], expected[1])
    grads, wanted = (torch.autograd.grad(outs, [x, y, weight], upstream) for outs in (found, expected))
    assert torch.equal(grads[0], grads[1])
    assert_close(grads[0], wanted[0])
    assert_close(grads[2], wanted[2], 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_branch_has_its_input_and_norm_and_the_sum_of_both_gradients(dtype):
    (x,), weight, (upstream,) = leaves((37, 129), dtype)
    passed = torch.randn_like(upstream)
    found, expected = (branch_rms_norm(x * 1.0, weight, 1e-5, impl=impl) for impl in ("triton", "ref"))
    assert torch.equal(found[0], x)
    assert_close(found[1], expected[1])
    for pulled in ((0, 1), (0,), (1,)):
        ups = [(passed, upstream)[place] for place in pulled]
        leaves_of = [x, weight] if 1 in pulled else [x]
        grads, wanted = (
            torch.autograd.grad([outs[place] for place in pulled], leaves_of, ups, retain_graph=True)
            for outs in (found, expected)
        )
        for grad, want in zip(grads, wanted, strict=True):
            assert_close(grad, want, 1e-2 if dtype != torch.float32 else None)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_outputs_may_go_unused(used):
    (x, y), weight, upstream = leaves((7, 24), torch.float32, 2)
    found, expected = (add_rms_norm(x, y, weight, 1e-5, impl=impl)[used] for impl in ("triton", "ref"))
    grads, wanted = (torch.autograd.grad(out, [x, y], upstream[0]) for out in (found, expected))
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want)


def test_rows_at_a_distance_and_gradients_of_another_layout():
    fused = torch.randn(6, 40, device=DEVICE)
    weight = torch.randn(16, device=DEVICE)
    x = fused[:, 8:24].requires_grad_()
    upstream = torch.randn(16, 6, device=DEVICE).t()
    found, expected = (rms_norm(x, weight, 1e-6, impl=impl) for impl in ("triton", "ref"))
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0])


def test_gradients_repeat_to_the_last_digit():
    (x,), weight, (upstream,) = leaves((1500, 24), torch.float32)
    first, again = (
        torch.autograd.grad(rms_norm(x, weight, 1e-6, impl="triton"), [x, weight], upstream) for _ in range(2)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_a_nan_row_spoils_itself_alone():
    x = torch.randn(40, 24, device=DEVICE)
    x[17] = float("nan")
    normed = rms_norm(x, torch.ones(24, device=DEVICE), 1e-6, impl="triton")
    assert normed.isnan().any(1).nonzero().flatten().tolist() == [17]


def test_large_half_values_do_not_overflow_inside():
    x = torch.full((2, 64), 3e4, dtype=torch.float16, device=DEVICE)
    found = rms_norm(x, torch.ones(64, device=DEVICE), 1e-6, impl="triton")
    assert_close(found, torch.ones(2, 64, dtype=torch.float16))


def test_the_kernels_refuse_fp64_and_are_known_to_the_compiler():
    from pithwood.ops.rms_norm.triton import rms_norm_backward, rms_norm_forward

    x, weight = torch.randn(5, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    with pytest.raises(ValueError, match=r"fp32, fp16 and bf16, got torch\.float64; use impl='torch'"):
        rms_norm(x.double(), weight, 1e-6, impl="triton")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(rms_norm_forward.op, (x, x, weight, 1e-6), test_utils=tests)
    inv_rms = torch.ones(5, device=DEVICE)
    torch.library.opcheck(rms_norm_backward.op, (x, None, x, weight, inv_rms), test_utils=tests)
