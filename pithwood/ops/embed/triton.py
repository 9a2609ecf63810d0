"""The gradient of an embedding table, added in place: only rows that a token names are touched.

Tokens are sorted by id, stably, on the device; a run of equal ids belongs to the program at whose places it begins. A
program takes PLACES places in that order and BLOCK_D columns. Ids that occur once, most by far, it adds together, as
one tile of rows that are read and written all at a time; then it walks over its longer runs and adds each ROWS rows at
a time in fp32 before it touches the table. No atomics, no counts on the host, and every sum has one order.

Legend: T tokens, X vocabulary, D model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.master import gradient_sink
from pithwood.ops.operator import operator

PLACES = 8
"""Places in the order of tokens that a program takes."""
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
        add_rows(total_XD, grad_TD.contiguous(), sorted_T, order_T)
        return None, total_XD if sink is None else None, None


@operator("add_rows", mutates=("total_XD",))
def add_rows(total_XD: Tensor, rows_TD: Tensor, sorted_T: Tensor, order_T: Tensor) -> None:
    """total[sorted[i]] += rows[order[i]] for every i; sorted ascending, equal ids in the order of their rows.

    total_XD  [X, D]   rows_TD [T, D], both with contiguous rows     sorted_T, order_T [T] int64
    """
    tokens, dim = rows_TD.shape
    if tokens == 0 or dim == 0:
        return
    block = min(triton.next_power_of_2(dim), BLOCK_D)
    _add_rows_kernel[(triton.cdiv(tokens, PLACES), triton.cdiv(dim, block))](
        total_XD,
        rows_TD,
        sorted_T,
        order_T,
        tokens,
        dim,
        total_XD.stride(0),
        BLOCK_D=block,
        PLACES=PLACES,
        ROWS=ROWS,
        num_warps=WARPS,
    )


@add_rows.register_fake
def _(total_XD, rows_TD, sorted_T, order_T):
    return None


@triton.jit
def _token_at(sorted_ptr, place, num_tokens):
    """The ids at these places; -1, which no token has, outside."""
    return tl.load(sorted_ptr + place, mask=(place >= 0) & (place < num_tokens), other=-1)


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
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0) * PLACES
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = first + tl.arange(0, PLACES)
    token = _token_at(sorted_ptr, place, num_tokens)
    begins = (token != _token_at(sorted_ptr, place - 1, num_tokens)) & (place < num_tokens)
    alone = begins & (token != _token_at(sorted_ptr, place + 1, num_tokens))
    row = tl.load(order_ptr + place, mask=alone, other=0)
    real = alone[:, None] & (col < dim)[None, :]
    rows = tl.load(rows_ptr + row[:, None] * dim + col[None, :], mask=real, other=0.0)  # [PLACES, BLOCK_D]
    to = total_ptr + token[:, None] * stride_x + col[None, :]
    total = tl.load(to, mask=real, other=0.0)
    tl.store(to, (total.to(tl.float32) + rows.to(tl.float32)).to(total_ptr.dtype.element_ty), mask=real)

    if tl.sum((begins & (token == _token_at(sorted_ptr, place + 1, num_tokens))).to(tl.int32), 0) > 0:
        for begin in range(first, tl.minimum(first + PLACES, num_tokens)):
            one = tl.load(sorted_ptr + begin)
            before = _token_at(sorted_ptr, begin - 1, num_tokens)
            if (one != before) & (one == _token_at(sorted_ptr, begin + 1, num_tokens)):
                run = tl.zeros([BLOCK_D], tl.float32)
                member = begin + tl.arange(0, ROWS)
                same = _token_at(sorted_ptr, member, num_tokens) == one
                while tl.sum(same.to(tl.int32), 0) > 0:
                    source = tl.load(order_ptr + member, mask=same, other=0)
                    at = rows_ptr + source[:, None] * dim + col[None, :]
                    part = tl.load(at, mask=same[:, None] & (col < dim)[None, :], other=0.0)  # [ROWS, BLOCK_D]
                    run += tl.sum(part.to(tl.float32), 0)
                    member += ROWS
                    same = _token_at(sorted_ptr, member, num_tokens) == one
                target = total_ptr + one * stride_x + col
                old = tl.load(target, mask=col < dim, other=0.0).to(tl.float32)
                tl.store(target, (old + run).to(total_ptr.dtype.element_ty), mask=col < dim)
