"""Root-mean-square normalisation in plain torch with its gradient written out: the fast path on CPU.

Legend: D normalised (last) dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype


def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As rms_norm_ref."""
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Saves x and one scalar per row; the normalised rows are computed again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = compute_dtype(x.dtype)
        x_wide = x.to(wide)
        inv_rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inv_rms)
        return (x_wide * inv_rms * weight.to(wide)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor):  # type: ignore[override]
        x, weight, inv_rms = ctx.saved_tensors
        wide = compute_dtype(x.dtype)
        grad_wide, weight_wide = grad_y.to(wide), weight.to(wide)
        unit = x.to(wide) * inv_rms
        grad_by_channel = grad_wide * unit
        # mean over D of (grad * weight * unit), as one matrix-vector product
        projection = (grad_by_channel @ weight_wide[:, None]) / x.shape[-1]
        grad_x = torch.addcmul(grad_wide * weight_wide, unit, projection, value=-1).mul_(inv_rms)
        grad_weight = grad_by_channel.reshape(-1, x.shape[-1]).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
