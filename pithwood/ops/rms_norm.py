"""Root-mean-square normalisation with fp32 inside and one saved copy of its input.

Legend: D normalised (last) dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype.

    x         [..., D] any float dtype; the arithmetic is fp32 (fp64 for fp64 input)
    weight    [D]      any float dtype, typically the fp32 master weight; its gradient comes back in that dtype
    raises    ValueError if weight is not [D]

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm weight has shape {tuple(weight.shape)}; the last dim of x needs ({x.shape[-1]},)")
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Saves x and one scalar per row; the normalised rows are computed again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = _wide(x)
        x_wide = x.to(wide)
        inv_rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inv_rms)
        return (x_wide * inv_rms * weight.to(wide)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor):  # type: ignore[override]
        x, weight, inv_rms = ctx.saved_tensors
        wide = _wide(x)
        grad_wide, weight_wide = grad_y.to(wide), weight.to(wide)
        unit = x.to(wide) * inv_rms
        grad_by_channel = grad_wide * unit
        # mean over D of (grad * weight * unit), as one matrix-vector product
        projection = (grad_by_channel @ weight_wide[:, None]) / x.shape[-1]
        grad_x = torch.addcmul(grad_wide * weight_wide, unit, projection, value=-1).mul_(inv_rms)
        grad_weight = grad_by_channel.reshape(-1, x.shape[-1]).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
