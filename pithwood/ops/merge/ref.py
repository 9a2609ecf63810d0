"""Joining pieces of one softmax, in plain torch: the definition, and the only implementation.

Legend: p pieces, T packed tokens, H query heads, V value head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype


def merge_ref(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(o [T, H, V], lse [T, H]) over the union of the pieces' keys; see `merge`."""
    dtype = compute_dtype(
        torch.float64 if any(torch.float64 in (o.dtype, lse.dtype) for o, lse in pieces) else torch.float32
    )
    lse_pTH = torch.stack([lse.to(dtype) for _, lse in pieces])
    lse = _logsumexp(lse_pTH)
    # -inf - -inf is NaN: where nothing was seen, every weight is zero.
    seen_pTH = lse_pTH != float("-inf")
    weight_pTH = torch.where(seen_pTH, torch.exp(torch.where(seen_pTH, lse_pTH - _finite(lse), 0.0)), 0.0)
    total = torch.zeros_like(pieces[0][0], dtype=dtype)
    for weight, seen, (o, _) in zip(weight_pTH, seen_pTH, pieces, strict=True):
        total = total + weight[..., None] * torch.where(seen[..., None], o.to(dtype), 0.0)
    return total.to(pieces[0][0].dtype), lse


def _logsumexp(lse_pTH: Tensor) -> Tensor:
    """logsumexp over the pieces; -inf and zero gradient where all are -inf."""
    empty_TH = (lse_pTH == float("-inf")).all(0)
    lse = torch.where(empty_TH, 0.0, lse_pTH).logsumexp(0)
    return torch.where(empty_TH, float("-inf"), lse)


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == float("-inf"), 0.0, lse)
