"""The linear head's loss and its gradients in one pass over chunks of tokens, in plain torch: the fast path on CPU.

Of a chunk's logits nothing is kept: their gradient is made where they stand and multiplied out while it is in the
cache. The head's product is made once, whatever the vocabulary.

Legend: T packed tokens, n tokens of a chunk, D model width, X vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype


def linear_nll_eager(x_TD: Tensor, weight_XD: Tensor, target_T: Tensor, weight_T: Tensor, rows: int) -> Tensor:
    """As linear_nll_ref, `rows` tokens at a time."""
    if not torch.is_grad_enabled():
        # a function's inputs count as wanting gradients whether they are recorded or not
        x_TD, weight_XD = x_TD.detach(), weight_XD.detach()
    return _LinearNll.apply(x_TD, weight_XD, target_T, weight_T, rows)


class _LinearNll(torch.autograd.Function):
    """Saves the gradients themselves, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx, x, weight, target_T, weight_T, rows: int) -> Tensor:  # type: ignore[override]
        wide = compute_dtype(x.dtype)
        head, counts_T = weight.to(x.dtype), weight_T.to(wide)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if ctx.needs_input_grad[1] else None
        nll_T = torch.empty(x.shape[0], dtype=wide, device=x.device)
        for start in range(0, x.shape[0], rows):
            part = slice(start, min(start + rows, x.shape[0]))
            logits_nX = (x[part] @ head.t()).to(wide)
            lse_n1 = torch.logsumexp(logits_nX, dim=-1, keepdim=True)
            chosen_n1, counts_n1 = target_T[part, None], counts_T[part, None]
            nll_T[part] = (lse_n1 - logits_nX.gather(1, chosen_n1))[:, 0]
            if grad_x is None and grad_weight is None:
                continue
            # d nll / d logits = softmax - onehot(target)
            grad_nX = logits_nX.sub_(lse_n1).exp_().mul_(counts_n1)
            grad_nX = grad_nX.scatter_add_(1, chosen_n1, -counts_n1).to(x.dtype)
            if grad_x is not None:
                torch.mm(grad_nX, head, out=grad_x[part])
            if grad_weight is not None and x.dtype == wide:
                grad_weight.addmm_(grad_nX.t(), x[part])
            elif grad_weight is not None:
                grad_weight += grad_nX.t() @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return (nll_T * counts_T).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            # the scalar in full precision, whatever x's dtype
            grad_x = (grad_x.to(grad.dtype) * grad).to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None
