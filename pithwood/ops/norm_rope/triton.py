"""Norm per head and rotation on a GPU: one launch for q and k, every element read and written once in each direction.

A program owns TOKENS tokens and walks over their heads, first those of q, then those of k; the tokens' cosines and
sines stay in registers meanwhile. A head's vector is two tiles [TOKENS, HALF], since rotation pairs element i with
i + K/2. The backward pass turns the gradient back, then takes it through the norm, whose 1 / rms it computes again from
q and k; each program writes its share of the weights' gradients, [PARTS, K], which a second reduction adds up. No
atomics. All arithmetic is fp32, the result is rounded once.

Legend: T packed tokens, H query heads, G KV heads, K head dim, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator
from pithwood.ops.rope import Rope

TILE_ELEMENTS = 1024
"""Elements of one of a program's tiles: with four warps 8 each thread, 16 bytes of bf16."""
WARPS = 4
STAGES = 3
"""Heads that a program has on their way from memory at a time."""


def norm_rope_triton(
    q_THK: Tensor,
    k_TGK: Tensor,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    eps: float,
    rope: Rope | None,
) -> tuple[Tensor, Tensor]:
    """(q, k) as norm_rope_ref makes each, for fp32, fp16 and bf16."""
    cos_TK, sin_TK = (None, None) if rope is None else (rope.cos_TK.contiguous(), rope.sin_TK.contiguous())
    return _NormRope.apply(q_THK, k_TGK, q_weight_K, k_weight_K, cos_TK, sin_TK, eps)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps: float):  # type: ignore[override]
        # without a norm the map is a rotation: its gradient needs the angles alone
        saved = (None, None) if q_weight is None else (q, k)
        ctx.save_for_backward(*saved, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return norm_rope_forward(_unit(q), _unit(k), q_weight, k_weight, cos, sin, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor):  # type: ignore[override]
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        if q is None:
            q, k = grad_q, grad_k
        dq, dk, dq_weight, dk_weight = norm_rope_backward(
            _unit(grad_q), _unit(grad_k), _unit(q), _unit(k), q_weight, k_weight, cos, sin, ctx.eps
        )
        if q_weight is None:
            return dq, dk, None, None, None, None, None
        return dq, dk, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None, None


def _unit(x_THK: Tensor) -> Tensor:
    """x itself if K has unit stride, else a copy."""
    return x_THK if x_THK.stride(2) == 1 else x_THK.contiguous()


@operator("norm_rope_forward")
def norm_rope_forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(q, k), contiguous; no weights: not normed, no angles: not rotated."""
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    grid, options = _launch(q, k, q_weight, cos)
    if grid[0]:
        _forward_kernel[grid](
            q, k, _or(q_weight, q), _or(k_weight, k), _or(cos, q), _or(sin, q), out_q, out_k,
            q.shape[0], q.shape[1], k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1), eps, **options,
        )  # fmt: skip
    return out_q, out_k


@norm_rope_forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator("norm_rope_backward")
def norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dq_weight, dk_weight [K] fp32) of `norm_rope_forward`; without weights q and k are not read, and the
    weights' gradients are zero.
    """
    dq, dk = grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
    grid, options = _launch(grad_q, grad_k, q_weight, cos)
    parts = grid[0] if q_weight is not None else 0
    part_q = torch.empty(parts, grad_q.shape[2], dtype=torch.float32, device=grad_q.device)
    part_k = torch.empty_like(part_q)
    if grid[0]:
        _backward_kernel[grid](
            grad_q, grad_k, q, k, _or(q_weight, q), _or(k_weight, k), _or(cos, q), _or(sin, q), dq, dk, part_q, part_k,
            grad_q.shape[0], grad_q.shape[1], grad_k.shape[1], grad_q.stride(0), grad_q.stride(1), grad_k.stride(0),
            grad_k.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), eps, **options,
        )  # fmt: skip
    return dq, dk, part_q.sum(0), part_k.sum(0)


@norm_rope_backward.register_fake
def _(grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, eps):
    weight = grad_q.new_empty(grad_q.shape[2], dtype=torch.float32)
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape), weight, torch.empty_like(weight)


