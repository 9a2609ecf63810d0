"""Differentiable scores of the units that a selection names: what distilled selectors and learned routers train on.

Legend: R selection rows, S selections per row, k selected per row, U units of all documents, T packed tokens,
H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import check_heads, check_packed, check_selection, check_summaries, compute_dtype
from pithwood.ops.packing import Packing, Selection


@without_autocast
def scores_at(q_THK: Tensor, s_UGK: Tensor, selection: Selection, packing: Packing) -> Tensor:
    """[R, S, k] fp32 (fp64 for fp64) scores query . summary of the selected units, differentiable in q and s.

    q_THK       [T_q, H, K]     queries
    s_UGK       [U, G, K]       summaries of the selection's units, in document order
    returns     -inf where the selection holds no id

    Queries and heads that share one id list share one score: the mean over the row's queries and over the set's heads,
    each head against the summary of its KV head. The mean ranks like the sum and does not grow with the row.
    Memory O(R S k K). Raises ValueError if the sets are not 1, G or H, or shapes do not fit.
    """
    check_packed("q", q_THK, packing.num_queries)
    check_packed("s", s_UGK)
    num_tokens, num_heads, dim = q_THK.shape
    groups = s_UGK.shape[1]
    check_heads(num_heads, groups)
    check_selection(selection, packing, num_heads, groups)
    check_summaries(s_UGK, packing, selection.unit)
    dtype = compute_dtype(q_THK.dtype)
    rows, sets = selection.ids.shape[:2]
    # Heads that share a summary can be averaged before it is gathered.
    shared = max(sets, groups)
    q_TXK = q_THK.to(dtype).view(num_tokens, shared, num_heads // shared, dim).mean(2)
    row_T = packing.row_of_query(selection.row_size)
    if selection.row_size == 1:
        q_RXK = q_TXK
    else:
        size_R = torch.zeros(rows, dtype=dtype, device=q_THK.device).index_add_(0, row_T, q_TXK.new_ones(num_tokens))
        sum_RXK = torch.zeros(rows, shared, dim, dtype=dtype, device=q_THK.device).index_add(0, row_T, q_TXK)
        q_RXK = sum_RXK / size_R.clamp(min=1)[:, None, None]
    doc_R = torch.zeros(rows, dtype=torch.int64, device=q_THK.device).index_copy(0, row_T, packing.query_doc())
    unit_RSk = packing.unit_offsets(selection.unit)[doc_R][:, None, None] + selection.ids.clamp(min=0)
    unit_RSk = unit_RSk.clamp_(max=max(s_UGK.shape[0] - 1, 0))
    head_X = torch.arange(shared, device=q_THK.device) // (shared // groups)
    unit_RXk = unit_RSk.expand(-1, shared, -1) if sets == 1 else unit_RSk
    score_RXk = (s_UGK.to(dtype)[unit_RXk, head_X[:, None]] * q_RXK[:, :, None]).sum(-1)
    score_RSk = score_RXk.mean(1, keepdim=True) if sets == 1 else score_RXk
    return score_RSk.masked_fill(selection.ids < 0, float("-inf"))
