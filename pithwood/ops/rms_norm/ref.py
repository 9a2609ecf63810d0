"""Root-mean-square normalisation as its formula: the definition. Gradients by autograd.

Legend: D normalised (last) dim.
"""

from __future__ import annotations

from torch import Tensor

from pithwood.ops.checks import compute_dtype


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in fp32 (fp64 for fp64), rounded once."""
    wide = x.to(compute_dtype(x.dtype))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(wide.dtype)).to(x.dtype)
