"""Block summaries on a GPU: one program adds up the keys of one block in fp32, a few KV heads in turn.

Every key is read once, in rows of K contiguous elements, so the kernel runs at the speed of memory. A block of one head
is held at once where it fits, and the next head's keys are under way while one's are added up: a program's way to its
block, a search through offsets, takes as long as reading one head of 64. How a block is added up does not depend on how
many heads there are. Programs are ordered with the heads fastest: the programs that run together read neighbouring
addresses.

Legend: T packed tokens, N documents, U units (blocks), G KV heads, K head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.offsets_triton import block_offsets, doc_of_row, key_block_offsets
from pithwood.ops.operator import operator
from pithwood.ops.packing import Packing

WHOLE_ELEMENTS = 16384
"""Most elements of a block and head that are held at once: 32 KiB of bf16, 128 of them a thread in four warps."""
TILE_ELEMENTS = 8192
"""Elements of a larger block that are loaded at a time, and added to as many sums."""
MEAN_HEADS = 2
MEAN_WARPS = 4
MEAN_STAGES = 2


def summarise_triton(k_TGK: Tensor, packing: Packing, block_size: int) -> Tensor:
    """As summarise_ref, for fp32, fp16 and bf16 keys. A block's digits do not depend on what it is packed with."""
    num_units = packing.num_units_bound(k_TGK.shape[0], block_size)
    return summarise_mean(k_TGK, packing.cu_k, key_block_offsets(packing, block_size), block_size, num_units)


@operator("summarise_mean")
def summarise_mean(k_TGK: Tensor, cu_k: Tensor, offsets_N: Tensor | None, block_size: int, num_units: int) -> Tensor:
    """[num_units, G, K] fp32 block means; rows beyond the last block are zero.

    offsets_N  `block_offsets(cu_k, block_size)`; None: one launch more counts the blocks
    """
    _, num_kv_heads, dim = k_TGK.shape
    s_UGK = torch.empty(num_units, num_kv_heads, dim, dtype=torch.float32, device=k_TGK.device)
    if s_UGK.numel() == 0:
        return s_UGK
    if offsets_N is None:
        offsets_N = block_offsets(cu_k, block_size)
    padded_dim = triton.next_power_of_2(dim)
    rows = triton.next_power_of_2(block_size)
    whole = rows * padded_dim <= WHOLE_ELEMENTS
    if not whole:
        rows = max(TILE_ELEMENTS // padded_dim, 1)
    heads = min(MEAN_HEADS, num_kv_heads) if whole else 1
    _summarise_mean[(num_units * triton.cdiv(num_kv_heads, heads),)](
        k_TGK,
        s_UGK,
        cu_k,
        offsets_N,
        cu_k.shape[0] - 1,
        num_kv_heads,
        block_size,
        k_TGK.stride(0),
        k_TGK.stride(1),
        k_TGK.stride(2),
        DIM=dim,
        PADDED_DIM=padded_dim,
        ROWS=rows,
        HEADS_A_PROGRAM=heads,
        WHOLE=whole,
        STAGES=MEAN_STAGES,
        num_warps=MEAN_WARPS,
    )
    return s_UGK


@summarise_mean.register_fake
def _(k_TGK: Tensor, cu_k: Tensor, offsets_N: Tensor | None, block_size: int, num_units: int) -> Tensor:
    return k_TGK.new_empty(num_units, *k_TGK.shape[1:], dtype=torch.float32)


@triton.jit
def _summarise_mean(
    k_ptr,
    s_ptr,
    cu_ptr,
    offsets_ptr,
    num_docs,
    num_kv_heads,
    block_size,
    stride_t,
    stride_g,
    stride_k,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS_A_PROGRAM: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    programs = (num_kv_heads + HEADS_A_PROGRAM - 1) // HEADS_A_PROGRAM
    unit = tl.program_id(0) // programs
    head0 = tl.program_id(0) % programs * HEADS_A_PROGRAM
    doc = doc_of_row(offsets_ptr, num_docs, unit)
    begin = tl.load(cu_ptr + doc)
    inside = (unit - tl.load(offsets_ptr + doc)).to(tl.int64) * block_size
    # Beyond the last block there is nothing to add: its start lies past the document's end.
    left = tl.load(cu_ptr + doc + 1) - begin - inside
    length = tl.minimum(tl.maximum(left, 0), block_size).to(tl.int32)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    base = k_ptr + (begin + inside) * stride_t
    for head in tl.range(head0, tl.minimum(head0 + HEADS_A_PROGRAM, num_kv_heads), num_stages=STAGES):
        at_head = base + tl.cast(head, tl.int64) * stride_g
        if WHOLE:
            total = _keys(at_head, row, dim, length, stride_t, stride_k, DIM)
        else:
            total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
            for first in range(0, length, ROWS):
                total += _keys(at_head, first + row, dim, length, stride_t, stride_k, DIM)
        mean = tl.sum(total, 0) / tl.maximum(length, 1).to(tl.float32)
        to = s_ptr + (unit.to(tl.int64) * num_kv_heads + head) * DIM
        tl.store(to + dim, mean, mask=dim < DIM)


@triton.jit
def _keys(at, row, dim, length, stride_t, stride_k, DIM: tl.constexpr):
    """[ROWS, PADDED_DIM] fp32, 0 where there are none"""
    real = (row < length)[:, None] & (dim < DIM)[None, :]
    at = at + row.to(tl.int64)[:, None] * stride_t + dim[None, :].to(tl.int64) * stride_k
    return tl.load(at, mask=real, other=0.0).to(tl.float32)
