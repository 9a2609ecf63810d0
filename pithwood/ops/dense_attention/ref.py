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


def dense_grads_ref(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) like q, k, v: of each score s with weight p = exp(s - lse), ds = p * (do . v - do . o)."""
    dtype, ratio = compute_dtype(q.dtype), q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q_LHK, do_LHV, o_LHV, lse_LH = (x[q0:q1].to(dtype) for x in (q, grad_o, o, lse))
        k_MHK, v_MHV = (x[k0:k1].to(dtype).repeat_interleave(ratio, dim=1) for x in (k, v))
        position_L = torch.arange(q1 - q0, device=q.device)[:, None] + (k1 - k0) - (q1 - q0)
        hidden_LM = torch.arange(k1 - k0, device=q.device) > position_L
        if not packing.causal:
            hidden_LM = torch.zeros_like(hidden_LM)
        score_LHM = torch.einsum("lhk,mhk->lhm", q_LHK, k_MHK) * scale
        weight_LHM = torch.exp(score_LHM - lse_LH[..., None]).masked_fill(hidden_LM[:, None], 0.0)
        pull_LHM = torch.einsum("lhv,mhv->lhm", do_LHV, v_MHV) - (do_LHV * o_LHV).sum(-1, keepdim=True)
        ds_LHM = weight_LHM * pull_LHM * scale
        dq[q0:q1] = torch.einsum("lhm,mhk->lhk", ds_LHM, k_MHK)
        dk[k0:k1] = torch.einsum("lhm,lhk->mhk", ds_LHM, q_LHK).unflatten(1, (-1, ratio)).sum(2)
        dv[k0:k1] = torch.einsum("lhm,lhv->mhv", weight_LHM, do_LHV).unflatten(1, (-1, ratio)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
