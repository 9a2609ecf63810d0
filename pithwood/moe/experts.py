"""The experts of a layer as stacked weights, applied to rows sorted by expert; and the dense SwiGLU feed-forward.

Legend: T packed tokens, R rows sorted by expert, D model width, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithwood.ops.grouped_mm import grouped_grad_weight, grouped_mm
from pithwood.ops.linear import linear
from pithwood.ops.master import add_gradient, in_dtype
from pithwood.ops.permute import RowPlan, gather_rows
from pithwood.ops.swiglu import swiglu, swiglu_backward
from pithwood.ops.unread import unread_like


class GroupedExperts(nn.Module):
    """E SwiGLU experts. Rows 0..F of gate_up_proj[e] are the gate, F..2F the up projection, as in transformers 5."""

    def __init__(self, num_experts: int, model_dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, model_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, model_dim, expert_dim))

    def forward(
        self,
        rows_RD: Tensor,
        offsets: Tensor,
        weight_R: Tensor,
        source: tuple[Tensor, RowPlan] | None = None,
        unread: bool = False,
    ) -> Tensor:
        """down(weight * silu(gate(x)) * up(x)) with each row's own expert.

        rows_RD    [R, D] any float; weights are used in its dtype
        offsets    [E + 1] int32, expert e owns rows offsets[e]:offsets[e + 1]
        weight_R   [R] fp32, the router's weight of each row
        source     (x_TD, plan) that the rows were gathered from: the backward pass gathers them again, and they need
                   not be kept; None keeps them
        unread     nobody reads the value, its graph alone is wanted: gate and up are computed, the rest is left out and
                   zeros come; a compiled call computes it in any case
        returns    [R, D]; rows from offsets[-1] on are unspecified

        Kept for the backward pass are gate_up [R, 2F], the weights and the rows or their source. Gradients of the
        stacked weights are added to `.grad` in fp32 by the product that computes them.
        """
        if torch.compiler.is_compiling():
            gate_up_RF = grouped_mm(rows_RD, self.gate_up_proj.to(rows_RD.dtype), offsets)
            return grouped_mm(swiglu(gate_up_RF, weight_R, offsets), self.down_proj.to(rows_RD.dtype), offsets)
        x_TD, plan = (None, None) if source is None else source
        x_TD = None if x_TD is None else x_TD.detach()
        return _Experts.apply(rows_RD, weight_R, self.gate_up_proj, self.down_proj, offsets, x_TD, plan, unread)

    def optimizer_shapes(self) -> dict[str, tuple[int, int, int] | None]:
        """Muon's view: each expert's gate, up and down projection is a matrix of its own."""
        num_experts, model_dim, expert_dim = self.down_proj.shape
        return {
            "gate_up_proj": (2 * num_experts, expert_dim, model_dim),
            "down_proj": (num_experts, model_dim, expert_dim),
        }


class _Experts(torch.autograd.Function):
    """The two products and what lies between, so that neither the rows between them nor a weight's gradient in a narrow
    dtype ever exist longer than a product takes.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows_RD: Tensor,
        weight_R: Tensor,
        gate_up: Tensor,
        down: Tensor,
        offsets: Tensor,
        x_TD: Tensor | None,
        plan: RowPlan | None,
        unread: bool,
    ) -> Tensor:
        gate_up_RF = grouped_mm(rows_RD, in_dtype(gate_up, rows_RD.dtype), offsets)
        ctx.plan = plan
        # Not saved as tensors are: recomputation hands those back as others, without their copies and gradients.
        ctx.weights = gate_up, down
        ctx.save_for_backward(rows_RD if plan is None else x_TD, weight_R, offsets, gate_up_RF)
        if unread:
            return unread_like(rows_RD, *rows_RD.shape)
        hidden_RF = swiglu(gate_up_RF, weight_R, offsets)
        return grouped_mm(hidden_RF, in_dtype(down, rows_RD.dtype), offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RD: Tensor):  # type: ignore[override]
        kept, weight_R, offsets, gate_up_RF = ctx.saved_tensors
        gate_up, down = ctx.weights
        needs_rows, _, needs_gate_up, needs_down = ctx.needs_input_grad[:4]
        dtype = grad_RD.dtype
        # w^T in place of w: the product of `grouped_mm` is with its transpose.
        grad_hidden_RF = grouped_mm(grad_RD, in_dtype(down, dtype).transpose(1, 2), offsets)
        hidden_RF, grad_gate_up_RF, grad_weight_R = swiglu_backward(grad_hidden_RF, gate_up_RF, weight_R, offsets)
        grad_down = _weight_gradient(down, grad_RD, hidden_RF, None, offsets) if needs_down else None
        del grad_hidden_RF, hidden_RF
        grad_gate_up = grad_rows_RD = None
        if needs_gate_up:
            grad_gate_up = _weight_gradient(gate_up, grad_gate_up_RF, kept, ctx.plan, offsets)
        if needs_rows:
            grad_rows_RD = grouped_mm(grad_gate_up_RF, in_dtype(gate_up, dtype).transpose(1, 2), offsets)
        return grad_rows_RD, grad_weight_R, grad_gate_up, grad_down, None, None, None, None


def _weight_gradient(
    weight: Tensor, grad_RX: Tensor, kept: Tensor, plan: RowPlan | None, offsets: Tensor
) -> Tensor | None:
    """The gradient of a stacked weight, or None where it was added to `weight.grad` or will be.

    kept  the rows [R, D] themselves, or with a plan the tokens [T, D] that they are gathered from for the product
    """

    def product(total: Tensor, add: bool) -> Tensor:
        rows_RD = kept if plan is None else gather_rows(kept, plan)
        return grouped_grad_weight(grad_RX, rows_RD, offsets, total, add=add)

    if accumulates(weight) and add_gradient(weight, product):
        return None
    return product(torch.empty_like(weight), False)


def accumulates(weight: Tensor) -> bool:
    """Whether the backward pass that runs adds to `weight.grad`; `torch.autograd.grad` hands gradients out instead."""
    if not (weight.is_leaf and weight.requires_grad):
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:  # the engine's answer for a leaf whose gradient is asked for
        return False


class DenseMLP(nn.Module):
    """SwiGLU feed-forward for dense layers and shared experts."""

    def __init__(self, model_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model_dim, hidden_dim, bias=False, device="meta")
        self.up_proj = nn.Linear(model_dim, hidden_dim, bias=False, device="meta")
        self.down_proj = nn.Linear(hidden_dim, model_dim, bias=False, device="meta")
        device = torch.get_default_device()
        if device.type != "meta":  # nothing would change, but torch imports sympy for it
            self.to_empty(device=device)

    def forward(self, x_TD: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)): [T, D] -> [T, D] in the dtype of x."""
        hidden_TF = F.silu(linear(x_TD, self.gate_proj.weight)) * linear(x_TD, self.up_proj.weight)
        return linear(hidden_TF, self.down_proj.weight)
