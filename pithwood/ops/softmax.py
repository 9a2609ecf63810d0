"""Powers of two for softmax: the one place that decides how scores become weights.

Scores carry the factor log2(e), so weights are exp2 of differences. On CPU exp takes a path a hundred times slower
where its result is denormal, and so does a matrix product that reads denormals; exp2 with a floor meets neither.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def smallest_exponent(dtype: torch.dtype) -> float:
    """Weights below this power of two become exactly zero: 2^-80 in fp32, where 2^-24 is lost beside a weight of 1."""
    return -600.0 if dtype == torch.float64 else -80.0


def weights_(score2: Tensor, log2_total: Tensor) -> Tensor:
    """exp2(score2 - log2_total) in place; -inf scores and tiny weights give exact zeros, NaN stays NaN."""
    score2 = score2.sub_(log2_total)
    return F.threshold(score2, smallest_exponent(score2.dtype), float("-inf"), inplace=True).exp2_()


def finite_or_zero(x: Tensor) -> Tensor:
    """x with 0 for -inf, so that rows without any visible key subtract to -inf instead of NaN."""
    return x.masked_fill(x == float("-inf"), 0.0)
