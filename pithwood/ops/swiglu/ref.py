"""weight * silu(gate) * up and its backward pass in plain torch. Shazeer 2020, arXiv 2002.05202.

Legend: R rows, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_ref(gate_up_RF: Tensor, weight_R: Tensor | None) -> Tensor:
    """[..., F]: silu(gate) * up (* weight), fp32 inside."""
    gate, up = _wide(gate_up_RF).chunk(2, dim=-1)
    weight = None if weight_R is None else weight_R.to(gate.dtype)[:, None]
    hidden = F.silu(gate)
    if torch.is_grad_enabled():  # traced by a compiler, whose business buffers are
        hidden = hidden * up if weight is None else hidden * up * weight
    else:
        hidden = hidden.mul_(up) if weight is None else hidden.mul_(up).mul_(weight)
    return hidden.to(gate_up_RF.dtype)


def swiglu_backward_ref(
    grad_RF: Tensor, gate_up_RF: Tensor, weight_R: Tensor | None, needs_hidden: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(the forward's result if asked, gradient of gate_up, gradient of the weight if there is one)."""
    gate, up = _wide(gate_up_RF).chunk(2, dim=-1)
    grad = _wide(grad_RF)
    silu = F.silu(gate)
    # Both halves are written where they belong; autograd of chunk would allocate and concatenate.
    grad_gate_up = torch.empty_like(gate_up_RF, dtype=gate.dtype)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    grad_weight = hidden = None
    if weight_R is not None:
        weight = weight_R.to(gate.dtype)[:, None]
        hidden = silu * up
        grad_weight = torch.linalg.vecdot(hidden, grad).to(weight_R.dtype)
        grad = grad * weight
        hidden = hidden.mul_(weight) if needs_hidden else None
    elif needs_hidden:
        hidden = silu * up
    torch.mul(silu, grad, out=grad_up)
    # With a weight, grad is this function's own.
    grad = grad * up if weight_R is None else grad.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad_gate)
    dtype = gate_up_RF.dtype
    return None if hidden is None else hidden.to(dtype), grad_gate_up.to(dtype), grad_weight


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
