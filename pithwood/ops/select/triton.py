"""Block selection on a GPU: rounds the means, chooses a schedule and starts the kernel of gate_triton.py.

Legend: T packed tokens, N documents, U units (blocks) of all documents, S selections per row, k selected per row, H
query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.offsets_triton import block_offsets, doc_of_row, num_tiles
from pithwood.ops.operator import operator
from pithwood.ops.select.gate_triton import select_kernel


class Schedule(NamedTuple):
    """How the kernel cuts its work; every one gives the same ids."""

    tile: int
    """Queries of a program."""
    units: int
    """Block means scored at a time in rounds."""
    podiums: int
    """Block means scored at a time in podiums; 0: rounds alone."""
    warps: int
    stages: int


MOST_BY_PODIUMS = 8
"""Blocks to choose up to which podiums are tried first: with more, nearly every tile holds a row in doubt."""
MOST_TAG_BITS = 14
"""Bits of a score that podiums may use for the number of a tile, enough for half a million blocks; 9 remain."""
BY_PODIUMS = Schedule(tile=64, units=32, podiums=32, warps=4, stages=3)
BY_ROUNDS = Schedule(tile=64, units=128, podiums=0, warps=4, stages=3)
FP32_BY_PODIUMS = Schedule(tile=64, units=64, podiums=32, warps=4, stages=1)
FP32_BY_ROUNDS = Schedule(tile=64, units=64, podiums=0, warps=4, stages=1)
DIM_CHUNK_FP32 = 32
"""fp32 operands are multiplied on the CUDA cores, which hold a whole row of a chunk in registers."""
MEANS_WARPS = 4


@operator("select_blocks")
def select_blocks(
    q_THK: Tensor,
    s_UGK: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    top_k: int,
    block_size: int,
    own: bool,
    tie: str,
    per_group: bool,
    mean_dtype: str,
) -> tuple[Tensor, Tensor]:
    """(ids [T, S, top_k] int32, count [T, S] int32) as `select` promises, for block means as `summarise` lays them out.

    Nothing is read on the host and sizes depend on shapes alone, so calls can be captured in a CUDA graph. Memory
    besides the result: the rounded means.
    """
    budget, in_fp32 = top_k - int(own), _in_fp32(q_THK, per_group, mean_dtype)
    if 0 < budget <= MOST_BY_PODIUMS and _tag_bits(s_UGK.shape[0], BY_PODIUMS.podiums) <= MOST_TAG_BITS:
        schedule = FP32_BY_PODIUMS if in_fp32 else BY_PODIUMS
    else:
        schedule = FP32_BY_ROUNDS if in_fp32 else BY_ROUNDS
    return run_select(q_THK, s_UGK, cu_q, cu_k, causal, top_k, block_size, own, tie, per_group, mean_dtype, schedule)


@select_blocks.register_fake
def _(
    q_THK: Tensor,
    s_UGK: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    top_k: int,
    block_size: int,
    own: bool,
    tie: str,
    per_group: bool,
    mean_dtype: str,
) -> tuple[Tensor, Tensor]:
    sets = s_UGK.shape[1] if per_group else q_THK.shape[1]
    ids_TSk = q_THK.new_empty(q_THK.shape[0], sets, top_k, dtype=torch.int32)
    return ids_TSk, q_THK.new_empty(q_THK.shape[0], sets, dtype=torch.int32)


def run_select(
    q_THK: Tensor,
    s_UGK: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    top_k: int,
    block_size: int,
    own: bool,
    tie: str,
    per_group: bool,
    mean_dtype: str,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """`select_blocks` by a given schedule."""
    num_tokens, num_heads, dim = q_THK.shape
    num_kv_heads = s_UGK.shape[1]
    sets = num_kv_heads if per_group else num_heads
    ids_TSk = torch.empty(num_tokens, sets, top_k, dtype=torch.int32, device=q_THK.device)
    count_TS = torch.empty(num_tokens, sets, dtype=torch.int32, device=q_THK.device)
    if ids_TSk.numel() == 0:
        return ids_TSk, count_TS
    num_docs = cu_q.shape[0] - 1
    offsets_N = block_offsets(cu_k, block_size)
    in_fp32 = _in_fp32(q_THK, per_group, mean_dtype)
    means_UGK = _as_scored(s_UGK, offsets_N, mean_dtype, q_THK.dtype, torch.float32 if in_fp32 else q_THK.dtype)
    padded_dim = max(triton.next_power_of_2(dim), 16)
    row_tiles = num_tiles(num_tokens, num_docs, schedule.tile)
    select_kernel[(row_tiles * sets,)](
        q_THK,
        means_UGK,
        ids_TSk,
        count_TS,
        cu_q,
        cu_k,
        offsets_N,
        num_docs,
        row_tiles,
        block_size,
        q_THK.stride(0),
        q_THK.stride(1),
        q_THK.stride(2),
        SETS=sets,
        KV_HEADS=num_kv_heads,
        HEADS_PER_SET=num_heads // sets,
        TOP_K=top_k,
        PADDED_K=triton.next_power_of_2(top_k),
        LOG_PADDED_K=(top_k - 1).bit_length(),
        BUDGET=top_k - int(own),
        CAUSAL=causal,
        OWN=own,
        LATER=tie == "later",
        DIM=dim,
        PADDED_DIM=padded_dim,
        DIM_CHUNK=min(padded_dim, DIM_CHUNK_FP32) if in_fp32 else padded_dim,
        TILE=schedule.tile,
        UNITS=schedule.units,
        PODIUMS=schedule.podiums,
        TAG_BITS=_tag_bits(s_UGK.shape[0], schedule.podiums),
        num_warps=schedule.warps,
        num_stages=schedule.stages,
    )
    return ids_TSk, count_TS


def _tag_bits(num_units: int, podiums: int) -> int:
    """Bits that number the tiles of a document with num_units units; even, for every count is a kernel to compile."""
    last = max(triton.cdiv(num_units, podiums) - 1, 0) if podiums else 0
    return max(6, (last.bit_length() + 1) // 2 * 2)


def _in_fp32(q_THK: Tensor, per_group: bool, mean_dtype: str) -> bool:
    """True if a 16-bit operand cannot hold what is multiplied: means kept in fp32, or the mean of a group's queries."""
    return mean_dtype == "fp32" or per_group or q_THK.dtype == torch.float32


