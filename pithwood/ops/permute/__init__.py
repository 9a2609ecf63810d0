"""Tokens to rows sorted by expert and back: the permutation, the copy of tokens to rows, the sum of a token's rows.

Dropless: every (token, slot) pair is one row, and the number of rows is known without the device: T * k, or a bound
that the caller knows to suffice, or looks afterwards whether it did. Both directions read or write whole rows at places
that the plan names, and sums run over the slots of a token in their order: nothing depends on scheduling.

Legend: T packed tokens, D model width, E experts, k experts per token, R rows (T * k without a bound).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl, check_positive
from pithwood.ops.permute.plan import RowPlan
from pithwood.ops.permute.ref import (
    count_pairs_ref,
    gather_ids_ref,
    gather_rows_ref,
    owner_ids_ref,
    plan_rows_ref,
    plan_slots_ref,
    sum_rows_ref,
)
from pithwood.ops.triton_support import triton_misfit
from pithwood.ops.unread import unread_like

__all__ = [
    "RowPlan",
    "count_pairs",
    "gather_ids",
    "gather_rows",
    "owner_ids",
    "plan_rows",
    "plan_slots",
    "row_weights",
    "sum_rows",
]


def plan_rows(
    ids_Tk: Tensor, num_experts: int, *, first: int = 0, max_rows: int | None = None, impl: str | None = None
) -> RowPlan:
    """Where each (token, slot) pair stands among rows sorted by (expert, token, slot).

    ids_Tk    [T, k] int     first <= id < first + num_experts; with any other a pair has no expert here and comes last
    max_rows  rows that there are at most; pairs whose row would lie beyond have none, and count no more. None: T * k
    impl      "ref": a stable sort. "triton": a counting sort of four small launches, without host sync; int32 and
              int64 ids. None: "triton" on CUDA, "ref" elsewhere.
    returns   a RowPlan; the same one whatever the implementation
    raises    ValueError on ids that are no [T, k] integers, T * k >= 2**31, or an impl that does not fit
    """
    check_impl(impl, ("ref", "triton"))
    check_positive("num_experts", num_experts)
    _check_ids(ids_Tk)
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"max_rows={max_rows} must be at least 0")
    if _use_triton_for_ids(impl, ids_Tk):
        from pithwood.ops.permute import plan_triton

        bound = -1 if max_rows is None else max_rows
        return RowPlan(*plan_triton.plan_rows(ids_Tk, num_experts, first, bound))
    # On the CPU looking is free, and without -1 ids masks can be left out; on a device it would be a sync.
    plan = plan_rows_ref(ids_Tk, num_experts, first, max_rows)
    all_routed = ids_Tk.device.type == "cpu" and int(plan[0][-1]) == ids_Tk.numel()
    return RowPlan(*plan, all_routed=all_routed)


def plan_slots(ids_Tk: Tensor, num_parts: int, capacity: int, *, impl: str | None = None) -> RowPlan:
    """Where each (token, slot) pair stands among equal parts of rows, in each part in the order of the pairs.

    ids_Tk    [T, k] int     0 <= part < num_parts, or -1 for none
    capacity  rows of each part; pairs beyond it have none
    impl      as of `plan_rows`
    returns   a RowPlan of num_parts * capacity rows, whose offsets are those of the parts, used or not; no host sync
    raises    ValueError as `plan_rows`, and if num_parts * capacity >= 2**31
    """
    check_impl(impl, ("ref", "triton"))
    check_positive("num_parts", num_parts)
    check_positive("capacity", capacity)
    _check_ids(ids_Tk)
    if num_parts * capacity >= 2**31:
        raise ValueError(
            f"{num_parts} parts of capacity={capacity} have 2**31 rows or more: route fewer tokens at a time"
        )
    if _use_triton_for_ids(impl, ids_Tk):
        from pithwood.ops.permute import plan_triton

        return RowPlan(*plan_triton.plan_slots(ids_Tk, num_parts, capacity))
    return RowPlan(*plan_slots_ref(ids_Tk, num_parts, capacity))


def owner_ids(ids_Tk: Tensor, experts_each: int, num_owners: int, *, impl: str | None = None) -> Tensor:
    """The owners of each token's experts, where owner p has experts p * experts_each to (p + 1) * experts_each - 1.

    ids_Tk    [T, k] int     0 <= id < num_owners * experts_each, or -1 for none
    impl      as of `plan_rows`, in one launch
    returns   [T, min(k, num_owners)] int32: every owner once, and -1
    raises    ValueError on ids that are no [T, k] integers, or an impl that does not fit
    """
    check_impl(impl, ("ref", "triton"))
    check_positive("experts_each", experts_each)
    _check_ids(ids_Tk)
    if _use_triton_for_ids(impl, ids_Tk):
        from pithwood.ops.permute import owners_triton

        return owners_triton.owner_ids(ids_Tk, experts_each, num_owners)
    return owner_ids_ref(ids_Tk, experts_each, num_owners)


def gather_ids(ids_Tk: Tensor, plan: RowPlan, *, impl: str | None = None) -> Tensor:
    """Copy each token's expert ids to its rows.

    ids_Tk    [T, k] int     with k the model's, whatever the plan's
    impl      as of `plan_rows`, in one launch
    returns   [R, k] int32; -1 in rows without a pair
    raises    ValueError if the plan is of another number of tokens, or an impl does not fit
    """
    check_impl(impl, ("ref", "triton"))
    _check_ids(ids_Tk)
    if ids_Tk.shape[0] != plan.num_tokens:
        raise ValueError(f"ids {tuple(ids_Tk.shape)} must be [T, k] of the plan's {plan.num_tokens} tokens")
    if _use_triton_for_ids(impl, ids_Tk):
        from pithwood.ops.permute import owners_triton

        return owners_triton.gather_ids(ids_Tk, plan.token_R)
    return gather_ids_ref(ids_Tk, plan.token_R)


def count_pairs(ids_Tk: Tensor, num_experts: int, *, impl: str | None = None) -> Tensor:
    """The (token, slot) pairs of each expert; ids of -1 are not counted.

    ids_Tk    any shape, int  0 <= id < num_experts, or -1
    impl      "ref": a scatter of ones. "triton": a histogram in one launch, int32 and int64 ids. None: "triton" on CUDA
    returns   [E] int64, exact in any order, without host sync
    raises    ValueError if an impl does not fit
    """
    check_impl(impl, ("ref", "triton"))
    if _use_triton_for_ids(impl, ids_Tk):
        from pithwood.ops.permute import plan_triton

        return plan_triton.count_pairs(ids_Tk, num_experts)
    return count_pairs_ref(ids_Tk, num_experts)


def gather_rows(x_TD: Tensor, plan: RowPlan, *, impl: str | None = None) -> Tensor:
    """Copy each token to its rows; differentiable, its backward pass is `sum_rows`.

    x_TD      [T, D] float
    impl      "ref": any dtype and device. "triton": fp32, fp16, bf16; a token is read once and written k times.
              None: "triton" where it fits on CUDA, "ref" elsewhere.
    returns   [R, D]; rows without a pair or from plan.offsets[-1] on are unspecified, and so may be their gradient
    raises    ValueError if the plan is of another number of tokens, or an impl does not fit
    """
    check_impl(impl, ("ref", "triton"))
    if x_TD.dim() != 2 or x_TD.shape[0] != plan.num_tokens:
        raise ValueError(f"x {tuple(x_TD.shape)} must be [T, D] of the plan's {plan.num_tokens} tokens")
    if _use_triton(impl, x_TD):
        from pithwood.ops.permute import triton

        return triton.gather_rows(x_TD, plan.row_Tk, plan.offsets, plan.num_rows)
    return _Gather.apply(x_TD, plan)


def sum_rows(
    rows_RD: Tensor,
    plan: RowPlan,
    residual_TD: Tensor | None = None,
    *,
    unread: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Sum of each token's rows in slot order, in fp32 (fp64 for fp64), plus a residual; differentiable in both.

    rows_RD       [R, D] float; rows without a pair or from plan.offsets[-1] on are not read, even if NaN
    residual_TD   [T, D] same dtype, added before the one rounding
    unread        nobody reads the value, its graph alone is wanted: zeros come, and no row is read
    impl          "ref": any dtype and device. "triton": fp32, fp16, bf16. None: "triton" where it fits on CUDA.
    returns       [T, D] in the dtype of rows_RD; the residual, or zero, for a token without experts
    raises        ValueError if the rows do not belong to the plan, or an impl does not fit
    """
    check_impl(impl, ("ref", "triton"))
    if rows_RD.dim() != 2 or rows_RD.shape[0] != plan.num_rows:
        raise ValueError(f"{rows_RD.shape[0]} rows, but the plan has {plan.num_rows}")
    if residual_TD is not None:
        if residual_TD.shape != (plan.num_tokens, rows_RD.shape[1]):
            raise ValueError(
                f"residual {tuple(residual_TD.shape)} must be {(plan.num_tokens, rows_RD.shape[1])} (tokens, width)"
            )
        if residual_TD.dtype != rows_RD.dtype:
            raise ValueError(f"residual is {residual_TD.dtype} and rows are {rows_RD.dtype}; cast one of them")
    if unread:
        return _UnreadSum.apply(rows_RD, residual_TD, plan, impl)
    if _use_triton(impl, rows_RD):
        from pithwood.ops.permute import triton

        return triton.sum_rows(rows_RD, plan.row_Tk, plan.offsets, residual_TD)
    return _Sum.apply(rows_RD, residual_TD, plan)


