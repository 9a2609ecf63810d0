"""Rows of an embedding table by indexing: the definition. Gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def embed_ref(token_T: Tensor, weight_XD: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, D] rows in `dtype`."""
    return weight_XD[token_T].to(dtype)
