"""Attention to selected units with the whole mask in view, document by document: the definition.

Legend: T packed tokens, L queries of one document, M keys of one document, n units of one document, H query heads,
G KV heads, K query/key head dim, V value head dim, k selected per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype
from pithwood.ops.dense_attention.ref import masked_attention
from pithwood.ops.packing import Packing, Selection


def visible_mask(selection_ids_LHk: Tensor, unit: int, num_keys: int, shift: int, causal: bool) -> Tensor:
    """[L, H, M] bool: keys of the selected units, up to the query's own position `row + shift` if causal."""
    length = selection_ids_LHk.shape[0]
    num_units = (num_keys + unit - 1) // unit
    ids = selection_ids_LHk.long()
    chosen_LHn = torch.zeros(*ids.shape[:2], num_units + 1, dtype=torch.bool, device=ids.device)
    chosen_LHn.scatter_(-1, ids.masked_fill(ids < 0, num_units), True)
    key_M = torch.arange(num_keys, device=ids.device)
    mask_LHM = chosen_LHn[..., key_M // unit]
    if causal:
        position_L = torch.arange(length, device=ids.device) + shift
        mask_LHM = mask_LHM & (key_M <= position_L[:, None, None])
    return mask_LHM


def attend_ref(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [T, H, V], lse [T, H]) in fp32 (fp64 for fp64); T x H x T memory per document, gradients by autograd."""
    dtype = compute_dtype(q_THK.dtype)
    ids_THk = selection.ids_per_head(packing, q_THK.shape[1], k_TGK.shape[1])
    cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        mask_LHM = visible_mask(ids_THk[q0:q1], selection.unit, k1 - k0, (k1 - k0) - (q1 - q0), packing.causal)
        q, k, v = q_THK[q0:q1].to(dtype), k_TGK[k0:k1].to(dtype), v_TGV[k0:k1].to(dtype)
        o, lse = masked_attention(q, k, v, mask_LHM, scale)
        outs.append(o)
        lses.append(lse)
    if not outs:
        return q_THK.new_zeros(0, q_THK.shape[1], v_TGV.shape[2], dtype=dtype), q_THK.new_zeros(
            0, q_THK.shape[1], dtype=dtype
        )
    return torch.cat(outs), torch.cat(lses)
