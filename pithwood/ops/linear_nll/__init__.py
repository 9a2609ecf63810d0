"""Weighted sum of negative log-probabilities under a linear head: the loss of next-token training.

Legend: T packed tokens, D model width, X vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.linear import adds_in_place
from pithwood.ops.linear_nll.eager import linear_nll_eager
from pithwood.ops.linear_nll.ref import linear_nll_ref
from pithwood.ops.triton_support import triton_misfit

__all__ = ["chunk_rows", "linear_nll", "workspace_bytes"]

CPU_ROWS = 256
"""Tokens of a chunk on a CPU: few, so that their logits are in the cache, but enough to pay for a pass over the head's
gradient, which every chunk makes."""
GPU_ROWS = 2048
"""Most tokens of a chunk on a GPU: enough for full tiles in all three products (more takes more memory and no less
time)."""
GPU_BYTES = 2 << 30
"""Most bytes of a chunk's logits on a GPU."""


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

    The weights are known before the products begin, so the logits' gradient is made in place of each chunk's logits and
    multiplied out at once: the forward pass does all three products of the head, and the backward pass scales what they
    gave by its scalar. With "triton" the head's gradient is fp32 sums of half-precision products and goes to
    `weight.grad` as in `ops/linear.py`. Without gradients wanted only the value is made.
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

        rows = chunk_rows(weight_XD.shape[0], x_TD.element_size(), x_TD.device)
        return linear_nll_triton(x_TD, weight_XD, target_T, weight_T, rows)
    weight_T = torch.where(target_T < 0, 0.0, weight_T)
    if impl == "ref":
        return linear_nll_ref(x_TD, weight_XD, target_T, weight_T)
    rows = chunk_rows(weight_XD.shape[0], 4, x_TD.device)
    return linear_nll_eager(x_TD, weight_XD, target_T.clamp(min=0), weight_T, rows)


def chunk_rows(vocab: int, element_size: int, device: torch.device) -> int:
    """Tokens of a chunk for a vocabulary of this size, with logits of element_size bytes."""
    if device.type == "cpu":
        return CPU_ROWS
    return max(min(GPU_ROWS, GPU_BYTES // (vocab * element_size) // 128 * 128), 1)


def workspace_bytes(num_tokens: int, vocab: int, dim: int, element_size: int, device: torch.device) -> tuple[int, int]:
    """(saved, alive): bytes that `linear_nll` keeps until its backward pass is over, and needs besides in its forward
    pass, for activations of element_size bytes: the gradients of x and (fp32) of the head; a chunk's logits.
    """
    logits_size = element_size if device.type == "cuda" and element_size == 2 else 4
    rows = min(num_tokens, chunk_rows(vocab, logits_size, device))
    return num_tokens * dim * element_size + 4 * vocab * dim, rows * vocab * logits_size
