"""What the attention benchmark compares: Pithwood's MoBA and the dense and sparse attention that others offer.

Each is a function of (q, k, v) that returns o; its gradients are those of autograd.

Legend: T packed tokens, N documents, U units (blocks) of all documents, H query heads, G KV heads, K head dim,
R query tiles, C key tiles.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pithwood.bench.cases import Case, Shape
from pithwood.ops.attend import attend
from pithwood.ops.dense_attention import dense_attention
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.select import select
from pithwood.ops.summarise import summarise

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

MEAN_DTYPE = "centered"
"""Rounding of the block means: what the mixer takes by default."""
FLEX_TILE = 128
"""Tile of FlexAttention's block mask, in queries and in keys."""
FLEX_MEMORY_SHARE = 0.4
"""Of the device's free memory that building a block mask may take."""

MOBA = ("pithwood", "pithwood-triton", "pithwood-torch", "flex")
"""pithwood: the implementation that the ops choose; flex: FlexAttention with a block mask of the same selection, whose
making is not timed."""
DENSE = ("fa4", "cudnn", "flash", "varlen", "sdpa")
"""flash-attention 4; the cuDNN and flash backends of torch's SDPA; torch's varlen attention; SDPA document by
document on a CPU."""


def default_implementations(device: torch.device) -> tuple[str, ...]:
    return ("pithwood", "flex", *DENSE[:-1]) if device.type == "cuda" else ("pithwood", "sdpa")


def misfit(name: str, case: Case, device: torch.device) -> str | None:
    """Why an implementation cannot run this case here, or None."""
    if name == "fa4":
        return _fa4_misfit()
    if name in ("cudnn", "flash", "varlen", "flex") and device.type != "cuda":
        return "it needs a CUDA GPU"
    if name in ("cudnn", "flash") and case.shape.mixed:
        return "it takes documents of one length only"
    if name in ("cudnn", "flash", "varlen", "fa4") and case.shape.dtype == "fp32":
        return "it takes bf16 and fp16"
    if name == "flex":
        need, free = flex_mask_bytes(case.shape), torch.cuda.mem_get_info(device)[0]
        if need > FLEX_MEMORY_SHARE * free:
            return f"making its block mask would take about {need / 1e9:.0f} GB"
    return None


def implementation(name: str, case: Case, packing: Packing, qkv: tuple[Tensor, Tensor, Tensor]) -> Attention:
    """The function to time. What it may prepare from the packing and the inputs beforehand, it prepares here."""
    if name.startswith("pithwood"):
        size, top_k = case.blocks
        return functools.partial(moba, packing=packing, block_size=size, top_k=top_k, impl=forced_impl(name))
    if name == "flex":
        return flex_attention_of(qkv[0], qkv[1], packing, route(*qkv[:2], packing, case))
    if name == "fa4":
        return functools.partial(_fa4, packing=packing, lengths=case.shape.lengths)
    if name in ("cudnn", "flash"):
        backend = SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION
        return functools.partial(_sdpa, backend=backend, sequences=len(case.shape.lengths))
    if name in ("varlen", "sdpa"):
        impl = "varlen" if name == "varlen" else "torch"
        return lambda q, k, v: dense_attention(q, k, v, packing, impl=impl)[0]
    raise ValueError(f"--impls {name} is not known; choose among {', '.join((*MOBA, *DENSE))}")


def forced_impl(name: str) -> str | None:
    """The `impl=` that the name of one of Pithwood's implementations forces; None for "pithwood" and all others."""
    return name.removeprefix("pithwood-") if name.startswith("pithwood-") else None


def moba(q: Tensor, k: Tensor, v: Tensor, packing: Packing, block_size: int, top_k: int, impl: str | None) -> Tensor:
    """One MoBA layer's attention, routing included."""
    means = summarise(k, packing, block_size, impl=impl)
    selection = select(q, means, packing, top_k, block_size=block_size, mean_dtype=MEAN_DTYPE, impl=impl)
    return attend(q, k, v, packing, selection, impl=impl)[0]


def route(q: Tensor, k: Tensor, packing: Packing, case: Case, impl: str | None = None) -> Selection:
    """The selection alone."""
    size, top_k = case.blocks
    means = summarise(k, packing, size, impl=impl)
    return select(q, means, packing, top_k, block_size=size, mean_dtype=MEAN_DTYPE, impl=impl)


