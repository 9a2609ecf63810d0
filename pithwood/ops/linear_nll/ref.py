"""Weighted sum of negative log-probabilities with all logits in view: the definition. Gradients by autograd.

Legend: T packed tokens, D model width, X vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.checks import compute_dtype


def linear_nll_ref(x_TD: Tensor, weight_XD: Tensor, target_T: Tensor, weight_T: Tensor) -> Tensor:
    """The product in x's dtype, everything after it in fp32 (fp64 for fp64); negative targets have weight 0."""
    logits_TX = (x_TD @ weight_XD.to(x_TD.dtype).t()).to(compute_dtype(x_TD.dtype))
    logprob_T = torch.log_softmax(logits_TX, dim=-1).gather(1, target_T.clamp(min=0)[:, None])[:, 0]
    return -(logprob_T * weight_T).sum()
