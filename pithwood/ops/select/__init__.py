"""Which key blocks each query attends to, and the differentiable scores of what was selected.

Legend: T packed tokens, U units (blocks) of all documents, R selection rows, S selections per row, k selected per row,
H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import (
    check_choice,
    check_heads,
    check_impl,
    check_packed,
    check_packing,
    check_positive,
    check_summaries,
    check_tensor,
    check_with_packing,
)
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.select.means import packed_summary, rounded_means, routing_queries
from pithwood.ops.select.ref import select_ref
from pithwood.ops.select.scores import scores_at
from pithwood.ops.select.topk import select_topk
from pithwood.ops.triton_support import triton_misfit

__all__ = ["scores_at", "select"]


@without_autocast
@torch.no_grad()
def select(
    q_THK: Tensor,
    s_UGK: Tensor,
    packing: Packing,
    top_k: int,
    *,
    block_size: int,
    forced: str | None = None,
    tie: str = "later",
    route_per: str = "q_head",
    mean_dtype: str = "input",
    unit_start_N: Tensor | None = None,
    impl: str | None = None,
) -> Selection:
    """Pick the `top_k` key blocks each query attends to, scored by query . block summary, without gradient.

    q_THK       [T_q, H, K] float       queries as attention sees them; their dtype is taken for the keys' dtype
    s_UGK       [U, G, K] float         `summarise(k, packing, block_size)`, best kept in fp32; H a multiple of G
    top_k       >= 1                    counts the own block: 1 is block-local attention
    forced      "own" | "none"          whether the block that holds the query's key position is always chosen;
                                        None: "own" if packing.causal, else "none"
    tie         "later" | "earlier"     which of equally scored blocks goes first
    route_per   "q_head" | "kv_group"   every query head selects alone (S = H), or the heads of a KV head share one
                                        selection by their mean score (S = G)
    mean_dtype  "input" | "fp32" | "centered"   round the means to the key dtype; keep them; or subtract the mean of the
                                        document's block 0 first and then round. The subtracted vector is common to all
                                        blocks of a document, so exact ranking is invariant and rounding hurts less
    unit_start_N [N] int                row of s at which the summaries of each document's blocks begin, where they lie
                                        in a cache; those of complete blocks suffice. Causal packings only. Rows that s
                                        lacks are refused where no kernel runs: one reads no offsets. None: packed
    impl        "ref" | "torch" | "triton"   None: "triton" where it fits on CUDA (fp32, fp16 and bf16, K <= 256, top_k
                                        <= 64), "torch" elsewhere
    returns     Selection               ids [T_q, S, top_k], unit = block_size, row_size = 1
    raises      ValueError on unknown switches, top_k < 1, H % G, shapes that do not fit the packing (rows of s where
                                        the host knows how many keys it has), "triton" where it does not fit

    Causal: candidates are the blocks strictly before the query's own, which are complete. Otherwise all blocks of the
    document are. With more keys than queries the own block is that of the query's key position; queries before the
    first key select nothing. Scores are fp32 sums of fp32 products (fp64 for fp64). NaN scores are never selected, +inf
    comes first, -inf last. Ties are exact: scores become integers that order like the floats, and the block number
    breaks ties. Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, section
    2.2.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    check_packing(packing)
    forced = ("own" if packing.causal else "none") if forced is None else forced
    check_choice("forced", forced, ("own", "none"))
    check_choice("tie", tie, ("later", "earlier"))
    check_choice("route_per", route_per, ("q_head", "kv_group"))
    check_choice("mean_dtype", mean_dtype, ("input", "fp32", "centered"))
    check_positive("top_k", top_k)
    check_positive("block_size", block_size)
    check_packed("q", q_THK, packing.num_queries)
    check_packed("s", s_UGK)
    check_heads(q_THK.shape[1], s_UGK.shape[1])
    if q_THK.shape[2] != s_UGK.shape[2]:
        raise ValueError(f"q has head dim {q_THK.shape[2]} but the summaries have {s_UGK.shape[2]}; they must agree")
    check_with_packing("q", q_THK, packing)
    check_with_packing("s", s_UGK, packing)
    if unit_start_N is None:
        check_summaries(s_UGK, packing, block_size)
    else:
        check_unit_start(unit_start_N, packing)
    own = forced == "own"
    misfit = triton_misfit(q_THK, s_UGK) or select_misfit(q_THK.shape[2], top_k)
    if impl == "triton" and misfit:
        raise ValueError(f"impl='triton' does not fit here: {misfit}; use impl='torch'")
    by_kernel = impl == "triton" or (impl is None and not misfit and q_THK.is_cuda)
    if by_kernel:
        from pithwood.ops.offsets_triton import key_block_offsets
        from pithwood.ops.select.few_triton import decodes_few, select_few
        from pithwood.ops.select.short_triton import select_short, selects_short

        plain = packing.causal and own and route_per == "q_head"
        cu_q, cu_k, max_q, max_k = packing.cu_q, packing.cu_k, packing.max_q, packing.max_k
        arguments = (max_k, top_k, block_size, tie, mean_dtype)
        decodes = plain and not packing.self_attention
        if decodes and decodes_few(packing, q_THK.shape[1], s_UGK.shape[0], top_k, block_size):
            ids_TSk, count_TS = select_few(q_THK, s_UGK, unit_start_N, cu_q, cu_k, max_q, *arguments)
            return Selection(ids_TSk, count_TS, block_size, 1, own)
        if plain and selects_short(packing, s_UGK.shape[0], top_k, block_size, unit_start_N is not None):
            start_N = key_block_offsets(packing, block_size) if unit_start_N is None else unit_start_N
            ids_TSk, count_TS = select_short(q_THK, s_UGK, start_N, cu_q, cu_k, *arguments)
            return Selection(ids_TSk, count_TS, block_size, 1, own)
    if unit_start_N is not None:
        if not by_kernel:
            check_unit_rows(unit_start_N, packing, block_size, s_UGK.shape[0])
        s_UGK = packed_summary(s_UGK, packing, block_size, unit_start_N)
    if by_kernel:
        from pithwood.ops.select.triton import select_blocks

        ids_TSk, count_TS = select_blocks(
            q_THK,
            s_UGK,
            packing.cu_q,
            packing.cu_k,
            packing.causal,
            top_k,
            block_size,
            own,
            tie,
            route_per == "kv_group",
            mean_dtype,
        )
        return Selection(ids_TSk, count_TS, block_size, 1, own)
    means = rounded_means(s_UGK, packing, block_size, mean_dtype, q_THK.dtype)
    queries = routing_queries(q_THK, s_UGK.shape[1], route_per)
    run = select_ref if impl == "ref" else select_topk
    ids_TSk = run(queries, means, packing, top_k, block_size, own, tie)
    return Selection(ids_TSk, (ids_TSk >= 0).sum(-1, dtype=torch.int32), block_size, 1, own)


