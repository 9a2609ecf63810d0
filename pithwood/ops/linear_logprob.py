"""Log-probability of one target per token under a linear head, in chunks, so that all logits need not exist at once.

Legend: T packed tokens, D model width, X vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype
from pithwood.ops.linear import add_product, adds_in_place
from pithwood.ops.triton_support import triton_misfit

CHUNK_BYTES = 64 << 20
"""fp32 logits alive at a time when they are not kept, on a CPU."""
GPU_CHUNK_BYTES = 1 << 30
"""The same on a GPU, whose products need a thousand rows and more to be fast."""
KEEP_BYTES = 256 << 20
"""Below this size the logits of all chunks are kept for the backward pass, which then needs no second head product."""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_XD: Tensor, target_T: Tensor) -> Tensor:  # type: ignore[override]
        num_tokens, vocab = x_TD.shape[0], weight_XD.shape[0]
        rows = max(1, (GPU_CHUNK_BYTES if x_TD.is_cuda else CHUNK_BYTES) // (4 * vocab))
        keep = 4 * num_tokens * vocab <= KEEP_BYTES and any(ctx.needs_input_grad[:2])
        weight = weight_XD.to(x_TD.dtype)
        kept = []
        logprob_T = torch.empty(num_tokens, dtype=compute_dtype(x_TD.dtype), device=x_TD.device)
        lse_T = torch.empty_like(logprob_T)
        for start in range(0, num_tokens, rows):
            part = slice(start, min(start + rows, num_tokens))
            logits = (x_TD[part] @ weight.t()).to(logprob_T.dtype)
            lse_T[part] = torch.logsumexp(logits, dim=-1)
            logprob_T[part] = logits.gather(1, target_T[part, None])[:, 0] - lse_T[part]
            if keep:
                kept.append(logits)
        ctx.save_for_backward(x_TD, weight_XD, target_T, lse_T, *kept)
        ctx.rows = rows
        return logprob_T

    @staticmethod
    def backward(ctx, grad_T: Tensor):  # type: ignore[override]
        x_TD, weight_XD, target_T, lse_T, *kept = ctx.saved_tensors
        weight = weight_XD.to(x_TD.dtype)
        grad_x = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros(weight_XD.shape, dtype=lse_T.dtype, device=x_TD.device) if ctx.needs_input_grad[1] else None
        )
        for chunk, start in enumerate(range(0, x_TD.shape[0], ctx.rows)):
            part = slice(start, min(start + ctx.rows, x_TD.shape[0]))
            logits = kept[chunk] if kept else (x_TD[part] @ weight.t()).to(lse_T.dtype)
            # d logprob / d logits = onehot(target) - softmax; out of place, since a second backward may need the logits
            grad = torch.exp(logits - lse_T[part, None]).mul_(-grad_T[part, None])
            grad.scatter_add_(1, target_T[part, None], grad_T[part, None])
            grad = grad.to(x_TD.dtype)
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[part])
            if grad_weight is not None:
                if x_TD.dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.t(), x_TD[part])
                elif x_TD.is_cuda:
                    add_product(grad_weight, grad, x_TD[part], True)
                else:
                    grad_weight += (grad.t() @ x_TD[part]).to(grad_weight.dtype)
        return grad_x, None if grad_weight is None else grad_weight.to(weight_XD.dtype), None


def linear_logprob(x_TD: Tensor, weight_XD: Tensor, target_T: Tensor) -> Tensor:
    """[T] fp32 (fp64 for fp64 input): log softmax(x W^T)[target] for every token.

    x_TD       [T, D] any float dtype; the product runs in it, softmax and sums in fp32
    weight_XD  [X, D] master weights, cast to x's dtype
    target_T   [T] int64
    Logits are kept for the backward pass up to KEEP_BYTES and recomputed chunk by chunk above. Where no gradient is
    wanted, half precision on CUDA is read by the kernel of `ops/linear_nll/`.
    """
    wanted = torch.is_grad_enabled() and (x_TD.requires_grad or weight_XD.requires_grad)
    if not wanted and adds_in_place(x_TD, weight_XD) and triton_misfit(x_TD, weight_XD) is None:
        from pithwood.ops.linear_nll import chunk_rows
        from pithwood.ops.linear_nll.triton import nll_rows_triton

        rows = chunk_rows(weight_XD.shape[0], x_TD.element_size(), x_TD.device)
        return -nll_rows_triton(x_TD, weight_XD, target_T, rows)
    return _LinearLogprob.apply(x_TD, weight_XD, target_T)
