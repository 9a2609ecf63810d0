"""Rotary position embedding from given positions (half-split layout, as in the Hugging Face models).

Legend: T packed tokens, H heads, K head dim (even).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of a batch's positions, computed once and shared by all layers."""

    cos_TK: Tensor
    """[T, K] fp32, both halves alike."""
    sin_TK: Tensor

    @staticmethod
    def from_positions(position_T: Tensor, head_dim: int, theta: float) -> Rope:
        """Angles position * theta^(-2i / head_dim) for i < head_dim / 2, in fp32. Su et al. 2021, arXiv 2104.09864."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_T.device) / head_dim
        angle = position_T.float()[:, None] * (1.0 / theta**exponent)[None, :]
        angle = torch.cat([angle, angle], dim=-1)
        return Rope(angle.cos(), angle.sin())

    def apply(self, x_THK: Tensor) -> Tensor:
        """Rotate each head's vector; computed in x's dtype like the reference implementations, returned in it."""
        cos, sin = self.cos_TK.to(x_THK.dtype)[:, None], self.sin_TK.to(x_THK.dtype)[:, None]
        half = x_THK.shape[-1] // 2
        rotated = torch.cat([-x_THK[..., half:], x_THK[..., :half]], dim=-1)
        return x_THK * cos + rotated * sin
