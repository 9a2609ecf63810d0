"""Linear maps whose weight is kept in a master dtype and used in the input's.

On a GPU, for half-precision input and an fp32 weight, the copies that a trainer keeps are used (`in_dtype`), and the
weight's gradient is computed in fp32 straight from half-precision operands and added to `weight.grad` by the product
itself (`add_gradient`): nothing rounds it to half precision, and nothing but the product moves it.

Legend: T rows, C inputs, O outputs of a map.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pithwood.ops.master import add_gradient, in_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C] @ weight [O, C]^T (+ bias) in x's dtype; fp32 master weights are cast on the fly or their kept copy is
    used, gradients come back fp32.

    Where `adds_in_place` holds, a leaf weight's gradient goes straight to `weight.grad`, and autograd gets None for it:
    run `backward()`, since `torch.autograd.grad` does not find it.
    """
    if adds_in_place(x, weight):
        return linears(x, (weight,), (bias,))[0]
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The maps of one input, as `linear` computes each; on the fast path their gradients of x are added up by the
    products themselves.
    """
    if not all(adds_in_place(x, weight) for weight in weights):
        return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return _Linears.apply(x, len(weights), *weights, *biases)


def adds_in_place(x: Tensor, weight: Tensor) -> bool:
    """Whether products of x with this weight take the fast path: CUDA, x in half precision, the weight in fp32, and no
    compiler that would have to see through the sums.
    """
    halves = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == torch.float32
    return halves and not torch.compiler.is_compiling()


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, count: int, *parameters):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        # not saved as tensors are: what recomputes activations hands those back as others, without their copies
        ctx.parameters, ctx.count = parameters, count
        pairs = zip(parameters[:count], parameters[count:], strict=True)
        return tuple(F.linear(x, in_dtype(w, x.dtype), None if b is None else b.to(x.dtype)) for w, b in pairs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):  # type: ignore[override]
        (x,), parameters = ctx.saved_tensors, ctx.parameters
        count, wanted = ctx.count, ctx.needs_input_grad[2:]
        x_TC = x.reshape(-1, x.shape[-1])
        grad_x: Tensor | None = None
        grad_weights: list[Tensor | None] = [None] * count
        grad_biases: list[Tensor | None] = [None] * count
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            grad_TO, weight = grad.reshape(-1, grad.shape[-1]), parameters[index]
            if ctx.needs_input_grad[0]:
                copy = in_dtype(weight, x.dtype)
                grad_x = torch.mm(grad_TO, copy) if grad_x is None else grad_x.addmm_(grad_TO, copy)
            if wanted[index]:
                grad_weights[index] = add_weight_gradient(weight, grad_TO, x_TC)
            if wanted[count + index]:
                grad_biases[index] = grad_TO.sum(0, dtype=torch.float32).to(parameters[count + index].dtype)
        return None if grad_x is None else grad_x.view(x.shape), None, *grad_weights, *grad_biases


@torch.no_grad()
def add_weight_gradient(weight: Tensor, grad_TO: Tensor, x_TC: Tensor) -> Tensor | None:
    """None after adding grad^T x to the weight's gradient in place, in fp32 (or putting that off, under
    `deferred_gradients`); the product itself if it has no sink.

    grad_TO, x_TC  of one half-precision dtype, on CUDA; any strides that a product takes
    """
    if add_gradient(weight, lambda total_OC, add: add_product(total_OC, grad_TO, x_TC, add)):
        return None
    return add_product(torch.empty(weight.shape, dtype=torch.float32, device=x_TC.device), grad_TO, x_TC, False)


def add_product(total_OC: Tensor, grad_TO: Tensor, x_TC: Tensor, add: bool) -> Tensor:
    """total + grad^T x in place (add), or grad^T x written over total, for an fp32 total; returns it.

    Half-precision operands on CUDA: one product where torch can add to an fp32 sum (`product_adds_fp32`); elsewhere the
    product makes an fp32 matrix of its own, which is added after, at three times the traffic. On a CPU, and in fp32,
    the operands are multiplied in fp32.
    """
    if not (x_TC.is_cuda and x_TC.dtype != torch.float32):
        return total_OC.addmm_(grad_TO.t().float(), x_TC.float(), beta=int(add))
    if not add:
        return torch.mm(grad_TO.t(), x_TC, out_dtype=torch.float32, out=total_OC)
    if product_adds_fp32(x_TC.device):
        return torch.addmm(total_OC, grad_TO.t(), x_TC, out_dtype=torch.float32, out=total_OC)
    return total_OC.add_(torch.mm(grad_TO.t(), x_TC, out_dtype=torch.float32))


@functools.cache
def product_adds_fp32(device: torch.device) -> bool:
    """Whether torch.addmm takes an fp32 sum with half-precision operands: torch 2.10 and later do (before, its checks
    wanted the sum in the operands' dtype). Tried once, on matrices of 16 x 16.
    """
    half, total = (torch.ones(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
