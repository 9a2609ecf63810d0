"""From tokens to rows sorted by expert and back, within one process. Dropless: every (token, slot) pair is one row.

Row order inside an expert is by (token, slot). The number of rows is always T * k, so nothing waits for the device:
pairs without an expert (id -1) come last, behind the last expert's rows, and what stands there is never read.

Every sum here is a gather over the slots of a token, forward and backward, so results do not depend on scheduling.

Legend: T packed tokens, D model width, E experts, k experts per token, R = T * k rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchHandle:
    """What combine needs to know about a dispatch."""

    token_R: Tensor
    """[R] int64: the token that each row belongs to."""
    pair_R: Tensor
    """[R] int64: token * k + slot of each row."""
    row_Tk: Tensor
    """[T, k] int64: the row of each (token, slot) pair."""
    none_Tk: Tensor | None
    """[T, k] bool, True for pairs without an expert; None if it is known that there are none."""


def dispatch_tokens(x_TD: Tensor, ids_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, DispatchHandle]:
    """Copy each token once per chosen expert, sorted by expert.

    x_TD      [T, D] any float
    ids_Tk    [T, k] int, 0 <= id < num_experts, or -1 for none
    returns   rows [R, D]; offsets [E + 1] int32 (expert e owns rows offsets[e]:offsets[e + 1]); the handle for combine
    raises    ValueError if the shapes do not fit
    """
    if ids_Tk.dim() != 2 or ids_Tk.shape[0] != x_TD.shape[0]:
        raise ValueError(f"expert ids {tuple(ids_Tk.shape)} must be [tokens, top_k] for {x_TD.shape[0]} tokens")
    num_tokens, k = ids_Tk.shape
    flat = ids_Tk.reshape(-1).long()
    none = flat < 0
    key, pair_R = torch.where(none, num_experts, flat).sort(stable=True)
    offsets = torch.searchsorted(key, torch.arange(num_experts + 1, device=key.device)).to(torch.int32)
    row = torch.empty_like(pair_R).scatter_(0, pair_R, torch.arange(num_tokens * k, device=key.device))
    # On the CPU looking is free, and without -1 ids the masks can be left out; on a device it would be a sync.
    masked = flat.device.type != "cpu" or bool(none.any())
    handle = DispatchHandle(
        token_R=pair_R // k,
        pair_R=pair_R,
        row_Tk=row.view(num_tokens, k),
        none_Tk=none.view(num_tokens, k) if masked else None,
    )
    return _Dispatch.apply(x_TD, handle), offsets, handle


def combine_tokens(rows_RD: Tensor, weight_Tk: Tensor, handle: DispatchHandle, num_tokens: int) -> Tensor:
    """Weighted sum of each token's rows: out_t = sum_j weight_tj * row_tj, summed in fp32 (fp64 for fp64) by slot.

    rows_RD     [R, D] any float; rows of pairs without an expert are not read, even if NaN
    weight_Tk   [T, k] fp32
    returns     [T, D] in the dtype of rows_RD; zero for a token without experts
    raises      ValueError if the shapes do not belong to the dispatch
    """
    if weight_Tk.shape != handle.row_Tk.shape or num_tokens != handle.row_Tk.shape[0]:
        raise ValueError(
            f"weights {tuple(weight_Tk.shape)} and num_tokens={num_tokens} must fit the dispatch of "
            f"{tuple(handle.row_Tk.shape)} (tokens, top_k)"
        )
    if rows_RD.shape[0] != handle.token_R.shape[0]:
        raise ValueError(f"{rows_RD.shape[0]} rows, but the dispatch made {handle.token_R.shape[0]}")
    return _Combine.apply(rows_RD, weight_Tk, handle)


def _sum_of_rows(rows_RD: Tensor, weight_Tk: Tensor | None, handle: DispatchHandle) -> Tensor:
    """out_t = sum_j (weight_tj *) rows[row_tj] in slot order, fp32 inside."""
    num_tokens, k = handle.row_Tk.shape
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    out = torch.zeros(num_tokens, rows_RD.shape[1], dtype=dtype, device=rows_RD.device)
    for j in range(k):
        picked_TD = rows_RD.index_select(0, handle.row_Tk[:, j])
        if handle.none_Tk is not None:
            picked_TD = picked_TD.masked_fill(handle.none_Tk[:, j, None], 0.0)
        if weight_Tk is None:
            out += picked_TD
        else:
            out.addcmul_(picked_TD.to(dtype), weight_Tk[:, j, None].to(dtype))
    return out.to(rows_RD.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, handle: DispatchHandle) -> Tensor:  # type: ignore[override]
        ctx.handle = handle
        return x_TD.index_select(0, handle.token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor):  # type: ignore[override]
        return _sum_of_rows(grad_RD, None, ctx.handle), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_Tk: Tensor, handle: DispatchHandle) -> Tensor:  # type: ignore[override]
        ctx.handle = handle
        ctx.save_for_backward(rows_RD, weight_Tk)
        return _sum_of_rows(rows_RD, weight_Tk, handle)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        rows_RD, weight_Tk = ctx.saved_tensors
        handle: DispatchHandle = ctx.handle
        grad_rows = grad_weight = None
        grad_RD = grad_TD.index_select(0, handle.token_R)
        if ctx.needs_input_grad[1]:
            dtype = torch.promote_types(rows_RD.dtype, torch.float32)
            dot_R = (rows_RD.to(dtype) * grad_RD.to(dtype)).sum(-1)
            grad_weight = dot_R[handle.row_Tk]
            if handle.none_Tk is not None:
                grad_weight = grad_weight.masked_fill(handle.none_Tk, 0.0)
            grad_weight = grad_weight.to(weight_Tk.dtype)
        if ctx.needs_input_grad[0]:
            weight_R = weight_Tk.reshape(-1).index_select(0, handle.pair_R)
            grad_rows = (grad_RD * weight_R[:, None]).to(rows_RD.dtype)
        return grad_rows, grad_weight, None
