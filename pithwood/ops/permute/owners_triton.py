"""Which processes a token goes to, and the ids that travel with it, in one launch each.

Legend: T packed tokens, k experts per token, m owners named per token, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

TOKENS = 256
ROW_ELEMENTS = 2048


@operator("owner_ids")
def owner_ids(ids_Tk: Tensor, experts_each: int, num_owners: int) -> Tensor:
    """[T, min(k, num_owners)] int32, as `owner_ids_ref`; ids int32 or int64."""
    ids_Tk = ids_Tk.contiguous()
    num_tokens, k = ids_Tk.shape
    owner_Tm = torch.empty(num_tokens, min(k, num_owners), dtype=torch.int32, device=ids_Tk.device)
    if owner_Tm.numel():
        grid = (triton.cdiv(num_tokens, TOKENS),)
        _owner_ids[grid](
            ids_Tk, owner_Tm, num_tokens, experts_each, num_owners,
            K=k, M=owner_Tm.shape[1], EVERY=num_owners <= k, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
    return owner_Tm


@operator("gather_ids")
def gather_ids(ids_Tk: Tensor, token_R: Tensor) -> Tensor:
    """[R, k] int32, as `gather_ids_ref`; ids int32 or int64."""
    ids_Tk = ids_Tk.contiguous()
    ids_Rk = torch.empty(token_R.shape[0], ids_Tk.shape[1], dtype=torch.int32, device=ids_Tk.device)
    if ids_Rk.numel():
        columns = triton.next_power_of_2(ids_Tk.shape[1])
        rows = max(ROW_ELEMENTS // columns, 1)
        grid = (triton.cdiv(token_R.shape[0], rows),)
        _gather_ids[grid](
            ids_Tk, ids_Rk, token_R, token_R.shape[0], K=ids_Tk.shape[1], ROWS=rows, COLUMNS=columns, num_warps=4
        )
    return ids_Rk


@owner_ids.register_fake
def _(ids_Tk: Tensor, experts_each: int, num_owners: int) -> Tensor:
    return ids_Tk.new_empty(ids_Tk.shape[0], min(ids_Tk.shape[1], num_owners), dtype=torch.int32)


@gather_ids.register_fake
def _(ids_Tk: Tensor, token_R: Tensor) -> Tensor:
    return ids_Tk.new_empty(token_R.shape[0], ids_Tk.shape[1], dtype=torch.int32)


@triton.jit
def _owner_ids(
    ids_ptr, owner_ptr, num_tokens, experts_each, num_owners,
    K: tl.constexpr, M: tl.constexpr, EVERY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Column c names owner c where EVERY owner has a column, else the owner of slot c unless an earlier slot did. A
    token's few ids are loaded again for each column: they lie in the cache.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < num_tokens
    here = token.to(tl.int64)
    for column in tl.static_range(M):
        if EVERY:
            mine = tl.zeros([TOKENS], tl.int32) + column
            named = tl.zeros([TOKENS], tl.int1)
            for slot in tl.static_range(K):
                id_ = tl.load(ids_ptr + here * K + slot, mask=real, other=-1).to(tl.int32)
                named = named | ((id_ >= 0) & (id_ // experts_each == column))
        else:
            own = tl.load(ids_ptr + here * K + column, mask=real, other=-1).to(tl.int32)
            mine = own // experts_each
            named = own >= 0
            for slot in tl.static_range(column):
                id_ = tl.load(ids_ptr + here * K + slot, mask=real, other=-1).to(tl.int32)
                named = named & ((id_ < 0) | (id_ // experts_each != mine))
        tl.store(owner_ptr + here * M + column, tl.where(named, mine, -1), mask=real)


@triton.jit
def _gather_ids(ids_ptr, out_ptr, token_ptr, num_rows, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = (row < num_rows)[:, None] & (column < K)[None, :]
    token = tl.load(token_ptr + row, mask=row < num_rows, other=-1).to(tl.int64)
    at = ids_ptr + token[:, None] * K + column[None, :]
    ids = tl.load(at, mask=real & (token >= 0)[:, None], other=-1).to(tl.int32)  # [ROWS, COLUMNS]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * K + column[None, :], ids, mask=real)
