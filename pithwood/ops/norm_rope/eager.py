"""The norm per head and the rotation as the two ops they are, one after the other: the fast path on CPU.

Legend: T packed tokens, H heads, K head dim.
"""

from __future__ import annotations

from torch import Tensor

from pithwood.ops.rms_norm import rms_norm
from pithwood.ops.rope import Rope


def norm_rope_eager(x_THK: Tensor, weight_K: Tensor | None, eps: float, rope: Rope | None) -> Tensor:
    """One of q and k; in half precision rounded after the norm and within the rotation."""
    if weight_K is not None:
        x_THK = rms_norm(x_THK, weight_K, eps, impl="torch")
    return x_THK if rope is None else rope.apply(x_THK)
