"""Matrix products of consecutive groups of rows with one weight each: the work of a layer's experts.

Legend: R rows, D input width, X output width, E groups.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.grouped_mm.ref import grouped_grad_weight_ref, grouped_mm_ref
from pithwood.ops.triton_support import triton_misfit

__all__ = ["grouped_grad_weight", "grouped_mm"]


def grouped_mm(rows_RD: Tensor, w_EXD: Tensor, offsets: Tensor, impl: Literal["ref", "torch"] | None = None) -> Tensor:
    """rows[offsets[e]:offsets[e + 1]] @ w[e]^T for every group e, differentiable in rows and weights.

    rows_RD   [R, D] float, in the order of the groups
    w_EXD     [E, X, D], same dtype
    offsets   [E + 1] int32 on the same device, ascending from 0, last <= R; a group may be empty or hold every row
    impl      "ref": a loop, any dtype and device. "torch": `F.grouped_mm`, on CUDA one kernel without host sync for
              bf16 with D and X multiples of 8. None: "torch" for bf16 on CUDA, "ref" for everything else.
    returns   [R, X] in the same dtype; rows from offsets[-1] on are unspecified, and so is their gradient
    raises    ValueError on unequal dtypes, shapes that do not fit, or an impl that cannot serve the input
    """
    if rows_RD.dim() != 2 or w_EXD.dim() != 3 or rows_RD.shape[1] != w_EXD.shape[2]:
        raise ValueError(f"rows {tuple(rows_RD.shape)} must be [R, D] and weights {tuple(w_EXD.shape)} [E, X, D]")
    if offsets.shape != (w_EXD.shape[0] + 1,):
        raise ValueError(f"offsets {tuple(offsets.shape)} must have one entry more than the {w_EXD.shape[0]} groups")
    if rows_RD.dtype != w_EXD.dtype:
        raise ValueError(f"rows are {rows_RD.dtype} and weights {w_EXD.dtype}; cast one of them")
    if impl is None:
        impl = "torch" if rows_RD.is_cuda and rows_RD.dtype == torch.bfloat16 else "ref"
    if impl == "ref":
        return grouped_mm_ref(rows_RD, w_EXD, offsets)
    if impl == "torch":
        if rows_RD.is_cuda and rows_RD.dtype != torch.bfloat16:
            raise ValueError(f"impl='torch' takes bfloat16 on CUDA, not {rows_RD.dtype}; cast, or use impl='ref'")
        if rows_RD.is_cuda and (rows_RD.shape[1] % 8 or w_EXD.shape[1] % 8):
            raise ValueError(
                f"widths D={rows_RD.shape[1]} and X={w_EXD.shape[1]} must be multiples of 8 for impl='torch' on CUDA; "
                "change model_dim or expert_dim, or use impl='ref'"
            )
        return F.grouped_mm(rows_RD, w_EXD.transpose(-2, -1), offs=offsets[1:])
    raise ValueError(f"grouped_mm impl={impl!r} is unknown; choose 'ref', 'torch' or None")


@torch.no_grad()
def grouped_grad_weight(
    grad_RX: Tensor,
    rows_RD: Tensor,
    offsets: Tensor,
    out_EXD: Tensor | None = None,
    *,
    add: bool = False,
    impl: Literal["ref", "triton"] | None = None,
) -> Tensor:
    """The gradient of `grouped_mm` in its weights, written or added into a buffer: grad[group e]^T @ rows[group e].

    grad_RX   [R, X] float
    rows_RD   [R, D], same dtype
    offsets   [E + 1] int32 as of `grouped_mm`; rows from offsets[-1] on are not looked at, even if NaN
    out_EXD   [E, X, D] contiguous, in the rows' dtype or fp32, overwritten or added to; None: made, in the rows' dtype
    add       True: out += gradient, empty groups are left alone. False: out = gradient, empty groups become zero
    impl      "ref": a loop. "triton": one launch without host sync for fp32, fp16 and bf16, sums in fp32.
              None: "triton" where it fits on CUDA, "ref" elsewhere.
    returns   out_EXD
    raises    ValueError on shapes or dtypes that do not fit, or an impl that does not
    """
    check_impl(impl, ("ref", "triton"))
    num_groups = offsets.shape[0] - 1
    if grad_RX.dim() != 2 or rows_RD.dim() != 2 or grad_RX.shape[0] != rows_RD.shape[0]:
        raise ValueError(f"gradient {tuple(grad_RX.shape)} and rows {tuple(rows_RD.shape)} must be [R, X] and [R, D]")
    if out_EXD is None:
        if add:
            raise ValueError("add=True needs the out_EXD that is added to")
        out_EXD = rows_RD.new_empty(num_groups, grad_RX.shape[1], rows_RD.shape[1])
    if out_EXD.shape != (num_groups, grad_RX.shape[1], rows_RD.shape[1]) or not out_EXD.is_contiguous():
        raise ValueError(
            f"out {tuple(out_EXD.shape)} must be contiguous and {(num_groups, grad_RX.shape[1], rows_RD.shape[1])} "
            "(groups, width of the gradient, width of the rows)"
        )
    if grad_RX.dtype != rows_RD.dtype or out_EXD.dtype not in (rows_RD.dtype, torch.float32):
        raise ValueError(
            f"gradient {grad_RX.dtype} and rows {rows_RD.dtype} must agree, out {out_EXD.dtype} be theirs or fp32"
        )
    misfit = triton_misfit(grad_RX, out_EXD)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='ref'")
    if impl == "triton" or (impl is None and rows_RD.is_cuda and not misfit):
        from pithwood.ops.grouped_mm import weight_triton

        weight_triton.grouped_grad_weight(grad_RX, rows_RD, offsets, out_EXD, add)
    else:
        grouped_grad_weight_ref(grad_RX, rows_RD, offsets, out_EXD, add)
    return out_EXD
