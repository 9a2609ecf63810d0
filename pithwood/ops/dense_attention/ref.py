"""Full and sliding-window attention with each document's whole mask in view: the definition.

Legend: T packed tokens, L queries of one document, M keys of one document, H query heads, G KV heads,
K query/key head dim, V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype
from pithwood.ops.packing import Packing


def masked_attention(
    q_LHK: Tensor, k_MGK: Tensor, v_MGV: Tensor, mask_LHM: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [L, H, V], lse [L, H]) under a mask; rows that see nothing give zero and -inf, no gradient."""
    ratio = q_LHK.shape[1] // k_MGK.shape[1]
    score = torch.einsum("lhk,mhk->lhm", q_LHK, k_MGK.repeat_interleave(ratio, dim=1)) * scale
    score = score.masked_fill(~mask_LHM, float("-inf"))
    empty_LH = ~mask_LHM.any(-1)
    # A constant row instead of one without any finite score keeps NaN out of both passes.
    score = torch.where(empty_LH[..., None], 0.0, score)
    lse = score.logsumexp(-1)
    weight = torch.where(empty_LH[..., None], 0.0, torch.exp(score - lse[..., None]))
    o = torch.einsum("lhm,mhv->lhv", weight, v_MGV.repeat_interleave(ratio, dim=1))
    return o, torch.where(empty_LH, float("-inf"), lse)


def dense_ref(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(o [T, H, V], lse [T, H]) in fp32 (fp64 for fp64), gradients by autograd."""
    dtype = compute_dtype(q_THK.dtype)
    cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        position_L = torch.arange(q1 - q0, device=q_THK.device)[:, None] + (k1 - k0) - (q1 - q0)
        key_M = torch.arange(k1 - k0, device=q_THK.device)
        mask_LM = key_M <= position_L if packing.causal else torch.ones_like(key_M <= position_L)
        if window is not None:
            mask_LM = mask_LM & (key_M > position_L - window)
        mask_LHM = mask_LM[:, None].expand(-1, q_THK.shape[1], -1)
        q, k, v = q_THK[q0:q1].to(dtype), k_TGK[k0:k1].to(dtype), v_TGV[k0:k1].to(dtype)
        o, lse = masked_attention(q, k, v, mask_LHM, scale)
        outs.append(o)
        lses.append(lse)
    if not outs:
        empty = q_THK.new_zeros(0, q_THK.shape[1], dtype=dtype)
        return empty[..., None].expand(-1, -1, v_TGV.shape[2]), empty
    return torch.cat(outs), torch.cat(lses)