def check_unit_start(unit_start_N: Tensor, packing: Packing) -> None:
    check_tensor("unit_start", unit_start_N)
    if not packing.causal:
        raise ValueError("unit_start is for complete blocks, as causal queries score them; pack the summaries")
    if unit_start_N.shape != (packing.num_docs,) or unit_start_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"unit_start must hold one row number per document, [{packing.num_docs}] int32 or int64, got "
            f"{tuple(unit_start_N.shape)} {unit_start_N.dtype}"
        )


def check_unit_rows(unit_start_N: Tensor, packing: Packing, block_size: int, num_rows: int) -> None:
    """ValueError unless all complete blocks have their rows; reads offsets on the host, as plain torch does."""
    blocks_N = packing.cu_k.diff().div(block_size, rounding_mode="floor").tolist()
    for doc, (start, blocks) in enumerate(zip(unit_start_N.tolist(), blocks_N, strict=True)):
        if blocks > 0 and not 0 <= start <= num_rows - blocks:
            raise ValueError(
                f"unit_start puts the {blocks} complete blocks of document {doc} at rows {start} to "
                f"{start + blocks - 1}, but there are {num_rows} summaries"
            )


def select_misfit(head_dim: int, top_k: int) -> str | None:
    """Why the kernel cannot take these sizes, or None if it can: it keeps a row's list in registers."""
    if head_dim > 256:
        return f"the kernel takes head dims up to 256, got {head_dim}"
    return f"the kernel takes top_k up to 64, got {top_k}" if top_k > 64 else None
