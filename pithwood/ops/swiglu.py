"""silu(gate) * up, with a backward pass that saves its inputs only. Shazeer 2020, arXiv 2002.05202.

Legend: R rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up_RF: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [..., 2F] whose first F columns are the gate; returns [..., F] in the same dtype."""
    if gate_up_RF.shape[-1] % 2:
        raise ValueError(f"gate and up must have equal widths; got {gate_up_RF.shape[-1]} columns together")
    if torch.compiler.is_compiling():
        gate, up = gate_up_RF.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up_RF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        # Both halves are written where they belong; autograd of chunk would allocate and concatenate.
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up