def _as_scored(s_UGK: Tensor, offsets_N: Tensor, mean_dtype: str, key_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """[U, G, K] contiguous `rounded_means` in a dtype that holds them exactly."""
    if mean_dtype == "fp32" and s_UGK.dtype == torch.float32:
        return s_UGK.contiguous()
    means_UGK = torch.empty(s_UGK.shape, dtype=dtype, device=s_UGK.device)
    num_units, num_kv_heads, dim = s_UGK.shape
    if means_UGK.numel() == 0:
        return means_UGK
    _round_means[(num_units * num_kv_heads,)](
        s_UGK,
        means_UGK,
        offsets_N,
        offsets_N.shape[0] - 1,
        num_kv_heads,
        s_UGK.stride(0),
        s_UGK.stride(1),
        s_UGK.stride(2),
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        CENTERED=mean_dtype == "centered",
        ROUND_TO=None if mean_dtype == "fp32" else _TRITON_DTYPE[key_dtype],
        num_warps=1,
    )
    return means_UGK


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _round_means(
    s_ptr,
    means_ptr,
    offsets_ptr,
    num_docs,
    num_kv_heads,
    stride_u,
    stride_g,
    stride_k,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CENTERED: tl.constexpr,
    ROUND_TO: tl.constexpr,
):
    """One program rounds the mean of one block and KV head, less that of its document's first block if centered."""
    unit = tl.program_id(0) // num_kv_heads
    head = tl.program_id(0) % num_kv_heads
    dim = tl.arange(0, PADDED_DIM)
    at_head = s_ptr + head.to(tl.int64) * stride_g + dim.to(tl.int64) * stride_k
    mean = tl.load(at_head + unit.to(tl.int64) * stride_u, mask=dim < DIM, other=0.0).to(tl.float32)
    if CENTERED:
        first = tl.load(offsets_ptr + doc_of_row(offsets_ptr, num_docs, unit))
        # Documents that hold no block may follow the last block; their offset is one past it.
        first = tl.minimum(first, unit)
        center = tl.load(at_head + first.to(tl.int64) * stride_u, mask=dim < DIM, other=0.0).to(tl.float32)
        mean -= tl.where(tl.abs(center) < float("inf"), center, 0.0)
    if ROUND_TO is not None:
        mean = mean.to(ROUND_TO)
    to = means_ptr + tl.program_id(0).to(tl.int64) * DIM
    tl.store(to + dim, mean.to(means_ptr.dtype.element_ty), mask=dim < DIM)
