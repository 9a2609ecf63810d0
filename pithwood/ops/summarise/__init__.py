"""Block summaries of keys: what a router compares a query with.

Legend: T packed tokens, U units (blocks) of all documents, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import (
    check_choice,
    check_impl,
    check_packed,
    check_packing,
    check_positive,
    check_with_packing,
)
from pithwood.ops.packing import Packing
from pithwood.ops.summarise.ref import summarise_ref
from pithwood.ops.summarise.segments import summarise_segments
from pithwood.ops.triton_support import triton_misfit


@without_autocast
@torch.no_grad()
def summarise(
    k_TGK: Tensor,
    packing: Packing,
    block_size: int,
    how: str = "mean",
    dtype: torch.dtype = torch.float32,
    *,
    impl: str | None = None,
) -> Tensor:
    """Return one summary per key block; blocks restart at every document.

    k_TGK       [T_k, G, K] float     keys as attention sees them (after RoPE, key convolution and qk-norm)
    how         "mean"                mean over the block's real length, accumulated in fp32 (fp64 for fp64 keys)
    dtype                             dtype of the result; fp32 keeps the mean exact enough for any later rounding
    impl        "ref" | "torch" | "triton"   None: "triton" for fp32, fp16 and bf16 keys on CUDA, "torch" elsewhere
    returns     [U, G, K] dtype       U = packing.num_units_bound(T_k, block_size), rows beyond the last block are zero;
                                      detached: routing has no gradient
    raises      ValueError on unknown `how` or `impl`, block_size < 1, keys that are not [T_k, G, K], or "triton" where
                                      it does not fit

    O(T) time and memory. Lu et al. 2025, arXiv 2502.13189, section 2.2.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    check_choice("how", how, ("mean",))
    check_positive("block_size", block_size)
    check_packing(packing)
    check_packed("k", k_TGK, packing.num_keys)
    check_with_packing("k", k_TGK, packing)
    misfit = triton_misfit(k_TGK)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    k_TGK = k_TGK.detach()
    if impl == "triton" or (impl is None and not misfit and k_TGK.is_cuda):
        from pithwood.ops.summarise.triton import summarise_triton

        return summarise_triton(k_TGK, packing, block_size).to(dtype)
    run = summarise_ref if impl == "ref" else summarise_segments
    return run(k_TGK, packing, block_size).to(dtype)
