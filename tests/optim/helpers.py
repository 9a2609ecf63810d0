"""A small set of parameters of every kind, with gradients that are a function of the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pithwood.optim.groups import ParamRole

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (20, 8),
    "layers.0.attention.q_proj.weight": (12, 8),
    "layers.0.mlp.experts.gate_up_proj": (3, 16, 8),
    "layers.0.mlp.experts.down_proj": (3, 8, 8),
    "layers.0.mlp.gate.weight": (3, 8),
    "layers.0.norm.weight": (8,),
    "layers.0.attention.q_proj.bias": (12,),
    "head.weight": (20, 8),
}

ROLES = {
    "embed.weight": ParamRole("embedding"),
    "layers.0.attention.q_proj.weight": ParamRole("matrix"),
    "layers.0.mlp.experts.gate_up_proj": ParamRole("experts", (6, 8, 8)),
    "layers.0.mlp.experts.down_proj": ParamRole("experts"),
    "layers.0.mlp.gate.weight": ParamRole("router"),
    "layers.0.norm.weight": ParamRole("norm"),
    "layers.0.attention.q_proj.bias": ParamRole("bias"),
    "head.weight": ParamRole("head"),
}

Q_PROJ, GATE_UP, NORM = "layers.0.attention.q_proj.weight", "layers.0.mlp.experts.gate_up_proj", "layers.0.norm.weight"


def make_params(device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: torch.nn.Parameter(value.to(device)) for name, value in values.items()}


def set_grads(params: dict[str, Any], step: int, scale: float = 1.0) -> None:
    """Fill `.grad` of every trainable parameter, the same for the same step."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params.values():
        grad = scale * torch.randn(param.shape, generator=generator)
        param.grad = grad.to(param.device) if param.requires_grad else None


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(
            value.detach().reshape(-1).view(torch.uint8), expected[name].detach().reshape(-1).view(torch.uint8)
        ), name