@functools.cache
def _fa4_misfit() -> str | None:
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU"
    try:
        importlib.import_module("flash_attn.cute")
    except ImportError as error:
        return f"flash_attn.cute cannot be imported ({error}); pip install flash-attn-4"
    return None


def _fa4(q: Tensor, k: Tensor, v: Tensor, packing: Packing, lengths: tuple[int, ...]) -> Tensor:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if len(set(lengths)) == 1:
        q, k, v = (x.view(len(lengths), lengths[0], *x.shape[1:]) for x in (q, k, v))
        return flash_attn_func(q, k, v, causal=True)[0].flatten(0, 1)
    offsets = {"cu_seqlens_q": packing.cu_q, "cu_seqlens_k": packing.cu_k}
    return flash_attn_varlen_func(
        q, k, v, **offsets, max_seqlen_q=packing.max_q, max_seqlen_k=packing.max_k, causal=True
    )[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, sequences: int) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o.transpose(1, 2).flatten(0, 1)


def flex_mask_bytes(shape: Shape) -> float:
    """About what a block mask takes while it is made: per head and pair of tiles a flag, two int32 lists and an int64
    sort."""
    tiles = -(-shape.tokens // FLEX_TILE)
    return 25.0 * shape.heads * tiles**2


def flex_attention_of(q: Tensor, k: Tensor, packing: Packing, selection: Selection, compiled: bool = True) -> Attention:
    """FlexAttention over the packed tokens as one sequence, with the mask that a per-query selection means."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tokens, heads = q.shape[:2]
    doc_T = packing.query_doc()
    offsets_N = packing.unit_offsets(selection.unit)
    unit_T = (offsets_N[doc_T] + packing.position_T // selection.unit).int()
    ids_THk = selection.ids_per_head(packing, heads, k.shape[1])
    ids_HTk = torch.where(ids_THk >= 0, ids_THk + offsets_N[doc_T][:, None, None], -1).int().transpose(0, 1)
    ids_HTk = ids_HTk.contiguous()
    width = ids_HTk.shape[2]

    def mask_mod(_b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        chosen = ids_HTk[h, q_index, 0] == unit_T[k_index]
        for slot in range(1, width):
            chosen = chosen | (ids_HTk[h, q_index, slot] == unit_T[k_index])
        return chosen & (k_index <= q_index)

    needed = _needed_tiles(ids_HTk, packing, selection.unit, tokens)
    counts, order = needed.sum(-1, dtype=torch.int32), needed.byte().argsort(dim=-1, descending=True, stable=True)
    mask = BlockMask.from_kv_blocks(
        counts[None], order[None].int(), BLOCK_SIZE=FLEX_TILE, mask_mod=mask_mod, seq_lengths=(tokens, tokens)
    )
    run: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    grouped = heads != k.shape[1]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return run(q, k, v, block_mask=mask, enable_gqa=grouped)[0].transpose(0, 1)

    return attention


def _needed_tiles(ids_HTk: Tensor, packing: Packing, unit: int, tokens: int) -> Tensor:
    """[H, R, C] bool: key tiles that hold a selected and visible key of some query of the tile."""
    heads, _, width = ids_HTk.shape
    tiles = -(-tokens // FLEX_TILE)
    offsets_N, cu = packing.unit_offsets(unit), packing.cu_k.long()
    tile_T = torch.arange(tokens, device=ids_HTk.device) // FLEX_TILE
    doc_T = packing.query_doc()
    # one row more for what is not selected
    needed = torch.zeros(heads, tiles, tiles + 1, dtype=torch.bool, device=ids_HTk.device)
    for slot in range(width):
        ids_HT = ids_HTk[..., slot].long()
        start_HT = cu[doc_T] + (ids_HT - offsets_N[doc_T]) * unit
        # the last key seen: of the unit, or the query itself
        last_HT = torch.minimum(start_HT + unit - 1, torch.arange(tokens, device=ids_HT.device))
        for ahead in range(unit // FLEX_TILE + 2):
            column_HT = start_HT // FLEX_TILE + ahead
            column_HT = torch.where((ids_HT >= 0) & (column_HT <= last_HT // FLEX_TILE), column_HT, tiles)
            head_H1 = torch.arange(heads, device=ids_HT.device)[:, None]
            needed[head_H1, tile_T, column_HT] = True
    return needed[..., :tiles]
