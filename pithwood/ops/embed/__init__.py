"""Rows of an embedding table by token id.

Legend: T tokens, X vocabulary, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pithwood.ops.checks import check_impl
from pithwood.ops.embed.ref import embed_ref
from pithwood.ops.triton_support import triton_misfit

__all__ = ["embed"]


def embed(token_T: Tensor, weight_XD: Tensor, dtype: torch.dtype, *, impl: str | None = None) -> Tensor:
    """The rows of weight that the tokens name, in `dtype`.

    token_T    [T] int64       ids below X
    weight_XD  [X, D] float    typically the fp32 master weight
    impl       "ref" | "torch" | "triton"   None: "triton" for an fp32 table on CUDA, "torch" elsewhere
    returns    [T, D] dtype
    raises     ValueError on tokens or a table of another shape, or "triton" where it does not fit

    "torch" makes a gradient of the table's size in every backward pass. "triton" adds the tokens' rows to `weight.grad`
    in place, each row of the table by one program and in the order of the tokens, so that results repeat; autograd
    gets None for a leaf, as with `ops/linear.py`.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    if token_T.dim() != 1 or weight_XD.dim() != 2:
        raise ValueError(
            f"embed takes tokens [T] and a table [X, D], got {tuple(token_T.shape)}, {tuple(weight_XD.shape)}"
        )
    misfit = triton_misfit(weight_XD)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    if impl == "triton" or (impl is None and not misfit and weight_XD.is_cuda and weight_XD.dtype == torch.float32):
        from pithwood.ops.embed.triton import embed_triton

        return embed_triton(token_T, weight_XD, dtype)
    if impl == "ref":
        return embed_ref(token_T, weight_XD, dtype)
    return F.embedding(token_T, weight_XD).to(dtype)
