"""The norm per head and the rotation by position as formulas: the definition. Gradients by autograd.

Legend: T packed tokens, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype
from pithwood.ops.rope import Rope


def norm_rope_ref(x_THK: Tensor, weight_K: Tensor | None, eps: float, rope: Rope | None) -> Tensor:
    """One of q and k, computed in fp32 (fp64 for fp64) and rounded once."""
    wide = x_THK.to(compute_dtype(x_THK.dtype))
    if weight_K is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight_K.to(wide.dtype)
    if rope is not None:
        half = wide.shape[-1] // 2
        cos, sin = (x.to(wide.dtype)[:, None, :half] for x in (rope.cos_TK, rope.sin_TK))
        # the pair (i, i + K/2) turns by the token's position times the pair's frequency
        a, b = wide[..., :half], wide[..., half:]
        wide = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return wide.to(x_THK.dtype)
