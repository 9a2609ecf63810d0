"""Rows sorted by expert, their gather and their sum in plain torch; the definition of correct, and the way on a CPU.

Legend: T packed tokens, D model width, E experts, k experts per token, R = T * k rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plan_rows_ref(ids_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(offsets [E + 1], row_Tk, pair_R, token_R), all int32: a stable sort by expert, pairs without one last."""
    num_tokens, k = ids_Tk.shape
    flat = ids_Tk.reshape(-1).long()
    key, pair_R = torch.where(flat < 0, num_experts, flat).sort(stable=True)
    offsets = torch.searchsorted(key, torch.arange(num_experts + 1, device=key.device)).to(torch.int32)
    order = torch.arange(num_tokens * k, dtype=torch.int32, device=key.device)
    row_Tk = torch.empty_like(order).scatter_(0, pair_R, order).view(num_tokens, k)
    return offsets, row_Tk, pair_R.to(torch.int32), (pair_R // max(k, 1)).to(torch.int32)


def count_pairs_ref(ids_Tk: Tensor, num_experts: int) -> Tensor:
    """[E] int64 pairs per expert; ids of -1 are not counted."""
    index = ids_Tk.reshape(-1).long()
    # Negative indices fall into one bin more, which is cut off; bincount would synchronise with the host.
    bins = torch.where(index < 0, num_experts, index)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts]


def gather_rows_ref(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """x[token_R]; the rows of pairs without an expert are their tokens' too."""
    return x_TD.index_select(0, token_R)


def sum_rows_ref(rows_RD: Tensor, row_Tk: Tensor, none_Tk: Tensor | None, residual_TD: Tensor | None) -> Tensor:
    """out_t = sum_j rows[row_tj] in slot order, then plus residual_t; fp32 inside. none_Tk masks pairs that are not
    read.
    """
    num_tokens, k = row_Tk.shape
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    out = torch.zeros(num_tokens, rows_RD.shape[1], dtype=dtype, device=rows_RD.device)
    for j in range(k):
        picked_TD = rows_RD.index_select(0, row_Tk[:, j])
        if none_Tk is not None:
            picked_TD = picked_TD.masked_fill(none_Tk[:, j, None], 0.0)
        out += picked_TD
    if residual_TD is not None:
        out += residual_TD
    return out.to(rows_RD.dtype)
