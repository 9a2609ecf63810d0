"""The router's products on tensor cores, as exact as fp32: factors are sums of bf16 numbers.

An fp32 number is the sum of three bf16 numbers (8 bits of significand each) to its last bit. A product of two bf16
numbers is exact in fp32, and tensor cores add in fp32: x [T, D] in bf16 times the three parts of the weight, laid side
by side as one product of three times the width, gives what a product in fp32 gives, up to the order of additions and to
sums that are cut off where others are rounded (2e-6 of the logits at D = 2048). The gradients' factors are cut into two
parts each, and their product's smallest term is left out: relative error 2**-16.

Legend: T packed tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

BLOCK = 1024
"""Numbers that a program cuts up."""


@operator("router_logits")
def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """[T, E] fp32 for x in bf16 and weights in fp32."""
    num_experts = weight_ED.shape[0]
    parts = split_weight(weight_ED)[: 3 * num_experts]
    logits = torch.mm(x_TD, parts.t(), out_dtype=torch.float32)
    return logits.view(-1, 3, num_experts).sum(1)


@operator("router_logits_backward")
def router_logits_backward(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x in bf16, gradient of the weight in fp32)."""
    num_experts = weight_ED.shape[0]
    grad_parts = split_gradient(grad_TE)
    # [high, high, low] times [high, middle, high] of the weight
    grad_x = torch.mm(grad_parts, split_weight(weight_ED)[num_experts:])
    grad_weight = torch.mm(grad_parts[:, num_experts:].t(), x_TD, out_dtype=torch.float32)
    return grad_x, grad_weight[:num_experts] + grad_weight[num_experts:]


@router_logits.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


@router_logits_backward.register_fake
def _(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    return router_logits_backward(grad_TE, *ctx.saved_tensors)


router_logits.register_autograd(_backward, setup_context=_save_inputs)


def split_weight(weight_ED: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[4E, D]: low, high, middle, high parts of the weight; the first three are what the logits need, the last three
    what the gradient of x needs.
    """
    parts = torch.empty(4 * weight_ED.shape[0], weight_ED.shape[1], dtype=dtype, device=weight_ED.device)
    size = weight_ED.numel()
    if size:
        _split_router_weight[(triton.cdiv(size, BLOCK),)](weight_ED.contiguous(), parts, size, BLOCK=BLOCK, num_warps=4)
    return parts


def split_gradient(grad_TE: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[T, 3E]: high, high and low parts of the gradient."""
    num_tokens, num_experts = grad_TE.shape
    parts = torch.empty(num_tokens, 3 * num_experts, dtype=dtype, device=grad_TE.device)
    size = grad_TE.numel()
    if size:
        _split_router_gradient[(triton.cdiv(size, BLOCK),)](
            grad_TE.contiguous(), parts, size, num_experts, BLOCK=BLOCK, num_warps=4
        )
    return parts


@triton.jit
def _split_router_weight(weight_ptr, parts_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    dtype = parts_ptr.dtype.element_ty
    value = tl.load(weight_ptr + at, mask=real, other=0.0)
    high = value.to(dtype)
    rest = value - high.to(tl.float32)
    middle = rest.to(dtype)
    low = (rest - middle.to(tl.float32)).to(dtype)
    tl.store(parts_ptr + at, low, mask=real)
    tl.store(parts_ptr + size + at, high, mask=real)
    tl.store(parts_ptr + 2 * size + at, middle, mask=real)
    tl.store(parts_ptr + 3 * size + at, high, mask=real)


@triton.jit
def _split_router_gradient(grad_ptr, parts_ptr, size, num_experts, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    dtype = parts_ptr.dtype.element_ty
    value = tl.load(grad_ptr + at, mask=real, other=0.0)
    high = value.to(dtype)
    low = (value - high.to(tl.float32)).to(dtype)
    to = parts_ptr + at // num_experts * (3 * num_experts) + at % num_experts
    tl.store(to, high, mask=real)
    tl.store(to + num_experts, high, mask=real)
    tl.store(to + 2 * num_experts, low, mask=real)
