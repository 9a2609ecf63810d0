"""Root-mean-square normalisation with fp32 inside and one saved copy of its input; alone, and after a residual's sum.

Legend: D normalised (last) dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.rms_norm.eager import rms_norm_eager
from pithwood.ops.rms_norm.ref import rms_norm_ref
from pithwood.ops.triton_support import triton_misfit

__all__ = ["add_rms_norm", "branch_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype.

    x         [..., D] any float dtype; the arithmetic is fp32 (fp64 for fp64 input)
    weight    [D]      any float dtype, typically the fp32 master weight; its gradient comes back in that dtype
    impl      "ref" | "torch" | "triton"   None: "triton" for fp32, fp16 and bf16 on CUDA, "torch" elsewhere
    returns   like x
    raises    ValueError if weight is not [D], or "triton" where it does not fit

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    _check_weight(x, weight)
    if _by_kernel(impl, x):
        from pithwood.ops.rms_norm.triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_ref(x, weight, eps) if impl == "ref" else rms_norm_eager(x, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """A residual's sum and its norm, (x + y, rms_norm(x + y)): as kernels one pass over memory each way.

    x, y      [..., D] of one dtype and shape
    weight    [D]      as in rms_norm
    impl      as in rms_norm; "ref" and "torch" add first and norm after
    returns   both like x; the sum is rounded to x's dtype before it is normed
    raises    ValueError if weight is not [D], x and y differ in shape or dtype, or "triton" where it does not fit
    """
    check_impl(impl, ("ref", "torch", "triton"))
    _check_weight(x, weight)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"add_rms_norm adds equal shapes of one dtype, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(y.shape)} {y.dtype}"
        )
    if _by_kernel(impl, x, y):
        from pithwood.ops.rms_norm.triton import add_rms_norm_triton

        return add_rms_norm_triton(x, y, weight, eps)
    total = x + y
    return total, rms_norm(total, weight, eps, impl=impl or "torch")


def branch_rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """A residual and the norm that branches off it, (x, rms_norm(x)): as kernels, what comes back to x from both is
    added where the norm's gradient is made.

    x, weight, impl, raises   as in rms_norm
    returns                   both like x; the first shares its memory
    """
    check_impl(impl, ("ref", "torch", "triton"))
    _check_weight(x, weight)
    if _by_kernel(impl, x):
        from pithwood.ops.rms_norm.triton import branch_rms_norm_triton

        return branch_rms_norm_triton(x, weight, eps)
    return x, rms_norm(x, weight, eps, impl=impl or "torch")


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm weight has shape {tuple(weight.shape)}; the last dim of x needs ({x.shape[-1]},)")


def _by_kernel(impl: str | None, *tensors: Tensor) -> bool:
    misfit = triton_misfit(*tensors)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    chosen = not misfit and tensors[0].is_cuda and not torch.compiler.is_compiling()
    return impl == "triton" or (impl is None and chosen)
