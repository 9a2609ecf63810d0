"""The linear head's loss and all its gradients in one pass over chunks of tokens.

A chunk's logits are one product in half precision. A kernel, one program a row, reads the row for its log-sum, adds the
token's loss, and writes weight * (softmax - onehot(target)) where the logits stood; the second reading goes backwards,
so that what was read last is still in the multiprocessor's cache. Two more products take that to the chunk's gradient
of x and to the head's, which is added up in fp32 over the chunks. The backward pass multiplies both by its scalar on
the device. Bytes besides the three products': the logits once read, once or twice, and once written.

Legend: T packed tokens, n tokens of a chunk, D model width, X vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.linear import add_product
from pithwood.ops.master import gradient_sink, in_dtype
from pithwood.ops.operator import operator

WIDTH = 8
"""Neighbouring logits that one thread takes at a time: 16 bytes in half precision."""
LANES = 2048
"""Groups of WIDTH logits that a program takes at a time."""
WARPS = 32
SCALE_BLOCK = 4096


def linear_nll_triton(x_TD: Tensor, weight_XD: Tensor, target_T: Tensor, weight_T: Tensor, rows: int) -> Tensor:
    """As linear_nll_ref, for fp32, fp16 and bf16, `rows` tokens at a time."""
    if torch.is_grad_enabled():
        return _LinearNll.apply(x_TD, weight_XD, target_T, weight_T, rows)
    return _chunks(x_TD, weight_XD, target_T, weight_T, rows, None, None).sum()


@torch.no_grad()
def nll_rows_triton(x_TD: Tensor, weight_XD: Tensor, target_T: Tensor, rows: int) -> Tensor:
    """[T] fp32 -log softmax(x W^T)[target] without gradient, `rows` tokens at a time."""
    ones_T = torch.ones_like(target_T, dtype=torch.float32)
    return _chunks(x_TD, weight_XD, target_T, ones_T, rows, None, None)


class _LinearNll(torch.autograd.Function):
    """Saves the gradients themselves, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx, x, weight, target_T, weight_T, rows: int) -> Tensor:  # type: ignore[override]
        grad_x = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
        loss_T = _chunks(x, weight, target_T, weight_T, rows, grad_x, grad_weight)
        ctx.save_for_backward(weight, grad_x, grad_weight)
        return loss_T.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        weight, grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = _scaled(grad_x, grad, None)
        if grad_weight is not None:
            sink = gradient_sink(weight)
            if sink is None:
                grad_weight = _scaled(grad_weight, grad, None).to(weight.dtype)
            else:
                _scaled(grad_weight, grad, sink)
                grad_weight = None
        return grad_x, grad_weight, None, None, None


