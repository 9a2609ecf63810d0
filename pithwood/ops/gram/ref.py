"""Products of matrices with their own transposes, and a quadratic in them: the definition.

Legend: M matrices, R rows, C columns, K min(R, C).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype


def gram_ref(x_MRC: Tensor, scale_M: Tensor | None) -> Tensor:
    """[M, K, K] in x's dtype: (s X)(s X)^T where X is wide or square, (s X)^T (s X) where it is tall."""
    x = x_MRC.to(compute_dtype(x_MRC.dtype))
    if scale_M is not None:
        x = x * scale_M.to(x.dtype)[:, None, None]
    tall = x.shape[1] > x.shape[2]
    return (x.mT @ x if tall else x @ x.mT).to(x_MRC.dtype)


def gram_polynomial_ref(g_MKK: Tensor, a: float, b: float, c: float, scale_M: Tensor | None) -> Tensor:
    """[M, K, K] in g's dtype: s (a I + b G + c G^2) for symmetric G."""
    g = g_MKK.to(compute_dtype(g_MKK.dtype))
    y = a * torch.eye(g.shape[1], dtype=g.dtype, device=g.device) + b * g + c * (g @ g)
    if scale_M is not None:
        y = y * scale_M.to(y.dtype)[:, None, None]
    return y.to(g_MKK.dtype)
