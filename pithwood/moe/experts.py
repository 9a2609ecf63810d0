"""The experts of a layer as stacked weights, applied to rows sorted by expert; and the dense SwiGLU feed-forward.

Legend: T packed tokens, R rows sorted by expert, D model width, E experts, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithwood.ops.grouped_mm import grouped_mm
from pithwood.ops.linear import linear
from pithwood.ops.swiglu import swiglu


class GroupedExperts(nn.Module):
    """E SwiGLU experts. Rows 0..F of gate_up_proj[e] are the gate, F..2F the up projection, as in transformers 5."""

    def __init__(self, num_experts: int, model_dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, model_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, model_dim, expert_dim))

    def forward(self, rows_RD: Tensor, offsets: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)) with each row's own expert.

        rows_RD   [R, D] any float; weights are cast to its dtype
        offsets   [E + 1] int32, expert e owns rows offsets[e]:offsets[e + 1]
        returns   [R, D]; rows from offsets[-1] on are unspecified
        """
        gate_up_RF = grouped_mm(rows_RD, self.gate_up_proj.to(rows_RD.dtype), offsets)
        return grouped_mm(swiglu(gate_up_RF), self.down_proj.to(rows_RD.dtype), offsets)

    def optimizer_shapes(self) -> dict[str, tuple[int, int, int] | None]:
        """Muon's view: each expert's gate, up and down projection is a matrix of its own."""
        num_experts, model_dim, expert_dim = self.down_proj.shape
        return {
            "gate_up_proj": (2 * num_experts, expert_dim, model_dim),
            "down_proj": (num_experts, model_dim, expert_dim),
        }


class DenseMLP(nn.Module):
    """SwiGLU feed-forward for dense layers and shared experts."""

    def __init__(self, model_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model_dim, hidden_dim, bias=False, device="meta")
        self.up_proj = nn.Linear(model_dim, hidden_dim, bias=False, device="meta")
        self.down_proj = nn.Linear(hidden_dim, model_dim, bias=False, device="meta")
        self.to_empty(device=torch.get_default_device())

    def forward(self, x_TD: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)): [T, D] -> [T, D] in the dtype of x."""
        hidden_TF = F.silu(linear(x_TD, self.gate_proj.weight)) * linear(x_TD, self.up_proj.weight)
        return linear(hidden_TF, self.down_proj.weight)