def _chunks(
    x_TD: Tensor,
    weight_XD: Tensor,
    target_T: Tensor,
    weight_T: Tensor,
    rows: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """[T] fp32 losses; fills grad_x [T, D] like x and grad_weight [X, D] fp32 where they are given."""
    num_tokens, vocab = x_TD.shape[0], weight_XD.shape[0]
    head_XD = in_dtype(weight_XD, x_TD.dtype)
    loss_T = torch.zeros(num_tokens, dtype=torch.float32, device=x_TD.device)
    weight_T = weight_T.to(torch.float32).contiguous()
    logits_nX = x_TD.new_empty(min(rows, num_tokens), vocab)
    wants = grad_x is not None or grad_weight is not None
    if grad_weight is not None and num_tokens == 0:
        grad_weight.zero_()
    for start in range(0, num_tokens, rows):
        part = slice(start, min(start + rows, num_tokens))
        chunk = logits_nX[: part.stop - start]
        torch.mm(x_TD[part], head_XD.t(), out=chunk)
        nll_of_rows(chunk, target_T[part], weight_T[part], loss_T[part], wants)
        if grad_x is not None:
            torch.mm(chunk, head_XD, out=grad_x[part])
        if grad_weight is not None:
            add_product(grad_weight, chunk, x_TD[part], start > 0)
    return loss_T


@operator("nll_of_rows", mutates=("logits_nX", "loss_n"))
def nll_of_rows(logits_nX: Tensor, target_n: Tensor, weight_n: Tensor, loss_n: Tensor, want_grad: bool) -> None:
    """Write each row's weight * -log softmax[target] to loss, and with want_grad its gradient over the logits.

    logits_nX  [n, X] contiguous rows     target_n [n] int64, weight_n, loss_n [n] fp32
    """
    rows, vocab = logits_nX.shape
    if rows == 0:
        return
    lanes = min(LANES, triton.next_power_of_2(triton.cdiv(vocab, WIDTH)))
    _nll_kernel[(rows,)](
        logits_nX,
        target_n,
        weight_n,
        loss_n,
        vocab,
        logits_nX.stride(0),
        target_n.stride(0),
        WIDTH=WIDTH,
        LANES=lanes,
        WANT_GRAD=want_grad,
        num_warps=min(WARPS, max(lanes // 32, 1)),
    )


@nll_of_rows.register_fake
def _(logits_nX, target_n, weight_n, loss_n, want_grad):
    return None


@torch.no_grad()
def _scaled(x: Tensor, scale: Tensor, sink: tuple[Tensor, bool] | None) -> Tensor:
    """x * scale in x's dtype, or that added to (True) or written over (False) a sink; scale is one fp32 on the device.

    A product with an fp32 scalar tensor in torch would first round the scalar to x's dtype.
    """
    out, add = (torch.empty_like(x), False) if sink is None else sink
    if x.numel():
        grid = (triton.cdiv(x.numel(), SCALE_BLOCK),)
        _scale_kernel[grid](x, scale.to(torch.float32), out, x.numel(), ADD=add, BLOCK=SCALE_BLOCK, num_warps=8)
    return out


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sum_up(peak, total, tile):
    """Each lane's running peak and sum of 2^(score - peak) with a tile [LANES, WIDTH] of logits more; base 2."""
    score = tile.to(tl.float32) * LOG2_E
    higher = tl.maximum(peak, tl.max(score, 1))
    # a lane that has seen no logit yet
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(peak - finite) + tl.sum(tl.exp2(score - finite[:, None]), 1)


@triton.jit
def _write_gradient(base, col, tile, lse, weight, target, vocab):
    """weight * (softmax - onehot(target)) over a tile's logits."""
    grad = weight * (tl.exp2(tile.to(tl.float32) * LOG2_E - lse) - tl.where(col == target, 1.0, 0.0))
    tl.store(base + col, grad.to(tile.dtype), mask=col < vocab)


@triton.jit
def _nll_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    vocab,
    stride_n,
    stride_target,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    WANT_GRAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride_n
    target = tl.load(target_ptr + row * stride_target)
    weight = tl.load(weight_ptr + row)
    weight = tl.where(target < 0, 0.0, weight)
    at = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [LANES, WIDTH]
    BLOCK: tl.constexpr = LANES * WIDTH
    steps = tl.cdiv(vocab, BLOCK)
    if weight == 0.0:
        # whatever the logits are, even NaN
        if WANT_GRAD:
            for step in range(0, steps):
                zero = tl.zeros([LANES, WIDTH], logits_ptr.dtype.element_ty)
                tl.store(base + step * BLOCK + at, zero, mask=step * BLOCK + at < vocab)
    else:
        # before any thread overwrites it
        chosen = tl.load(base + target).to(tl.float32) * LOG2_E
        peak = tl.full([LANES], float("-inf"), tl.float32)
        total = tl.zeros([LANES], tl.float32)
        for step in range(0, steps):
            col = step * BLOCK + at
            tile = tl.load(base + col, mask=col < vocab, other=float("-inf"))
            peak, total = _sum_up(peak, total, tile)
        top = tl.max(peak, 0)
        lse = top + tl.log2(tl.sum(total * tl.exp2(peak - top), 0))
        tl.store(loss_ptr + row, weight * (lse - chosen) * LN_2)
        if WANT_GRAD:
            for step in range(0, steps):
                col = (steps - 1 - step) * BLOCK + at
                tile = tl.load(base + col, mask=col < vocab, other=float("-inf"))
                _write_gradient(base, col, tile, lse, weight, target, vocab)


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, out_ptr, numel, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    y = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32) * scale
    if ADD:
        y += tl.load(out_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < numel)
