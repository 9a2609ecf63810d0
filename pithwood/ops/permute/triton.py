"""Tokens to rows and back on a GPU, at the speed of memory.

Both kernels go token by token. The copy reads a token once and writes its k rows; the sum reads k rows, adds them in
slot order in fp32 and writes once, residual included. Whole rows lie together, so scattered ones cost no bandwidth.

Legend: T packed tokens, D model width, E experts, k experts per token, R rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

TILE_ELEMENTS = 4096
"""Elements of one slot that a program holds: TOKENS x COLUMNS, 32 a thread in four warps."""
MAX_COLUMNS = 2048
WARPS = 4


@operator("gather_rows")
def gather_rows(x_TD: Tensor, row_Tk: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """[R, D] with rows[row_tj] = x_t where row_tj lies below offsets[-1]; no other row is written."""
    x_TD = x_TD.contiguous()
    rows_RD = x_TD.new_empty(num_rows, x_TD.shape[1])
    if rows_RD.numel() and x_TD.numel():
        grid, sizes = _launch(x_TD, row_Tk)
        _gather_rows[grid](x_TD, rows_RD, row_Tk, offsets, offsets.shape[0] - 1, **sizes)
    return rows_RD


@operator("sum_rows")
def sum_rows(rows_RD: Tensor, row_Tk: Tensor, offsets: Tensor, residual_TD: Tensor | None) -> Tensor:
    """[T, D]: residual_t + sum_j rows[row_tj], fp32 inside; rows of pairs without an expert are not read."""
    rows_RD = rows_RD.contiguous()
    out_TD = rows_RD.new_empty(row_Tk.shape[0], rows_RD.shape[1])
    if out_TD.numel():
        grid, sizes = _launch(out_TD, row_Tk)
        residual = out_TD if residual_TD is None else residual_TD.contiguous()
        _sum_rows[grid](
            rows_RD,
            out_TD,
            residual,
            row_Tk,
            offsets,
            offsets.shape[0] - 1,
            HAS_RESIDUAL=residual_TD is not None,
            **sizes,
        )
    return out_TD


@gather_rows.register_fake
def _(x_TD: Tensor, row_Tk: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    return x_TD.new_empty(num_rows, x_TD.shape[1])


@sum_rows.register_fake
def _(rows_RD: Tensor, row_Tk: Tensor, offsets: Tensor, residual_TD: Tensor | None) -> Tensor:
    return rows_RD.new_empty(row_Tk.shape[0], rows_RD.shape[1])


def _save_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.num_rows = inputs[0].shape[0]


def _gather_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
    return sum_rows(grad_RD, *ctx.saved_tensors, None), None, None, None


def _sum_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    needs_rows, _, _, needs_residual = ctx.needs_input_grad
    grad_RD = gather_rows(grad_TD, *ctx.saved_tensors, ctx.num_rows) if needs_rows else None
    # An operator's output must not be its input: autograd may hand this gradient on, it is never written to.
    return grad_RD, None, None, grad_TD if needs_residual else None


gather_rows.register_autograd(_gather_backward, setup_context=_save_places)
sum_rows.register_autograd(_sum_backward, setup_context=_save_places)


def _launch(x_TD: Tensor, row_Tk: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    num_tokens, dim = x_TD.shape
    columns = min(triton.next_power_of_2(dim), MAX_COLUMNS)
    tokens = max(TILE_ELEMENTS // columns, 1)
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(dim, columns))
    sizes = {"num_tokens": num_tokens, "D": dim, "K": row_Tk.shape[1], "TOKENS": tokens, "COLUMNS": columns}
    return grid, {**sizes, "num_warps": WARPS}


@triton.jit
def _gather_rows(
    x_ptr, rows_ptr, row_Tk_ptr, offsets_ptr, num_experts, num_tokens,
    D: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    routed = tl.load(offsets_ptr + num_experts)
    real_column = (column < D)[None, :]
    real_token = token < num_tokens
    x = tl.load(x_ptr + token.to(tl.int64)[:, None] * D + column[None, :], mask=real_token[:, None] & real_column)
    for slot in tl.static_range(K):
        row = tl.load(row_Tk_ptr + token * K + slot, mask=real_token, other=2147483647)
        to = rows_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(to, x, mask=(row < routed)[:, None] & real_column)


@triton.jit
def _sum_rows(
    rows_ptr, out_ptr, residual_ptr, row_Tk_ptr, offsets_ptr, num_experts, num_tokens,
    HAS_RESIDUAL: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    routed = tl.load(offsets_ptr + num_experts)
    real_column = (column < D)[None, :]
    real_token = token < num_tokens
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(row_Tk_ptr + token * K + slot, mask=real_token, other=2147483647)
        at = rows_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
        total += tl.load(at, mask=(row < routed)[:, None] & real_column, other=0.0).to(tl.float32)
    here = token.to(tl.int64)[:, None] * D + column[None, :]
    real = real_token[:, None] & real_column
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + here, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=real)
