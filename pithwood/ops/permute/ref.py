"""Rows sorted by expert, their gather and their sum in plain torch; the definition of correct, and the way on a CPU.

Legend: T packed tokens, D model width, E experts, k experts per token, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plan_rows_ref(
    ids_Tk: Tensor, num_experts: int, first: int = 0, max_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(offsets [E + 1], row_Tk, pair_R, token_R, count [E]), all int32: a stable sort by expert, pairs without one here
    last; what lies beyond max_rows is cut off.
    """
    num_tokens, k = ids_Tk.shape
    flat = ids_Tk.reshape(-1).long() - first
    key, pair_R = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat).sort(stable=True)
    offsets = torch.searchsorted(key, torch.arange(num_experts + 1, device=key.device)).to(torch.int32)
    order = torch.arange(num_tokens * k, dtype=torch.int32, device=key.device)
    row_Tk = torch.empty_like(order).scatter_(0, pair_R, order).view(num_tokens, k)
    count = offsets.diff()
    if max_rows is not None:
        offsets, pair_R = offsets.clamp(max=max_rows), pair_R[:max_rows]
    return offsets, row_Tk, pair_R.to(torch.int32), (pair_R // max(k, 1)).to(torch.int32), count


def plan_slots_ref(ids_Tk: Tensor, num_parts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(offsets, row_Tk, pair_R, token_R, count [num_parts]), all int32: part p's pairs in order, from row p * capacity
    on; -1 where a part has fewer than `capacity`.
    """
    num_rows, k = num_parts * capacity, ids_Tk.shape[1]
    starts, row_Tk, _, _, count = plan_rows_ref(ids_Tk, num_parts)
    ids = ids_Tk.long()
    rank_Tk = row_Tk - starts[ids.clamp(min=0)]
    fits_Tk = (ids >= 0) & (rank_Tk < capacity)
    row_Tk = torch.where(fits_Tk, ids * capacity + rank_Tk, num_rows).to(torch.int32)
    order = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    pair_R = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=ids.device)
    pair_R = pair_R.scatter_(0, row_Tk.view(-1).long(), order)[:num_rows]
    offsets = torch.arange(num_parts + 1, dtype=torch.int32, device=ids.device) * capacity
    return offsets, row_Tk, pair_R, pair_R.div(max(k, 1), rounding_mode="floor"), count


def owner_ids_ref(ids_Tk: Tensor, experts_each: int, num_owners: int) -> Tensor:
    """[T, min(k, num_owners)] int32: the owners of a token's experts, each once, -1 for the rest."""
    owner_Tk = ids_Tk.div(experts_each, rounding_mode="floor").to(torch.int32)
    if num_owners <= ids_Tk.shape[1]:
        every = torch.arange(num_owners, dtype=torch.int32, device=ids_Tk.device)
        return torch.where((owner_Tk[:, :, None] == every).any(1), every, -1)
    again = (owner_Tk[:, :, None] == owner_Tk[:, None, :]).tril(-1).any(-1)
    return owner_Tk.masked_fill(again, -1)


def gather_ids_ref(ids_Tk: Tensor, token_R: Tensor) -> Tensor:
    """[R, k] int32: ids[token_R], -1 in rows without a token."""
    if ids_Tk.shape[0] == 0:
        return torch.full((token_R.shape[0], ids_Tk.shape[1]), -1, dtype=torch.int32, device=ids_Tk.device)
    ids_Rk = ids_Tk.to(torch.int32).index_select(0, token_R.clamp(min=0))
    return ids_Rk.masked_fill_(token_R[:, None] < 0, -1)


def count_pairs_ref(ids_Tk: Tensor, num_experts: int) -> Tensor:
    """[E] int64 pairs per expert; ids of -1 are not counted."""
    index = ids_Tk.reshape(-1).long()
    # Negative indices fall into one bin more, which is cut off; bincount would synchronise with the host.
    bins = torch.where(index < 0, num_experts, index)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts]


def gather_rows_ref(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """x[token_R]; rows without a pair are unspecified, and those of pairs without an expert their tokens' too."""
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(token_R.shape[0], x_TD.shape[1])
    return x_TD.index_select(0, token_R.clamp(min=0))


def sum_rows_ref(rows_RD: Tensor, row_Tk: Tensor, none_Tk: Tensor | None, residual_TD: Tensor | None) -> Tensor:
    """out_t = sum_j rows[row_tj] in slot order, then plus residual_t; fp32 inside. none_Tk masks pairs that are not
    read.
    """
    num_tokens, k = row_Tk.shape
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    out = torch.zeros(num_tokens, rows_RD.shape[1], dtype=dtype, device=rows_RD.device)
    if none_Tk is not None:
        row_Tk = row_Tk.clamp(max=rows_RD.shape[0] - 1)
    for j in range(k if rows_RD.shape[0] else 0):
        picked_TD = rows_RD.index_select(0, row_Tk[:, j])
        if none_Tk is not None:
            picked_TD = picked_TD.masked_fill(none_Tk[:, j, None], 0.0)
        out += picked_TD
    if residual_TD is not None:
        out += residual_TD
    return out.to(rows_RD.dtype)
