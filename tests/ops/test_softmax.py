"""Weights from scores: as exp, exactly zero where they cannot matter, never denormal."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops.softmax import LOG2_E, finite_or_zero, weights_
from tests.numerics import assert_close

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_exponentials_of_differences(dtype):
    score, shift = torch.randn(50, 7, dtype=dtype), torch.randn(50, 1, dtype=dtype)
    assert_close(weights_(score * LOG2_E, shift * LOG2_E), torch.exp(score - shift), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_weights_and_hidden_keys_are_exact_zeros_and_nan_stays(dtype):
    score = torch.tensor([0.0, -50.0, -5000.0, float("-inf"), float("nan")], dtype=dtype)
    weights = weights_(score, torch.zeros(1, dtype=dtype))
    assert weights[0] == 1.0
    assert weights[1] == 2.0**-50
    assert weights[2] == weights[3] == 0.0
    assert weights[4].isnan()


def test_no_weight_is_denormal_whatever_the_spread_of_the_scores():
    weights = weights_(torch.linspace(-300, 0, 10_000), torch.zeros(1))
    assert not ((weights > 0) & (weights < torch.finfo(torch.float32).tiny)).any()
    # what is dropped is below the rounding of the row's sum
    assert weights[weights > 0].min() < 2.0**-70


def test_empty_rows_subtract_to_no_weight_instead_of_nan():
    score = torch.full((2, 3), float("-inf"))
    peak = finite_or_zero(score.amax(-1, keepdim=True))
    assert torch.count_nonzero(weights_(score, peak)) == 0