def _launch(q: Tensor, k: Tensor, weight: Tensor | None, cos: Tensor | None) -> tuple[tuple[int], dict[str, int]]:
    """(grid, compile-time arguments) that both directions share."""
    half = q.shape[2] // 2
    padded = triton.next_power_of_2(max(half, 1))
    tokens = max(TILE_ELEMENTS // padded, 1)
    empty = q.shape[2] == 0 or q.shape[1] + k.shape[1] == 0
    grid = (0 if empty else triton.cdiv(q.shape[0], tokens),)
    flags = {"NORM": weight is not None, "ROTATE": cos is not None}
    return grid, {"HALF": half, "PADDED": padded, "TOKENS": tokens, **flags, "STAGES": STAGES, "num_warps": WARPS}


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """x, or some tensor for an argument that the kernel does not touch."""
    return other if x is None else x


@triton.jit
def _angles(cos_ptr, sin_ptr, token, dim, real, HALF: tl.constexpr):
    """Cosines and sines of these tokens, [TOKENS, PADDED] fp32; both halves of a head turn alike."""
    at = token.to(tl.int64)[:, None] * (2 * HALF) + dim[None, :]
    cos = tl.load(cos_ptr + at, mask=real, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _forward_side(
    x_ptr, weight_ptr, out_ptr, cos, sin, token, dim, real, num_heads, stride_t, stride_h, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if NORM:
        weight_a = tl.load(weight_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        weight_b = tl.load(weight_ptr + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    row = token.to(tl.int64)[:, None]
    for head in tl.range(0, num_heads, num_stages=STAGES):
        at = x_ptr + row * stride_t + head * stride_h + dim[None, :]
        a = tl.load(at, mask=real, other=0.0).to(tl.float32)  # [TOKENS, PADDED]
        b = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
        if NORM:
            inv_rms = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)
            a = a * inv_rms[:, None] * weight_a
            b = b * inv_rms[:, None] * weight_b
        to = out_ptr + (row * num_heads + head) * (2 * HALF) + dim[None, :]
        if ROTATE:
            tl.store(to, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=real)
            tl.store(to + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=real)
        else:
            tl.store(to, a.to(out_ptr.dtype.element_ty), mask=real)
            tl.store(to + HALF, b.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_q_ptr, out_k_ptr, num_tokens, q_heads, k_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, eps, HALF: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, PADDED)
    real = (token < num_tokens)[:, None] & (dim < HALF)[None, :]
    cos = tl.zeros([TOKENS, PADDED], tl.float32)
    sin = cos
    if ROTATE:
        cos, sin = _angles(cos_ptr, sin_ptr, token, dim, real, HALF)
    _forward_side(
        q_ptr, q_weight_ptr, out_q_ptr, cos, sin, token, dim, real, q_heads, stride_qt, stride_qh, eps,
        HALF, NORM, ROTATE, STAGES,
    )  # fmt: skip
    _forward_side(
        k_ptr, k_weight_ptr, out_k_ptr, cos, sin, token, dim, real, k_heads, stride_kt, stride_kh, eps,
        HALF, NORM, ROTATE, STAGES,
    )  # fmt: skip


@triton.jit
def _backward_side(
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, part_ptr, cos, sin, token, dim, real, num_heads, stride_gt, stride_gh,
    stride_t, stride_h, eps, HALF: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if NORM:
        weight_a = tl.load(weight_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        weight_b = tl.load(weight_ptr + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        share_a = tl.zeros([TOKENS, PADDED], tl.float32)
        share_b = tl.zeros([TOKENS, PADDED], tl.float32)
    row = token.to(tl.int64)[:, None]
    for head in tl.range(0, num_heads, num_stages=STAGES):
        at = grad_ptr + row * stride_gt + head * stride_gh + dim[None, :]
        grad_a = tl.load(at, mask=real, other=0.0).to(tl.float32)  # [TOKENS, PADDED]
        grad_b = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
        if ROTATE:
            # a rotation's gradient is turned back by the same angle
            turned = grad_a * cos + grad_b * sin
            grad_b = grad_b * cos - grad_a * sin
            grad_a = turned
        if NORM:
            from_x = x_ptr + row * stride_t + head * stride_h + dim[None, :]
            a = tl.load(from_x, mask=real, other=0.0).to(tl.float32)
            b = tl.load(from_x + HALF, mask=real, other=0.0).to(tl.float32)
            inv_rms = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
            a *= inv_rms
            b *= inv_rms
            channel_a = grad_a * a
            channel_b = grad_b * b
            share_a += channel_a
            share_b += channel_b
            along = tl.sum(channel_a * weight_a + channel_b * weight_b, 1)[:, None] / (2 * HALF)
            grad_a = (grad_a * weight_a - a * along) * inv_rms
            grad_b = (grad_b * weight_b - b * along) * inv_rms
        to = grad_x_ptr + (row * num_heads + head) * (2 * HALF) + dim[None, :]
        tl.store(to, grad_a.to(grad_x_ptr.dtype.element_ty), mask=real)
        tl.store(to + HALF, grad_b.to(grad_x_ptr.dtype.element_ty), mask=real)
    if NORM:
        part = part_ptr + tl.program_id(0).to(tl.int64) * (2 * HALF) + dim
        tl.store(part, tl.sum(share_a, 0), mask=dim < HALF)
        tl.store(part + HALF, tl.sum(share_b, 0), mask=dim < HALF)


@triton.jit
def _backward_kernel(
    grad_q_ptr, grad_k_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, part_q_ptr,
    part_k_ptr, num_tokens, q_heads, k_heads, stride_gqt, stride_gqh, stride_gkt, stride_gkh, stride_qt, stride_qh,
    stride_kt, stride_kh, eps, HALF: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, PADDED)
    real = (token < num_tokens)[:, None] & (dim < HALF)[None, :]
    cos = tl.zeros([TOKENS, PADDED], tl.float32)
    sin = cos
    if ROTATE:
        cos, sin = _angles(cos_ptr, sin_ptr, token, dim, real, HALF)
    _backward_side(
        grad_q_ptr, q_ptr, q_weight_ptr, dq_ptr, part_q_ptr, cos, sin, token, dim, real, q_heads, stride_gqt,
        stride_gqh, stride_qt, stride_qh, eps, HALF, PADDED, TOKENS, NORM, ROTATE, STAGES,
    )  # fmt: skip
    _backward_side(
        grad_k_ptr, k_ptr, k_weight_ptr, dk_ptr, part_k_ptr, cos, sin, token, dim, real, k_heads, stride_gkt,
        stride_gkh, stride_kt, stride_kh, eps, HALF, PADDED, TOKENS, NORM, ROTATE, STAGES,
    )  # fmt: skip
