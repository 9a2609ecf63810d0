"""Weighted sum of negative log-probabilities under a linear head: the loss of next-token training.

Legend: T packed tokens, D model width, X vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.linear import adds_in_place
from pithwood.ops.linear_logprob import linear_logprob
from pithwood.ops.linear_nll.ref import linear_nll_ref
from pithwood.ops.triton_support import triton_misfit

__all__ = ["linear_nll"]


def linear_nll(
    x_TD: Tensor, weight_XD: Tensor, target_T: Tensor, weight_T: Tensor, *, impl: str | None = None
) -> Tensor:
    """Sum over tokens of weight * -log softmax(x W^T)[target], a scalar in fp32 (fp64 for fp64 input).

    x_TD       [T, D] float    final hidden states
    weight_XD  [X, D] float    head, typically fp32 masters; used in x's dtype
    target_T   [T] int64       below X; negative for none
    weight_T   [T] fp32        without gradient; a token of weight 0, or without target, contributes exactly zero to
                               value and gradients
    impl       "ref" | "torch" | "triton"   None: "triton" where x is fp16 or bf16 on CUDA and the head fp32, "torch"
                               elsewhere
    returns    scalar, differentiable once in x and the head
    raises     ValueError on shapes that do not fit, or "triton" where it does not fit

    "torch" keeps logits, or computes them again in the backward pass (`linear_logprob`). "triton" knows the weights
    before it begins and so makes the logits' gradient in place of each chunk's logits and multiplies it out at once:
    the forward pass does all three products of the head, the backward pass scales what they gave by its scalar, and
    the head's gradient goes to `weight.grad` as in `ops/linear.py`. Without gradients wanted it only makes the value.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    if x_TD.dim() != 2 or weight_XD.dim() != 2 or x_TD.shape[1] != weight_XD.shape[1]:
        raise ValueError(f"linear_nll needs x [T, D] and W [X, D], got {tuple(x_TD.shape)}, {tuple(weight_XD.shape)}")
    if target_T.shape != x_TD.shape[:1] or weight_T.shape != x_TD.shape[:1]:
        raise ValueError(
            f"x has {x_TD.shape[0]} tokens, but targets are {tuple(target_T.shape)} and weights {tuple(weight_T.shape)}"
        )
    misfit = triton_misfit(x_TD, weight_XD)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    if impl == "triton" or (impl is None and not misfit and adds_in_place(x_TD, weight_XD)):
        from pithwood.ops.linear_nll.triton import linear_nll_triton

        return linear_nll_triton(x_TD, weight_XD, target_T, weight_T)
    weight_T = torch.where(target_T < 0, 0.0, weight_T)
    if impl == "ref":
        return linear_nll_ref(x_TD, weight_XD, target_T, weight_T)
    nll_T = -linear_logprob(x_TD, weight_XD, target_T.clamp(min=0))
    return (nll_T * weight_T).sum()
