"""How much attention each selected unit received: the detached target that distilled selectors train on.

Legend: R selection rows, S selections per row, k selected per row, T packed tokens, H query heads, G KV heads, K head
dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.attend.query_major import row_batches, row_scores
from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import check_heads, check_packed, check_selection, compute_dtype
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.softmax import LOG2_E, finite_or_zero, weights_


@without_autocast
@torch.no_grad()
def attention_mass(
    q_THK: Tensor,
    k_TGK: Tensor,
    lse_TH: Tensor,
    packing: Packing,
    selection: Selection,
    scale: float | None = None,
) -> Tensor:
    """[R, S, k] fp32 (fp64 for fp64): probability that fell on each selected unit, averaged over what shares the id
    list.

    q_THK, k_TGK, scale         as given to `attend`, causality and partial units included
    lse_TH      [T_q, H]        log-sum that normalises: `attend`'s own, or that of dense attention (then the masses of
                                a row sum to the share of attention that the selection covers)
    returns                     mean over the row's queries and the set's heads; 0 where there is no id; detached

    Chunked over rows: O(R S k unit) time, bounded workspace. Raises ValueError on shapes that do not fit.
    """
    check_packed("q", q_THK, packing.num_queries)
    check_packed("k", k_TGK, packing.num_keys)
    num_heads, groups = q_THK.shape[1], k_TGK.shape[1]
    check_heads(num_heads, groups)
    if lse_TH.shape != q_THK.shape[:2]:
        raise ValueError(f"lse must be [T_q, H] = {tuple(q_THK.shape[:2])}, got {tuple(lse_TH.shape)}")
    ids = selection.ids
    check_selection(selection, packing, num_heads, groups)
    dtype = compute_dtype(q_THK.dtype)
    scale = q_THK.shape[2] ** -0.5 if scale is None else scale
    mass_RSk = torch.zeros(ids.shape, dtype=dtype, device=q_THK.device)
    if k_TGK.shape[0] == 0:
        return mass_RSk
    q_rows, k_rows = (x.to(dtype).reshape(-1, x.shape[2]) for x in (q_THK, k_TGK))
    log2_rows = finite_or_zero(lse_TH.to(dtype).reshape(-1)) * LOG2_E
    row = 0
    for batch in row_batches(packing, selection, num_heads, groups):
        s, _, _ = row_scores(batch, q_rows, k_rows, scale)
        n, r, c = s.shape
        p = weights_(s, log2_rows.index_select(0, batch.rows).view(n, r, 1))
        real = torch.zeros(n * r, dtype=dtype, device=p.device).index_fill_(0, batch.valid, 1.0).view(n, r, 1)
        mean = (p * real).sum(1) / real.sum(1).clamp(min=1)
        sets = max(ids.shape[1], groups)
        mean = mean.view(n // sets, sets, c // selection.unit, selection.unit).sum(-1)
        rows = mean.shape[0]
        mass_RSk[row : row + rows] = mean.mean(1, keepdim=True) if ids.shape[1] == 1 else mean
        row += rows
    return mass_RSk
