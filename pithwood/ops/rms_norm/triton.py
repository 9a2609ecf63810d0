"""RMS norm on a GPU, with or without the residual's sum before it: every row is read once in each direction.

A program holds whole rows in registers, [ROWS, PADDED_D] in fp32. Forward: one program per ROWS rows. Backward: a fixed
number of programs, each walking over a contiguous range of rows with its share of the weight's gradient in registers;
the shares [PARTS, D] are added up by a second, small reduction. No atomics, and the partition depends on the shape
alone, so results repeat to the last digit. 1 / rms is saved (4 bytes a row), the normed rows are computed again. Bytes
of one element: forward 2 reads or writes (with the sum 4), backward 3 (with the sum's gradient 4).

Legend: R rows, D normalised dim, P parts of the weight's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

TILE_ELEMENTS = 2048
"""Elements that a program holds at a time: one row of the widest models, several of a narrow one."""
PARTS = 264
"""Programs of a backward pass: two for each multiprocessor of a Hopper GPU."""
WARPS = 8
STAGES = 3
"""Tiles that a backward program has on their way from memory at a time."""


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As rms_norm_ref, for fp32, fp16 and bf16."""
    return _RmsNorm.apply(x, weight, eps)


def add_rms_norm_triton(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, its norm) for fp32, fp16 and bf16."""
    return _AddRmsNorm.apply(x, y, weight, eps)


def branch_rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x, its norm) for fp32, fp16 and bf16."""
    return _BranchRmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        _, normed, inv_rms_R = rms_norm_forward(_rows(x), None, weight, eps)
        ctx.save_for_backward(x, weight, inv_rms_R)
        return normed.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_normed: Tensor):  # type: ignore[override]
        x, weight, inv_rms_R = ctx.saved_tensors
        grad_x, grad_weight = rms_norm_backward(_rows(grad_normed), None, _rows(x), weight, inv_rms_R)
        return grad_x.view(x.shape), grad_weight.to(weight.dtype), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weight: Tensor, eps: float):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        total, normed, inv_rms_R = rms_norm_forward(_rows(x), _rows(y), weight, eps)
        ctx.save_for_backward(total, weight, inv_rms_R)
        return total.view(x.shape), normed.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor | None, grad_normed: Tensor | None):  # type: ignore[override]
        total, weight, inv_rms_R = ctx.saved_tensors
        if grad_normed is None:
            return grad_total, grad_total, None, None
        residual = None if grad_total is None else _rows(grad_total)
        grad_x, grad_weight = rms_norm_backward(_rows(grad_normed), residual, total, weight, inv_rms_R)
        grad_x = grad_x.view(grad_normed.shape)
        return grad_x, grad_x, grad_weight.to(weight.dtype), None


class _BranchRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        _, normed, inv_rms_R = rms_norm_forward(_rows(x), None, weight, eps)
        ctx.save_for_backward(x, weight, inv_rms_R)
        return x.view_as(x), normed.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x: Tensor | None, grad_normed: Tensor | None):  # type: ignore[override]
        x, weight, inv_rms_R = ctx.saved_tensors
        if grad_normed is None:
            return grad_x, None, None
        residual = None if grad_x is None else _rows(grad_x)
        grad_x, grad_weight = rms_norm_backward(_rows(grad_normed), residual, _rows(x), weight, inv_rms_R)
        return grad_x.view(x.shape), grad_weight.to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """[R, D] with unit stride in D: a view where x's layout has rows at one distance, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@operator("rms_norm_forward")
def rms_norm_forward(x_RD: Tensor, y_RD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x + y, its norm, 1 / rms [R] fp32); without y an empty tensor and the norm of x."""
    rows, dim = x_RD.shape
    total = x_RD.new_empty((rows, dim) if y_RD is not None else (0,))
    normed, inv_rms_R = x_RD.new_empty(rows, dim), x_RD.new_empty(rows, dtype=torch.float32)
    if rows == 0 or dim == 0:
        return total, normed, inv_rms_R
    padded, per_program = _tile(dim)
    _forward_kernel[(triton.cdiv(rows, per_program),)](
        x_RD,
        x_RD if y_RD is None else y_RD,
        weight_D,
        total if y_RD is not None else normed,
        normed,
        inv_rms_R,
        rows,
        x_RD.stride(0),
        x_RD.stride(0) if y_RD is None else y_RD.stride(0),
        eps,
        D=dim,
        PADDED_D=padded,
        ROWS=per_program,
        ADD=y_RD is not None,
        num_warps=WARPS,
    )
    return total, normed, inv_rms_R


