"""2-norms of many tensors at once, in fp32, without leaving the device."""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.triton_support import INSTALLED

LARGE = 1 << 20
"""Elements from which on a tensor on a GPU gets a launch of its own; smaller ones share one."""


@torch.no_grad()
def tensor_norms(tensors: list[Tensor]) -> Tensor:
    """[len(tensors)] fp32: the 2-norm of each tensor; squares are added in fp32 whatever the dtype. No host sync.

    tensors  non-empty, any shapes and floating dtypes, one device
    """
    large = {
        index: tensor
        for index, tensor in enumerate(tensors)
        if tensor.is_cuda and INSTALLED and tensor.numel() >= LARGE and tensor.is_contiguous()
    }
    small = [index for index in range(len(tensors)) if index not in large]
    norms: list[Tensor] = [tensors[0]] * len(tensors)
    if small:
        found = torch._foreach_norm([tensors[index] for index in small], 2, dtype=torch.float32)
        for index, norm in zip(small, found, strict=True):
            norms[index] = norm
    if large:
        from pithwood.ops.norms_triton import large_norms

        for index, norm in zip(large, large_norms(list(large.values())).unbind(), strict=True):
            norms[index] = norm
    return torch.stack(norms)
