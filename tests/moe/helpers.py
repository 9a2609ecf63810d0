"""Contexts, filled layers and the slow, obvious form of a mixture of experts that the tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithwood.attention.base import LayerContext
from pithwood.losses import LossLedger
from pithwood.moe import MoEConfig, MoELayer
from pithwood.moe.dispatch import Dispatched, plan_tokens, planned_rows
from pithwood.ops.packing import Packing


def context(lengths: Sequence[int], tokens: int | None = None, **fields: Any) -> LayerContext:
    """A training context over documents of these lengths; `tokens` gives it a ledger normalised by that count."""
    ledger = None if tokens is None else LossLedger({"tokens": float(tokens)})
    return LayerContext(Packing.from_lengths(lengths), None, ledger=ledger, **fields)


def filled(module: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Give every parameter normal values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def make_layer(model_dim: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> MoELayer:
    layer = MoELayer(MoEConfig(**fields), model_dim)
    filled(layer, seed)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    return layer


def dispatched(x_TD: Tensor, ids_Tk: Tensor, weight_Tk: Tensor, num_experts: int) -> Dispatched:
    """Plan and rows in one."""
    return planned_rows(x_TD, weight_Tk, plan_tokens(x_TD, ids_Tk, num_experts))


def dense_moe(x_TD: Tensor, ids_Tk: Tensor, weight_Tk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token and one slot at a time, by the definition."""
    rows = []
    for t in range(x_TD.shape[0]):
        total = torch.zeros_like(x_TD[t])
        for j in range(ids_Tk.shape[1]):
            e = int(ids_Tk[t, j])
            if e >= 0:
                gate, up = (gate_up[e] @ x_TD[t]).chunk(2)
                total = total + weight_Tk[t, j] * (down[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)