@rms_norm_forward.register_fake
def _(x_RD, y_RD, weight_D, eps):
    rows, dim = x_RD.shape
    total = x_RD.new_empty((rows, dim) if y_RD is not None else (0,))
    return total, x_RD.new_empty(rows, dim), x_RD.new_empty(rows, dtype=torch.float32)


@operator("rms_norm_backward")
def rms_norm_backward(
    grad_RD: Tensor, residual_RD: Tensor | None, x_RD: Tensor, weight_D: Tensor, inv_rms_R: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx like x, dweight [D] fp32) of the norm of x; dx has the residual's gradient added if there is one."""
    rows, dim = x_RD.shape
    grad_x = x_RD.new_empty(rows, dim)
    padded, per_step = _tile(dim)
    # a multiple of a step's rows, so that all programs but the last walk over whole tiles
    per_program = triton.cdiv(triton.cdiv(rows, PARTS), per_step) * per_step
    parts = triton.cdiv(rows, per_program) if rows and dim else 0
    part_PD = torch.empty(parts, dim, dtype=torch.float32, device=x_RD.device)
    if parts:
        _backward_kernel[(parts,)](
            grad_RD,
            grad_RD if residual_RD is None else residual_RD,
            x_RD,
            weight_D,
            inv_rms_R,
            grad_x,
            part_PD,
            rows,
            per_program,
            grad_RD.stride(0),
            grad_RD.stride(0) if residual_RD is None else residual_RD.stride(0),
            x_RD.stride(0),
            D=dim,
            PADDED_D=padded,
            ROWS=per_step,
            ADD=residual_RD is not None,
            STAGES=STAGES,
            num_warps=WARPS,
        )
    return grad_x, part_PD.sum(0)


@rms_norm_backward.register_fake
def _(grad_RD, residual_RD, x_RD, weight_D, inv_rms_R):
    return x_RD.new_empty(x_RD.shape), x_RD.new_empty(x_RD.shape[1], dtype=torch.float32)


def _tile(dim: int) -> tuple[int, int]:
    """(PADDED_D, ROWS) of a program's tile."""
    padded = triton.next_power_of_2(dim)
    return padded, max(TILE_ELEMENTS // padded, 1)


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    inv_rms_ptr,
    num_rows,
    stride_x,
    stride_y,
    eps,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_D)
    real = (row < num_rows)[:, None] & (dim < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_x + dim[None, :], mask=real, other=0.0).to(tl.float32)
    to = row[:, None] * D + dim[None, :]
    if ADD:
        y = tl.load(y_ptr + row[:, None] * stride_y + dim[None, :], mask=real, other=0.0).to(tl.float32)
        rounded = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + to, rounded, mask=real)
        # what is normed is the sum that the caller gets, rounding included
        x = rounded.to(tl.float32)
    inv_rms = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    weight = tl.load(weight_ptr + dim, mask=dim < D, other=0.0).to(tl.float32)
    normed = x * inv_rms[:, None] * weight[None, :]
    tl.store(normed_ptr + to, normed.to(normed_ptr.dtype.element_ty), mask=real)
    tl.store(inv_rms_ptr + row, inv_rms, mask=row < num_rows)


@triton.jit
def _backward_kernel(
    grad_ptr,
    residual_ptr,
    x_ptr,
    weight_ptr,
    inv_rms_ptr,
    grad_x_ptr,
    part_ptr,
    num_rows,
    rows_per_program,
    stride_grad,
    stride_residual,
    stride_x,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    dim = tl.arange(0, PADDED_D)
    weight = tl.load(weight_ptr + dim, mask=dim < D, other=0.0).to(tl.float32)[None, :]
    share = tl.zeros([ROWS, PADDED_D], tl.float32)
    for step in tl.range(0, rows_per_program, ROWS, num_stages=STAGES):
        row = first + step + tl.arange(0, ROWS)
        real = (row < num_rows)[:, None] & (dim < D)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * stride_grad + dim[None, :], mask=real, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * stride_x + dim[None, :], mask=real, other=0.0).to(tl.float32)
        inv_rms = tl.load(inv_rms_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        unit = x * inv_rms
        by_channel = grad * unit
        share += by_channel
        # d unit = grad * weight, less its part along unit
        along = tl.sum(by_channel * weight, 1)[:, None] / D
        grad_x = (grad * weight - unit * along) * inv_rms
        if ADD:
            at = residual_ptr + row[:, None] * stride_residual + dim[None, :]
            grad_x += tl.load(at, mask=real, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row[:, None] * D + dim[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=real)
    tl.store(part_ptr + tl.program_id(0).to(tl.int64) * D + dim, tl.sum(share, 0), mask=dim < D)
