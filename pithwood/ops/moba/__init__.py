"""Mixture of block attention on plain tensors, for people who want only the op.

Legend: B batch, T tokens (packed, or per sequence), N documents, H query heads, G KV heads, K query/key head dim,
V value head dim.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from pithwood.ops.attend import attend
from pithwood.ops.checks import check_devices, check_heads, check_impl, check_positive, check_tensor
from pithwood.ops.packing import Packing
from pithwood.ops.select import select
from pithwood.ops.summarise import summarise

__all__ = ["moba_attention"]


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    topk_includes_current: bool = True,
    tie: str = "later",
    mean_dtype: str = "centered",
    route_per: str = "q_head",
    causal: bool = True,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query attends to its own key block and to the best scored earlier ones, `top_k` blocks together.

    q               [T_q, H, K] packed, or [B, T_q, H, K]       k [.., G, K], v [.., G, V] alike; H a multiple of G
    block_size      keys per block; blocks restart at every document
    top_k           counts the query's own block (1: block-local attention); topk_includes_current=False adds one
    cu_seqlens      [N + 1] int     offsets of packed documents, from 0 to T_q; None: one document, and T_k >= T_q if
                                    causal. Not with 4-D input
    cu_seqlens_k    [N + 1] int     offsets of the keys if they differ; queries align with a document's last keys
    tie, mean_dtype, route_per      as in `pithwood.ops.select`
    causal          False: all blocks of the document are candidates and the own block is not forced
    softmax_scale   None: K ** -0.5
    return_lse      also return the log-sum [.., T_q, H] in fp32
    deterministic   the backward repeats bit for bit; slower with "triton", the others always do. None: where
                    torch.use_deterministic_algorithms is on
    impl            "ref" | "torch" | "triton"; None: for each step "triton" where it fits on CUDA, "torch" elsewhere
    returns         o shaped like q with V in place of K, or (o, lse)
    raises          ValueError on shapes, devices, offsets or switches that do not fit

    Gradients flow to q, k, v through the selected blocks only; the choice itself has none.
    Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189.
    """
    check_impl(impl, ("ref", "torch", "triton"))
    check_positive("top_k", top_k)
    check_positive("block_size", block_size)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    batch_shape = q.shape[:-2]
    if q.dim() == 4:
        if cu_seqlens is not None or cu_seqlens_k is not None:
            raise ValueError("cu_seqlens goes with packed 3-D inputs [T, H, K]; drop it or pack the batch")
        if k.dim() != 4 or v.dim() != 4 or not q.shape[0] == k.shape[0] == v.shape[0]:
            raise ValueError(f"q, k, v must share the batch, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
        _check_lengths(q.shape[1], k.shape[1], causal)
        keys = None if k.shape[1] == q.shape[1] else k.shape[1]
        packing = _uniform_packing(q.shape[0], q.shape[1], keys, causal, q.device, torch.is_inference_mode_enabled())
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    elif q.dim() == 3 and k.dim() == 3 and v.dim() == 3:
        packing = _packing(q, k, cu_seqlens, cu_seqlens_k, causal)
    else:
        raise ValueError(
            f"q, k, v must be [T, heads, dim] or [B, T, heads, dim], got {q.dim()}, {k.dim()}, {v.dim()} dims"
        )
    check_heads(q.shape[1], k.shape[1])
    check_devices(q, k, v, packing.cu_q)
    top_k = top_k if topk_includes_current or not causal else top_k + 1
    summary = summarise(k, packing, block_size, impl=impl)
    selection = select(
        q,
        summary,
        packing,
        top_k,
        block_size=block_size,
        tie=tie,
        route_per=route_per,
        mean_dtype=mean_dtype,
        impl=impl,
    )
    o, lse = attend(q, k, v, packing, selection, softmax_scale, deterministic=deterministic, impl=impl)
    o, lse = o.view(*batch_shape, *o.shape[1:]), lse.view(*batch_shape, lse.shape[1])
    return (o, lse) if return_lse else o


@lru_cache(maxsize=4)
def _uniform_packing(
    batch: int, length: int, key_length: int | None, causal: bool, device: torch.device, inference: bool
) -> Packing:
    """The packing of a batch of equal sequences, kept for calls of the same shape (apart by inference mode, whose
    tensors cannot be saved for a backward pass)."""
    keys = None if key_length is None else [key_length] * batch
    return Packing.from_lengths([length] * batch, keys, causal=causal, device=device)


def _check_lengths(num_queries: int, num_keys: int, causal: bool) -> None:
    """ValueError unless the queries of a sequence can be the last of its keys' tokens."""
    if causal and num_keys < num_queries:
        raise ValueError(
            f"q has {num_queries} tokens and k has {num_keys}; queries are the last of the keys' tokens, so there must "
            "not be more of them. The layout is [B, T, H, K] or packed [T, H, K]: tokens come before heads, so "
            "transpose(1, 2) what scaled_dot_product_attention takes. For causal=False any numbers of tokens go"
        )


def _packing(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool) -> Packing:
    """A packing from user offsets; reads them on the host to check them."""
    if cu_q is None:
        if cu_k is not None:
            raise ValueError("cu_seqlens_k was given without cu_seqlens; give both")
        _check_lengths(q.shape[0], k.shape[0], causal)
        keys = None if k.shape[0] == q.shape[0] else [k.shape[0]]
        return Packing.from_lengths([q.shape[0]], keys, causal=causal, device=q.device)
    for name, cu, rows in (
        ("cu_seqlens", cu_q, q.shape[0]),
        ("cu_seqlens_k", cu_q if cu_k is None else cu_k, k.shape[0]),
    ):
        check_tensor(name, cu)
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be 1-D int32 or int64 offsets, got {tuple(cu.shape)} {cu.dtype}")
        offsets = cu.tolist()
        if offsets[0] != 0 or offsets[-1] != rows or any(b < a for a, b in pairwise(offsets)):
            raise ValueError(f"{name} must rise from 0 to {rows} (the rows given), got {offsets[:4]} ... {offsets[-1]}")
    if cu_k is not None and cu_k.shape != cu_q.shape:
        raise ValueError(f"cu_seqlens has {cu_q.shape[0]} offsets but cu_seqlens_k has {cu_k.shape[0]}")
    q_offsets = cu_q.to(q.device, torch.int32)
    k_offsets = q_offsets if cu_k is None else cu_k.to(q.device, torch.int32)
    unplaced = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    packing = Packing(q_offsets, k_offsets, q.shape[0], k.shape[0], unplaced, causal)
    return replace(packing, position_T=packing.query_key_position())
