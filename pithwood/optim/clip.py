"""The gradient norm of a whole step and the scale that clips it, without leaving the device.

A step whose norm is not finite gets the scale 0, the sign to skip it: see `Optimizer.step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.norms import tensor_norms
from pithwood.parallel.mesh import Group
from pithwood.parallel.totals import norm_over


def global_norm(grads: list[Tensor]) -> Tensor:
    """Return the 2-norm over all gradients as an fp32 scalar on their device; no host sync.

    grads   non-empty list of tensors of any shape and floating dtype, one device
    raises  ValueError if the list is empty

    Squares are added in fp32 whatever the gradients' dtype. NaN or inf anywhere gives a non-finite norm.
    """
    if not grads:
        raise ValueError(
            "global_norm needs at least one gradient: run backward first, and leave some parameter trainable"
        )
    return torch.linalg.vector_norm(tensor_norms(grads))


def global_norm_over(world: Group, counted: list[Tensor], others: list[Tensor], device: torch.device) -> Tensor:
    """Return the 2-norm over all processes' gradients as an fp32 scalar, the same bits in each of them; no host sync.

    world    every process takes part, also one without gradients
    counted  this process's gradients whose elements no other process counts
    others   gradients that another process counts: nothing of them enters the norm unless it is not finite, so that no
             process goes on with a gradient that others lack

    One sum over all processes (`parallel.totals.norm_over`), not one per group.
    """
    return norm_over(
        world, tensor_norms(counted) if counted else None, tensor_norms(others) if others else None, device
    )


def clip_scale(norm: Tensor, max_norm: float | None) -> Tensor:
    """Return the fp32 scalar, at most 1, that brings gradients of this norm down to `max_norm`; 0 if the norm is not
    finite.

    max_norm  None for no clipping: the scale is 1, or 0 if the norm is not finite

    The same formula as torch.nn.utils.clip_grad_norm_, max_norm / (norm + 1e-6) clamped to 1. No host sync.
    """
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm={max_norm} must be above 0; give None for no clipping")
    norm = norm.float()
    scale = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), scale, torch.zeros_like(scale))