def row_weights(weight_Tk: Tensor, plan: RowPlan) -> Tensor:
    """[R] weight of each row's pair, in the dtype of weight_Tk; differentiable, rows without an expert give nothing."""
    if weight_Tk.shape != plan.row_Tk.shape:
        raise ValueError(
            f"weights {tuple(weight_Tk.shape)} must fit the plan of {tuple(plan.row_Tk.shape)} (tokens, top_k)"
        )
    return _RowWeights.apply(weight_Tk, plan)


def _check_ids(ids_Tk: Tensor) -> None:
    if ids_Tk.dim() != 2 or ids_Tk.is_floating_point():
        raise ValueError(f"expert ids must be integers [tokens, top_k], got {tuple(ids_Tk.shape)} {ids_Tk.dtype}")
    if ids_Tk.numel() >= 2**31:
        raise ValueError(f"{ids_Tk.numel()} (token, slot) pairs; at most 2**31 - 1: route fewer tokens at a time")


def _use_triton(impl: str | None, x: Tensor) -> bool:
    if impl == "triton" or (impl is None and x.is_cuda and triton_misfit(x) is None):
        _check_triton(impl, x)
        return True
    return False


def _use_triton_for_ids(impl: str | None, ids: Tensor) -> bool:
    fits = ids.dtype in (torch.int32, torch.int64)
    if impl == "triton" or (impl is None and ids.is_cuda and fits):
        _check_triton(impl, torch.empty(0, device=ids.device))
        if not fits:
            raise ValueError(f"impl='triton' takes int32 and int64 ids, got {ids.dtype}; cast them, or use impl='ref'")
        return True
    return False


