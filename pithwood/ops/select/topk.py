"""Block selection for training: scores exist only for a bounded number of (query, block) pairs at a time.

Scores are turned into integers that order like the floats and carry the block number in their low bits. All keys of a
row then differ, so the result is exact under ties and independent of the algorithm that finds the maximum.

Legend: T packed tokens, R rows of one chunk of queries, U units (blocks), n units of one document, S selections per
row, k selected per row, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import work_budget
from pithwood.ops.packing import Packing

LIVE_SCORES = 1 << 18
"""Scores held at once (2 MiB of int64 keys): they stay in a core's cache over the passes that search them."""
REPEATED_MAX = 12
"""Up to this many ids are found by taking the maximum repeatedly, which reads the keys along rows of contiguous
queries; above, torch.topk is faster."""
NO_KEY = torch.iinfo(torch.int64).min
RANK_BITS = 0xFFFFFFFF


def select_topk(
    q_TSK: Tensor, s_UGK: Tensor, packing: Packing, top_k: int, block_size: int, own: bool, tie: str
) -> Tensor:
    """ids [T, S, k] int32 of the best candidate blocks, ascending, -1 padded at the end.

    q_TSK   [T, S, K]   queries as they are scored, S a multiple of G
    s_UGK   [U, G, K]   block means as they are scored, same dtype as q_TSK
    own                 put each query's own block among the ids; it counts in top_k

    Memory O(T k) plus LIVE_SCORES; time O(T n K) for each document. Offsets are read on the host (free on CPU).
    """
    num_tokens, sets, _ = q_TSK.shape
    ids_TSk = torch.full((num_tokens, sets, top_k), -1, dtype=torch.int32, device=q_TSK.device)
    if ids_TSk.numel() == 0 or s_UGK.shape[0] == 0:
        return ids_TSk
    cu_q, cu_k, unit_offsets = (x.tolist() for x in (packing.cu_q, packing.cu_k, packing.unit_offsets(block_size)))
    every_score_is_number = _no_score_can_be_nan(q_TSK, s_UGK)
    if every_score_is_number:
        ids_TSk.copy_(_all_candidates(packing, top_k, block_size, own)[:, None])
    budget = top_k - own
    for doc in range(packing.num_docs):
        start, length = cu_q[doc], cu_q[doc + 1] - cu_q[doc]
        shift = cu_k[doc + 1] - cu_k[doc] - length
        num_units = unit_offsets[doc + 1] - unit_offsets[doc]
        s_GnK = s_UGK[unit_offsets[doc] : unit_offsets[doc + 1]].transpose(0, 1).contiguous()
        # Queries whose candidates all fit need no scores, unless one of them could be NaN and must be left out.
        if not every_score_is_number:
            first = 0
        elif packing.causal:
            first = max((budget + 1) * block_size - shift, 0)
        else:
            # A query before the first key has no own block, so its candidates are one more.
            first = 0 if num_units - (own and shift >= 0) > budget else length
        if budget == 0 and not every_score_is_number:
            ids_TSk[start : start + length] = _all_candidates(packing, top_k, block_size, own)[
                start : start + length, None
            ]
            continue
        rows = max(1, work_budget(LIVE_SCORES, q_TSK.device) // (sets * max(num_units, 1)))
        for begin in range(first, length if num_units else 0, rows):
            end = min(begin + rows, length)
            position_R = torch.arange(begin + shift, end + shift, device=q_TSK.device)
            own_R = position_R.div(block_size, rounding_mode="floor")
            # Causal candidates lie strictly before the last query's block.
            visible = min(max((end - 1 + shift) // block_size, 0), num_units) if packing.causal else num_units
            score = _scores(q_TSK[start + begin : start + end], s_GnK[:, :visible])
            best = _best_ids(score, own_R, budget, tie, packing.causal, own, not every_score_is_number)
            ids_TSk[start + begin : start + end] = _ascending(best, own_R, sets, top_k, own, num_units)
    return ids_TSk


def _no_score_can_be_nan(q_TSK: Tensor, s_UGK: Tensor) -> bool:
    """True if no product of these queries and means can overflow or be NaN (then only ranks are to be found)."""
    bound = q_TSK.abs().amax().double() * s_UGK.abs().amax().double() * q_TSK.shape[-1]
    return bool(bound < torch.finfo(q_TSK.dtype).max / 2)


def _all_candidates(packing: Packing, top_k: int, block_size: int, own: bool) -> Tensor:
    """[T, k] int32: all candidates of a query (and its own block) where they fit; else unspecified."""
    lengths = (packing.cu_k[1:] - packing.cu_k[:-1]).long()
    own_T = packing.query_key_position().div(block_size, rounding_mode="floor")
    if packing.causal:
        last_T = own_T if own else own_T - 1
    else:
        last_T = ((lengths + block_size - 1) // block_size - 1)[packing.query_doc()]
    slot_k = torch.arange(top_k, device=own_T.device)
    ids_Tk = torch.where(slot_k <= last_T[:, None], slot_k, -1)
    if own and top_k == 1:
        ids_Tk = own_T[:, None].clamp(min=-1)
    return ids_Tk.to(torch.int32)


def _scores(q_RSK: Tensor, s_GnK: Tensor) -> Tensor:
    """[G, n, R * S/G] scores in the inputs' dtype; queries run along the last dimension, heads of a group fastest."""
    rows, sets, dim = q_RSK.shape
    groups = s_GnK.shape[0]
    q_GrK = q_RSK.view(rows, groups, sets // groups, dim).transpose(0, 1).reshape(groups, -1, dim)
    return torch.bmm(s_GnK, q_GrK.transpose(1, 2))


def _best_ids(
    score_Gnr: Tensor, own_R: Tensor, count: int, tie: str, causal: bool, own: bool, check_nan: bool
) -> Tensor:
    """[count', G, r] int64 ids of the best candidates in descending order, -1 where a row has no more."""
    groups, num_units, rows = score_Gnr.shape
    count = min(count, num_units)
    if count == 0:
        return score_Gnr.new_empty((0, groups, rows), dtype=torch.int64)
    unit_n1 = torch.arange(num_units, device=score_Gnr.device)[:, None]
    own_r = own_R.repeat_interleave(rows // own_R.shape[0])
    excluded = score_Gnr.isnan() if check_nan else None
    if causal or own:
        outside = unit_n1 >= own_r if causal else unit_n1 == own_r
        excluded = outside[None] if excluded is None else excluded.logical_or_(outside)
    if score_Gnr.dtype == torch.float64:
        return _best_of_doubles(score_Gnr, excluded, count, tie)
    # -0.0 + 0.0 = +0.0: both zeros must tie. Negative floats order backwards as integers: flip all but the sign.
    bits = score_Gnr.add_(0.0).view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    rank_n1 = unit_n1 if tie == "later" else num_units - 1 - unit_n1
    key = bits.long().bitwise_left_shift_(32).add_(rank_n1)
    if excluded is not None:
        key.masked_fill_(excluded, NO_KEY)
    if count <= REPEATED_MAX:
        best = []
        for slot in range(count):
            best.append(key.amax(1, keepdim=True))
            if slot + 1 < count:
                rank = best[-1].bitwise_and(RANK_BITS)
                key.scatter_(1, rank if tie == "later" else num_units - 1 - rank, NO_KEY)
        best_cGr = torch.cat(best, dim=1).transpose(0, 1)
    else:
        best_cGr = key.transpose(1, 2).contiguous().topk(count, dim=-1).values.permute(2, 0, 1)
    rank = best_cGr & RANK_BITS
    ids = rank if tie == "later" else num_units - 1 - rank
    return ids.masked_fill(best_cGr == NO_KEY, -1)


def _best_of_doubles(score_Gnr: Tensor, excluded: Tensor | None, count: int, tie: str) -> Tensor:
    """As _best_ids for fp64 scores, which leave an integer no room for the unit: two stable sorts, slower."""
    num_units = score_Gnr.shape[1]
    excluded = torch.zeros_like(score_Gnr, dtype=torch.bool) if excluded is None else excluded.expand_as(score_Gnr)
    score = score_Gnr.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    if tie == "later":
        order = num_units - 1 - score.flip(1).argsort(dim=1, descending=True, stable=True)
    else:
        order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, excluded.gather(1, order).int().argsort(dim=1, stable=True))[:, :count]
    return order.masked_fill(excluded.gather(1, order), -1).transpose(0, 1)


def _ascending(best_cGr: Tensor, own_R: Tensor, sets: int, top_k: int, own: bool, num_units: int) -> Tensor:
    """[R, S, k] int32: the chosen ids and the own block in ascending order, -1 at the end."""
    count, groups, _ = best_cGr.shape
    rows = own_R.shape[0]
    ids = best_cGr.view(count, groups, rows, sets // groups).permute(2, 1, 3, 0).reshape(rows, sets, count)
    if own:
        ids = torch.cat(
            [ids, own_R.clamp(min=-1, max=num_units - 1)[:, None, None].expand(-1, ids.shape[1], 1)], dim=-1
        )
    ids = ids.masked_fill(ids < 0, num_units).sort(dim=-1).values
    ids = ids.masked_fill_(ids == num_units, -1).to(torch.int32)
    return torch.nn.functional.pad(ids, (0, top_k - ids.shape[-1]), value=-1)
