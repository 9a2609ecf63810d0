"""The gradient of an embedding table, added in place: only rows that a token names are touched.

Tokens are sorted by id, stably, on the device. One program for each place in that order and BLOCK_D columns: if a run
of equal ids begins there, it adds the run's rows in fp32 and then the sum to the table's row; else it ends at once. A
run of one, the most frequent by far, takes no more than reading both rows; a longer one is added ROWS at a time. No
atomics, no counts on the host, and every sum has one order.

Legend: T tokens, X vocabulary, D model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.master import gradient_sink

ROWS = 16
"""Rows of a run that a program adds at a time."""
BLOCK_D = 512
"""Columns of a program."""
WARPS = 4


def embed_triton(token_T: Tensor, weight_XD: Tensor, dtype: torch.dtype) -> Tensor:
    """As embed_ref, for tables in fp32, fp16 and bf16."""
    return _Embed.apply(token_T, weight_XD, dtype)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_T: Tensor, weight_XD: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(token_T, weight_XD)
        return weight_XD.index_select(0, token_T).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD: Tensor):  # type: ignore[override]
        token_T, weight_XD = ctx.saved_tensors
        sink = gradient_sink(weight_XD)
        total_XD, add = (torch.empty_like(weight_XD), False) if sink is None else sink
        if not add:
            total_XD.zero_()
        sorted_T, order_T = torch.sort(token_T, stable=True)
        torch.ops.pithwood.add_rows(total_XD, grad_TD.contiguous(), sorted_T, order_T)
        return None, total_XD if sink is None else None, None


@torch.library.custom_op("pithwood::add_rows", mutates_args=("total_XD",))
def add_rows(total_XD: Tensor, rows_TD: Tensor, sorted_T: Tensor, order_T: Tensor) -> None:
    """total[sorted[i]] += rows[order[i]] for every i; sorted ascending, equal ids in the order of their rows.

    total_XD  [X, D]   rows_TD [T, D], both with contiguous rows     sorted_T, order_T [T] int64
    """
    tokens, dim = rows_TD.shape
    if tokens == 0 or dim == 0:
        return
    block = min(triton.next_power_of_2(dim), BLOCK_D)
    _add_rows_kernel[(tokens, triton.cdiv(dim, block))](
        total_XD,
        rows_TD,
        sorted_T,
        order_T,
        tokens,
        dim,
        total_XD.stride(0),
        BLOCK_D=block,
        ROWS=ROWS,
        num_warps=WARPS,
    )


@add_rows.register_fake
def _(total_XD, rows_TD, sorted_T, order_T):
    return None


@triton.jit
def _add_rows_kernel(
    total_ptr,
    rows_ptr,
    sorted_ptr,
    order_ptr,
    num_tokens,
    dim,
    stride_x,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0)
    token = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(sorted_ptr + first + 1, mask=first + 1 < num_tokens, other=-1)
    if before != token:
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        to = total_ptr + token * stride_x + col
        total = tl.load(to, mask=col < dim, other=0.0).to(tl.float32)
        if after != token:
            row = tl.load(order_ptr + first)
            total += tl.load(rows_ptr + row * dim + col, mask=col < dim, other=0.0).to(tl.float32)
        else:
            run = tl.zeros([BLOCK_D], tl.float32)
            place = first + tl.arange(0, ROWS)
            same = (place < num_tokens) & (tl.load(sorted_ptr + place, mask=place < num_tokens, other=-1) == token)
            count = tl.sum(same.to(tl.int32), 0)
            while count > 0:
                row = tl.load(order_ptr + place, mask=same, other=0)
                at = rows_ptr + row[:, None] * dim + col[None, :]
                rows = tl.load(at, mask=same[:, None] & (col < dim)[None, :], other=0.0)  # [ROWS, BLOCK_D]
                run += tl.sum(rows.to(tl.float32), 0)
                place += ROWS
                same = (place < num_tokens) & (tl.load(sorted_ptr + place, mask=place < num_tokens, other=-1) == token)
                count = tl.sum(same.to(tl.int32), 0)
            total += run
        tl.store(to, total.to(total_ptr.dtype.element_ty), mask=col < dim)