def _check_triton(impl: str | None, x: Tensor) -> None:
    misfit = triton_misfit(x)
    if misfit:
        raise ValueError(f"impl={impl or 'triton'!r} does not fit here: {misfit}; use impl='ref'")


def _none_pairs(plan: RowPlan) -> Tensor | None:
    """[T, k] bool, True for pairs without an expert; None if there are none for sure."""
    return None if plan.all_routed else plan.row_Tk >= plan.offsets[-1]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: RowPlan) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        return gather_rows_ref(x_TD, plan.token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor):  # type: ignore[override]
        return sum_rows_ref(grad_RD, ctx.plan.row_Tk, _none_pairs(ctx.plan), None), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, residual_TD: Tensor | None, plan: RowPlan) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        return sum_rows_ref(rows_RD, plan.row_Tk, _none_pairs(plan), residual_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        needs_rows, needs_residual = ctx.needs_input_grad[:2]
        grad_RD = gather_rows_ref(grad_TD, ctx.plan.token_R) if needs_rows else None
        return grad_RD, grad_TD if needs_residual else None, None


class _UnreadSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, residual_TD: Tensor | None, plan: RowPlan, impl: str | None) -> Tensor:  # type: ignore[override]
        ctx.plan, ctx.impl = plan, impl
        return unread_like(rows_RD, plan.num_tokens, rows_RD.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        needs_rows, needs_residual = ctx.needs_input_grad[:2]
        grad_RD = gather_rows(grad_TD, ctx.plan, impl=ctx.impl) if needs_rows else None
        return grad_RD, grad_TD if needs_residual else None, None, None


class _RowWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_Tk: Tensor, plan: RowPlan) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        weight = weight_Tk.reshape(-1)
        return weight.index_select(0, plan.pair_R) if plan.num_rows else weight[:0]

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor):  # type: ignore[override]
        plan: RowPlan = ctx.plan
        if plan.num_rows == 0:
            return grad_R.new_zeros(plan.row_Tk.shape), None
        none_Tk = _none_pairs(plan)
        row_Tk = plan.row_Tk if none_Tk is None else plan.row_Tk.clamp(max=plan.num_rows - 1)
        grad_Tk = grad_R.index_select(0, row_Tk.reshape(-1)).view(plan.row_Tk.shape)
        return grad_Tk if none_Tk is None else grad_Tk.masked_fill(none_Tk, 0.0), None
