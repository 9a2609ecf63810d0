"""Linear map whose weight is kept in a master dtype and used in the input's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in]^T (+ bias) in x's dtype; fp32 master weights are cast on the fly, gradients come
    back fp32.
    """
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
