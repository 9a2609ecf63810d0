"""The optimizer's element-wise passes on a GPU, one kernel each: every number is read once and written once.

They run at the speed of memory. Sizes and places are counted in int64; what is loaded is added up in fp32. Bit for bit
nothing is stored of a step that is not accepted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.optim.rounding import RoundingKey

BLOCK = 2048
"""Elements that a program has in flight at a time, 16 of them a thread."""
MOMENTUM_ROUNDS = 1
"""Blocks of one matrix that a program of the momentum kernel goes through before it writes its share of the norm."""
ADAMW_BLOCK = 1024
"""The same for AdamW, which has twice as many numbers in flight for each."""
WARPS = 4


def norm_parts(size: int) -> int:
    """Programs of the momentum kernel for a matrix of so many elements, each of which adds up a part of its norm."""
    return triton.cdiv(size, BLOCK * MOMENTUM_ROUNDS)


def momentum_pass(
    grad_MRC: Tensor,
    momentum_MRC: Tensor,
    update_MRC: Tensor,
    squares_MP: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    grad_scale: Tensor,
    ok: Tensor,
    key: RoundingKey,
    first: int,
) -> None:
    """Draw the momentum towards the gradient in place where `ok`, write what is to be orthogonalised to `update_MRC`.

    grad_MRC      [M, R, C] fp32, contiguous, as are the others
    momentum_MRC  fp32, or bf16 that is rounded by chance: `key` and `first`, the parameter's element that is this one's
                  first, decide
    update_MRC    of any float dtype
    squares_MP    [M, norm_parts(R * C)] fp32: gets the squared norms of the update as written, each in parts
    """
    num, size = grad_MRC.shape[0], grad_MRC.shape[1] * grad_MRC.shape[2]
    parts = norm_parts(size)
    assert squares_MP.shape == (num, parts)
    _momentum[(num * parts,)](
        grad_MRC,
        momentum_MRC,
        update_MRC,
        squares_MP,
        grad_scale,
        ok,
        size,
        parts,
        first,
        *key,
        momentum,
        NESTEROV=nesterov,
        STOCHASTIC=momentum_MRC.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        ROUNDS=MOMENTUM_ROUNDS,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["first", "key0", "key1"])
def _momentum(
    grad_ptr,
    momentum_ptr,
    update_ptr,
    squares_ptr,
    scale_ptr,
    ok_ptr,
    size,
    parts,
    first,
    key0,
    key1,
    momentum,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    base = (tl.program_id(0) // parts).to(tl.int64) * size
    begin = (tl.program_id(0) % parts) * (BLOCK * ROUNDS)
    scale, ok = tl.load(scale_ptr), tl.load(ok_ptr).to(tl.int1)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(ROUNDS):
        at = begin + n * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within the matrix
        real = at < size
        grad = tl.load(grad_ptr + base + at, mask=real, other=0.0) * scale
        old = tl.load(momentum_ptr + base + at, mask=real, other=0.0).to(tl.float32)
        mean = old + (1.0 - momentum) * (grad - old)
        if NESTEROV:
            update = (mean - (mean - grad) * (1.0 - momentum)).to(update_ptr.dtype.element_ty)
        else:
            update = mean.to(update_ptr.dtype.element_ty)
        tl.store(update_ptr + base + at, update, mask=real)
        if STOCHASTIC:
            kept = _round_to_bf16(mean, _random_bits(base + at + first, key0, key1))
        else:
            kept = mean
        tl.store(momentum_ptr + base + at, kept, mask=real & ok)
        rounded = update.to(tl.float32)
        total += tl.where(real, rounded * rounded, 0.0)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(total, 0))


def weights_pass(
    param: Tensor, ortho: Tensor, copy: Tensor | None, *, decay: float, step_size: float, ok: Tensor
) -> None:
    """param <- decay * param - step_size * ortho where `ok`; `copy`, in its own dtype, becomes what the parameter is.

    param  fp32, contiguous as are the others; ortho of any float dtype
    """
    _weights[(triton.cdiv(param.numel(), BLOCK),)](
        param,
        ortho,
        param if copy is None else copy,
        ok,
        param.numel(),
        decay,
        step_size,
        HAS_COPY=copy is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def _weights(
    param_ptr,
    ortho_ptr,
    copy_ptr,
    ok_ptr,
    size,
    decay,
    step_size,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    ok = tl.load(ok_ptr).to(tl.int1)
    param = tl.load(param_ptr + at, mask=real, other=0.0)
    ortho = tl.load(ortho_ptr + at, mask=real, other=0.0).to(tl.float32)
    moved = param * decay - step_size * ortho
    tl.store(param_ptr + at, moved, mask=real & ok)
    if HAS_COPY:
        tl.store(copy_ptr + at, tl.where(ok, moved, param).to(copy_ptr.dtype.element_ty), mask=real)


def adamw_pass(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    *,
    corrections: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    ok: Tensor,
    key: RoundingKey,
    first: int,
) -> None:
    """One AdamW step on a flat stretch of a parameter where `ok`; `copy`, in its own dtype, becomes what it is then.

    corrections  [2] fp32: 1 - beta1^n and sqrt(1 - beta2^n) after n updates, this one included
    key, first   chances of rounding moments that are bf16; `first` is the parameter's element that is this one's first
    """
    _adamw[(triton.cdiv(param.numel(), ADAMW_BLOCK),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        param if copy is None else copy,
        corrections,
        grad_scale,
        ok,
        param.numel(),
        first,
        *key,
        lr,
        *betas,
        eps,
        weight_decay,
        HAS_COPY=copy is not None,
        STOCHASTIC=exp_avg.dtype == torch.bfloat16,
        BLOCK=ADAMW_BLOCK,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["first", "key0", "key1"])
def _adamw(
    param_ptr,
    grad_ptr,
    avg_ptr,
    sq_ptr,
    copy_ptr,
    corrections_ptr,
    scale_ptr,
    ok_ptr,
    size,
    first,
    key0,
    key1,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    HAS_COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    scale, ok = tl.load(scale_ptr), tl.load(ok_ptr).to(tl.int1)
    correction1, correction2 = tl.load(corrections_ptr), tl.load(corrections_ptr + 1)
    param = tl.load(param_ptr + at, mask=real, other=0.0)
    grad = tl.load(grad_ptr + at, mask=real, other=0.0) * scale
    avg = tl.load(avg_ptr + at, mask=real, other=0.0).to(tl.float32)
    sq = tl.load(sq_ptr + at, mask=real, other=0.0).to(tl.float32)
    avg = beta1 * avg + (1.0 - beta1) * grad
    sq = beta2 * sq + (1.0 - beta2) * grad * grad
    denominator = tl.sqrt_rn(sq) / correction2 + eps
    moved = param - lr * weight_decay * param - (lr / correction1) * avg / denominator
    accepted = real & ok
    tl.store(param_ptr + at, moved, mask=accepted)
    if HAS_COPY:
        tl.store(copy_ptr + at, tl.where(ok, moved, param).to(copy_ptr.dtype.element_ty), mask=real)
    if STOCHASTIC:
        bits = _random_bits(at + first, key0, key1)
        tl.store(avg_ptr + at, _round_to_bf16(avg, bits), mask=accepted)
        tl.store(sq_ptr + at, _round_to_bf16(sq, bits >> 16), mask=accepted)
    else:
        tl.store(avg_ptr + at, avg, mask=accepted)
        tl.store(sq_ptr + at, sq, mask=accepted)


@triton.jit
def _random_bits(element, key0, key1):
    """As `rounding.random_bits`, for int64 elements: uint32."""
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    return _mix(_mix(low ^ key0.to(tl.uint32, bitcast=True)) ^ (high + key1.to(tl.uint32, bitcast=True)))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_to_bf16(x, bits):
    """As `rounding.round_to_bf16`, by the low 16 bits."""
    pattern = x.to(tl.uint32, bitcast=True)
    raised = (pattern + (bits & 0xFFFF)) & 0xFFFF0000
    finite = (pattern & 0x7F800000) != 0x7F800000
    return tl.where(finite, raised, pattern).to(tl.float32, bitcast=True).to(tl.bfloat16)
