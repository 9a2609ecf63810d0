"""Full attention as one `scaled_dot_product_attention` per document: the fast path on CPU.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pithwood.ops.packing import Packing


def sdpa_fits(q_THK: Tensor, v_TGV: Tensor, packing: Packing) -> bool:
    """True if V = K and every document has keys and is square, has one query or is not causal: no mask to build."""
    if q_THK.shape[2] != v_TGV.shape[2]:
        return False
    if packing.self_attention:
        return True
    lengths, keys = packing.cu_q.diff().tolist(), packing.cu_k.diff().tolist()
    unmasked = all(q == k or q <= 1 or not packing.causal for q, k in zip(lengths, keys, strict=True))
    return unmasked and all(q == 0 or k > 0 for q, k in zip(lengths, keys, strict=True))


def sdpa_attention(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, scale: float) -> Tensor:
    """o [T, H, V] like q. Documents are computed apart, so none sees the others, in digits or otherwise."""
    lengths, keys = packing.cu_q.diff().tolist(), packing.cu_k.diff().tolist()
    outs = []
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    # split, not slices: its backward is one concatenation instead of a full-size buffer per document.
    for q, k, v in zip(q_THK.split(lengths), k_TGK.split(keys), v_TGV.split(keys), strict=True):
        if q.shape[0] == 0:
            continue
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        causal = packing.causal and q.shape[2] > 1
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs) if outs else q_THK.new_zeros(0, q_THK.shape[1], v_TGV.shape[2])
