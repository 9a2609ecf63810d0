"""Block selection, document by document with all scores in view: the definition.

Legend: T packed tokens, L queries of one document, U units (blocks), n units of one document, S selections per row,
k selected per row, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.packing import Packing


def select_ref(
    q_TSK: Tensor, s_UGK: Tensor, packing: Packing, top_k: int, block_size: int, own: bool, tie: str
) -> Tensor:
    """ids [T, S, k] int32 of the best candidate blocks, ascending, -1 padded at the end; see `select_topk`."""
    num_tokens, sets, _ = q_TSK.shape
    ids_TSk = torch.full((num_tokens, sets, top_k), -1, dtype=torch.int32, device=q_TSK.device)
    cu_q, cu_k, unit_offsets = (x.tolist() for x in (packing.cu_q, packing.cu_k, packing.unit_offsets(block_size)))
    for doc in range(packing.num_docs):
        length, shift = cu_q[doc + 1] - cu_q[doc], (cu_k[doc + 1] - cu_k[doc]) - (cu_q[doc + 1] - cu_q[doc])
        num_units = unit_offsets[doc + 1] - unit_offsets[doc]
        if length == 0 or num_units == 0:
            continue
        s_nSK = s_UGK[unit_offsets[doc] : unit_offsets[doc + 1]].repeat_interleave(sets // s_UGK.shape[1], dim=1)
        score_LSn = torch.einsum("lsk,nsk->lsn", q_TSK[cu_q[doc] : cu_q[doc + 1]], s_nSK)
        position_L = torch.arange(length, device=q_TSK.device) + shift
        own_L11 = position_L.div(block_size, rounding_mode="floor")[:, None, None]
        unit_n = torch.arange(num_units, device=q_TSK.device)
        candidate = unit_n < own_L11 if packing.causal else (unit_n != own_L11) | (not own)
        candidate = candidate & ~score_LSn.isnan()
        chosen_LSn = best_of(score_LSn, candidate, top_k - own, tie)
        if own:
            chosen_LSn |= unit_n == own_L11
        # Ascending ids: the chosen ones keep their own number, all others sort behind them.
        ids = torch.where(chosen_LSn, unit_n, num_units).sort(dim=-1).values[..., :top_k]
        ids = torch.where(ids == num_units, -1, ids).to(torch.int32)
        ids_TSk[cu_q[doc] : cu_q[doc + 1], :, : ids.shape[-1]] = ids
    return ids_TSk


def best_of(score_LSn: Tensor, candidate_LSn: Tensor, count: int, tie: str) -> Tensor:
    """Bool mask of the `count` best candidates per row; equal scores go to the later or the earlier unit.

    A stable descending sort keeps equal scores in their order, so the units are put in the order of preference first;
    a second stable sort moves what is no candidate behind every candidate, even one whose score is -inf.
    """
    flip = tie == "later"
    score, candidate = (x.flip(-1) if flip else x for x in (score_LSn, candidate_LSn.expand_as(score_LSn)))
    order = score.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).argsort(
        dim=-1, descending=True, stable=True
    )
    order = order.gather(-1, candidate.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    best = torch.zeros_like(candidate).scatter_(-1, order[..., :count], True) & candidate
    return best.flip(-1) if flip else best
