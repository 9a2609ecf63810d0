"""Full and sliding-window attention with each document's whole mask in view: the definition.

Legend: T packed tokens, L queries of one document, M keys of one document, H query heads, G KV heads,
K query/key head dim, V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.attend.ref import masked_attention
from pithwood.ops.checks import compute_dtype
from pithwood.ops.packing import Packing


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
