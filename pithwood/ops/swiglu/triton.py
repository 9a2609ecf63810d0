"""weight * silu(gate) * up on a GPU, forward and backward in one pass each, at the speed of memory.

A program owns ROWS rows and walks over their columns; what it computes stays in fp32 registers. The backward kernel
computes the forward's result anew (the gradient of the down projection needs it) and writes it over the gradient that
it has read: one buffer less, and nothing but gate_up has to be kept from the forward pass.

Legend: R rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

TILE_ELEMENTS = 2048
"""Elements of gate and of up that a program holds at a time: ROWS x COLUMNS, 16 a thread in four warps."""
MAX_COLUMNS = 256
WARPS = 4


@operator("swiglu")
def swiglu(gate_up_RF: Tensor, weight_R: Tensor | None, offsets: Tensor | None) -> Tensor:
    """[R, F]; rows from offsets[-1] on are not written."""
    gate_up_RF = gate_up_RF.contiguous()
    out_RF = gate_up_RF.new_empty(gate_up_RF.shape[0], gate_up_RF.shape[1] // 2)
    if out_RF.numel():
        grid, sizes = _launch(out_RF, weight_R, offsets)
        _swiglu_forward[grid](gate_up_RF, out_RF, *_or(out_RF, weight_R, offsets), out_RF.shape[0], **sizes)
    return out_RF


@operator("swiglu_gradient")
def swiglu_gradient(
    grad_RF: Tensor, gate_up_RF: Tensor, weight_R: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, gradient of the weight, empty without one)."""
    return _run_backward(grad_RF.contiguous(), gate_up_RF, weight_R, offsets, hidden=False)


@operator("swiglu_backward_", mutates=("grad_RF",))
def swiglu_backward_(
    grad_RF: Tensor, gate_up_RF: Tensor, weight_R: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `swiglu_gradient`; grad_RF, contiguous, becomes the forward's result."""
    return _run_backward(grad_RF, gate_up_RF, weight_R, offsets, hidden=True)


def _run_backward(
    grad_RF: Tensor, gate_up_RF: Tensor, weight_R: Tensor | None, offsets: Tensor | None, hidden: bool
) -> tuple[Tensor, Tensor]:
    gate_up_RF = gate_up_RF.contiguous()
    grad_gate_up_RF = torch.empty_like(gate_up_RF)
    grad_weight_R = gate_up_RF.new_empty(0 if weight_R is None else grad_RF.shape[0], dtype=torch.float32)
    if grad_RF.numel():
        grid, sizes = _launch(grad_RF, weight_R, offsets)
        _swiglu_backward[grid](
            gate_up_RF, grad_RF, *_or(grad_RF, weight_R, offsets), grad_gate_up_RF,
            grad_weight_R, grad_RF.shape[0], HIDDEN=hidden, **sizes,
        )  # fmt: skip
    return grad_gate_up_RF, grad_weight_R if weight_R is None else grad_weight_R.to(weight_R.dtype)


@swiglu.register_fake
def _(gate_up_RF: Tensor, weight_R: Tensor | None, offsets: Tensor | None) -> Tensor:
    return gate_up_RF.new_empty(gate_up_RF.shape[0], gate_up_RF.shape[1] // 2)


def _fake_gradient(
    grad_RF: Tensor, gate_up_RF: Tensor, weight_R: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_weight = grad_RF.new_empty(0, dtype=torch.float32) if weight_R is None else weight_R.new_empty(weight_R.shape)
    return gate_up_RF.new_empty(gate_up_RF.shape), grad_weight


swiglu_gradient.register_fake(_fake_gradient)
swiglu_backward_.register_fake(_fake_gradient)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_swiglu(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor | None, None]:
    _, weight_R, _ = ctx.saved_tensors
    grad_gate_up, grad_weight = swiglu_gradient(grad_RF, *ctx.saved_tensors)
    return grad_gate_up, None if weight_R is None else grad_weight, None


swiglu.register_autograd(_backward_of_swiglu, setup_context=_save_inputs)


def _or(stand_in: Tensor, weight_R: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Weight, offsets and the last offset's place for a kernel, which looks at none that is missing."""
    last = 0 if offsets is None else offsets.shape[0] - 1
    return stand_in if weight_R is None else weight_R.contiguous(), stand_in if offsets is None else offsets, last


def _launch(x_RF: Tensor, weight_R: Tensor | None, offsets: Tensor | None) -> tuple[tuple[int], dict[str, Any]]:
    num_rows, dim = x_RF.shape
    columns = min(triton.next_power_of_2(dim), MAX_COLUMNS)
    rows = TILE_ELEMENTS // columns
    sizes = {"F": dim, "ROWS": rows, "COLUMNS": columns, "num_warps": WARPS}
    return (triton.cdiv(num_rows, rows),), {
        **sizes, "WEIGHTED": weight_R is not None, "GROUPED": offsets is not None,
    }  # fmt: skip


@triton.jit
def _swiglu_forward(
    gate_up_ptr, out_ptr, weight_ptr, offsets_ptr, last, num_rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    if GROUPED:
        num_rows = tl.load(offsets_ptr + last)
    if tl.program_id(0) * ROWS >= num_rows:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_row = row < num_rows
    at_row = row.to(tl.int64)[:, None]
    if WEIGHTED:
        weight = tl.load(weight_ptr + row, mask=real_row, other=0.0).to(tl.float32)[:, None]
    for first in range(0, F, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        real = real_row[:, None] & (column < F)
        at = gate_up_ptr + at_row * (2 * F) + column
        gate = tl.load(at, mask=real, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=real, other=0.0).to(tl.float32)
        hidden = gate * tl.sigmoid(gate) * up
        if WEIGHTED:
            hidden *= weight
        tl.store(out_ptr + at_row * F + column, hidden.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _swiglu_backward(
    gate_up_ptr, grad_ptr, weight_ptr, offsets_ptr, last, grad_gate_up_ptr, grad_weight_ptr, num_rows,
    HIDDEN: tl.constexpr,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    if GROUPED:
        num_rows = tl.load(offsets_ptr + last)
    if tl.program_id(0) * ROWS >= num_rows:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_row = row < num_rows
    at_row = row.to(tl.int64)[:, None]
    dtype = grad_ptr.dtype.element_ty
    if WEIGHTED:
        weight = tl.load(weight_ptr + row, mask=real_row, other=0.0).to(tl.float32)[:, None]
        grad_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, F, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        real = real_row[:, None] & (column < F)
        at = at_row * (2 * F) + column
        gate = tl.load(gate_up_ptr + at, mask=real, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + F, mask=real, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at_row * F + column, mask=real, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        if WEIGHTED:
            grad_weight += grad * hidden
            grad *= weight
            hidden *= weight
        if HIDDEN:
            tl.store(grad_ptr + at_row * F + column, hidden.to(dtype), mask=real)
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_gate_up_ptr + at, grad_gate.to(dtype), mask=real)
        tl.store(grad_gate_up_ptr + at + F, (grad * silu).to(dtype), mask=real)
    if WEIGHTED:
        tl.store(grad_weight_ptr + row, tl.sum(grad_weight, 1), mask=real_row)
