"""RMS norm against its formula, with gradients, in every dtype."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.rms_norm import rms_norm
from tests.numerics import assert_close

pytestmark = pytest.mark.quick


def _formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(5, 3, 8), (1, 3), (0, 4), (7, 129)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_and_its_gradients_follow_the_formula(dtype, shape):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], upstream)
    expected = _formula(x, weight, 1e-5)
    expected_x, expected_weight = torch.autograd.grad(expected, [x, weight], upstream.double())
    assert grad_weight.dtype == weight.dtype
    assert_close(y, expected)
    assert_close(grad_x, expected_x.to(dtype))
    assert_close(grad_weight, expected_weight.to(weight.dtype), 1e-12 if dtype == torch.float64 else 1e-5)


def test_gradcheck():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))


def test_large_half_values_do_not_overflow_inside():
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    assert_close(rms_norm(x, torch.ones(64), 1e-6), torch.ones(2, 64, dtype=torch.float16))


def test_broadcast_and_strided_inputs():
    fused = torch.randn(6, 24, dtype=torch.float64)
    x = fused[:, 8:16].requires_grad_()
    y = rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-6)
    assert_close(y, _formula(x, torch.ones(8), 1e-6))
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(_formula(x, torch.ones(8), 1e-6).sum(), x)
    assert_close(grad, expected, 1e-9)


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\); the last dim of x needs \(8,\)"):
        rms_norm(torch.randn(3, 8), torch.ones(4), 1e-6)
