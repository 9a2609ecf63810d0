"""weight * silu(gate) * up: the elementwise heart of an expert, with the router's weight applied to each row.

Legend: R rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.swiglu.ref import swiglu_backward_ref, swiglu_ref
from pithwood.ops.triton_support import triton_misfit

__all__ = ["swiglu", "swiglu_backward"]


def swiglu(
    gate_up_RF: Tensor, weight_R: Tensor | None = None, offsets: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """weight * silu(gate) * up for gate_up whose first F columns are the gate; saves its inputs only.

    gate_up_RF   [R, 2F] float; [..., 2F] where no weight is given and "ref" serves it
    weight_R     [R] float, one factor a row; None: 1
    offsets      [E + 1] int32 of rows in groups: what stands from offsets[-1] on is unspecified and may be skipped
    impl         "ref": any dtype and device. "triton": fp32, fp16, bf16. None: "triton" where it fits on CUDA
    returns      [R, F] in the dtype of gate_up, fp32 inside
    raises       ValueError on an odd width, shapes that do not fit, or an impl that does not
    """
    check_impl(impl, ("ref", "triton"))
    _check(gate_up_RF, weight_R)
    if _use_triton(impl, gate_up_RF):
        from pithwood.ops.swiglu import triton

        return triton.swiglu(gate_up_RF, weight_R, offsets)
    if torch.compiler.is_compiling():
        return swiglu_ref(gate_up_RF, weight_R)
    return _SwiGLU.apply(gate_up_RF, weight_R)


@torch.no_grad()
def swiglu_backward(
    grad_RF: Tensor,
    gate_up_RF: Tensor,
    weight_R: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the backward pass of an expert needs, in one pass over gate_up: no gradient of its own.

    grad_RF   [R, F] gradient of the result, in the dtype of gate_up; "triton" overwrites it by the hidden rows
    impl      as of `swiglu`
    returns   hidden [R, F], the forward's result anew; gradient of gate_up [R, 2F]; gradient of the weight [R] or None
    raises    ValueError as `swiglu`
    """
    check_impl(impl, ("ref", "triton"))
    _check(gate_up_RF, weight_R)
    if grad_RF.shape != (*gate_up_RF.shape[:-1], gate_up_RF.shape[-1] // 2) or grad_RF.dtype != gate_up_RF.dtype:
        raise ValueError(
            f"gradient {tuple(grad_RF.shape)} {grad_RF.dtype} must be half as wide as gate_up "
            f"{tuple(gate_up_RF.shape)}, in its dtype {gate_up_RF.dtype}"
        )
    if _use_triton(impl, gate_up_RF):
        from pithwood.ops.swiglu import triton

        hidden_RF = grad_RF.contiguous()
        grad_gate_up, grad_weight = triton.swiglu_backward_(hidden_RF, gate_up_RF, weight_R, offsets)
        return hidden_RF, grad_gate_up, None if weight_R is None else grad_weight
    hidden, grad_gate_up, grad_weight = swiglu_backward_ref(grad_RF, gate_up_RF, weight_R, needs_hidden=True)
    assert hidden is not None
    return hidden, grad_gate_up, grad_weight


def _check(gate_up_RF: Tensor, weight_R: Tensor | None) -> None:
    if gate_up_RF.shape[-1] % 2:
        raise ValueError(f"gate and up must have equal widths; got {gate_up_RF.shape[-1]} columns together")
    if weight_R is not None and (gate_up_RF.dim() != 2 or weight_R.shape != gate_up_RF.shape[:1]):
        raise ValueError(f"weights {tuple(weight_R.shape)} must be one for each row of {tuple(gate_up_RF.shape)}")


def _use_triton(impl: str | None, gate_up: Tensor) -> bool:
    misfit = triton_misfit(gate_up) or (f"it takes [R, 2F], not {gate_up.dim()} axes" if gate_up.dim() != 2 else None)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='ref'")
    return bool(impl == "triton" or (impl is None and gate_up.is_cuda and not misfit))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_R: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate_up, weight_R)
        return swiglu_ref(gate_up, weight_R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        gate_up, weight_R = ctx.saved_tensors
        _, grad_gate_up, grad_weight = swiglu_backward_ref(grad, gate_up, weight_R, needs_hidden=False)
        return grad_gate_up, grad_weight
