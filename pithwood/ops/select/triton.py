"""Block selection on a GPU: rounds the means, chooses a schedule and starts the kernels of gate_triton.py.

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
from pithwood.ops.select.gate_triton import listed_kernel, podiums_kernel, rounds_kernel


class Schedule(NamedTuple):
    """How a kernel cuts its work; every one gives the same ids."""

    tile: int
    """Queries of a program."""
    units: int
    """Block means scored at a time in rounds, columns of podiums."""
    warps: int
    stages: int
    registers: int | None = None
    """Most registers of a thread; None: as many as the compiler likes."""


MOST_BY_PODIUMS, FP32_MOST_BY_PODIUMS = 15, 8
"""Blocks to choose up to which podiums are tried first. With 15 a third of all rows are in doubt."""
MOST_TAG_BITS = 14
"""Bits of a score that podiums may use for the number of a tile, enough for half a million blocks; 9 remain."""
PODIUM_COLUMNS = 32
"""With fewer, more rows are in doubt; more would not fit the registers."""
SEGMENT = 4096
"""Rows of a document whose doubtful ones make one list: whole tiles, counted by 16 bits."""
LIST_PARTS = 4
"""Programs that share a long list."""
PROGRAMS_PER_CORE = 4
"""Those that take lists, for each multiprocessor."""
CORES_ON_CPU = 2
ROUNDS = Schedule(tile=64, units=64, warps=4, stages=3)
PODIUMS = Schedule(tile=64, units=PODIUM_COLUMNS, warps=4, stages=2, registers=128)
PODIUMS_UNLIMITED = PODIUMS._replace(registers=None)
"""For head dims above 128, and on other GPUs than Hopper's, where products hold more and 128 registers spill."""
FP32_ROUNDS = Schedule(tile=64, units=32, warps=4, stages=1)
"""Products on the CUDA cores hold all that they multiply: with 64 means registers spill kilobytes (docs/log.md)."""
FP32_PODIUMS = Schedule(tile=64, units=PODIUM_COLUMNS, warps=4, stages=1)
DIM_CHUNK_FP32 = 32
"""fp32 operands are multiplied on the CUDA cores, which hold a whole row of a chunk in registers."""


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
    besides the result: the rounded means, and for rows in doubt 2 bytes a row and set and 4 a list, of which every set
    has T / SEGMENT + N.
    """
    budget, in_fp32 = top_k - int(own), _in_fp32(q_THK, per_group, mean_dtype)
    tag_bits = _tag_mask(s_UGK.shape[0], PODIUM_COLUMNS).bit_length()
    rounds, podiums = (FP32_ROUNDS, FP32_PODIUMS) if in_fp32 else (ROUNDS, _podiums_of(q_THK))
    most = FP32_MOST_BY_PODIUMS if in_fp32 else MOST_BY_PODIUMS
    by_podiums = 0 < budget <= most and tag_bits <= MOST_TAG_BITS
    return run_select(
        *(q_THK, s_UGK, cu_q, cu_k, causal, top_k, block_size, own, tie, per_group, mean_dtype),
        rounds,
        podiums if by_podiums else None,
    )


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
    rounds: Schedule,
    podiums: Schedule | None,
) -> tuple[Tensor, Tensor]:
    """`select_blocks` by given schedules: by rounds alone, or by podiums and rounds of the rows that these leave in
    doubt."""
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
    result = (q_THK, means_UGK, ids_TSk, count_TS)
    packing = (cu_q, cu_k, offsets_N, num_docs)
    shapes = {
        "SETS": sets,
        "KV_HEADS": num_kv_heads,
        "HEADS_PER_SET": num_heads // sets,
        "TOP_K": top_k,
        "PADDED_K": triton.next_power_of_2(top_k),
        "LOG_PADDED_K": (top_k - 1).bit_length(),
        "BUDGET": top_k - int(own),
        "CAUSAL": causal,
        "OWN": own,
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "DIM_CHUNK": min(padded_dim, DIM_CHUNK_FP32) if in_fp32 else padded_dim,
    }
    later = tie == "later"
    if podiums is None:
        row_tiles = num_tiles(num_tokens, num_docs, rounds.tile)
        rounds_kernel[(row_tiles * sets,)](
            *result, *packing, row_tiles, block_size, *q_THK.stride(), **shapes, LATER=later, **_launch(rounds)
        )
        return ids_TSk, count_TS
    assert SEGMENT % podiums.tile == 0
    assert SEGMENT <= 1 << 15
    segments = num_tiles(num_tokens, num_docs, SEGMENT)
    list_ST = torch.empty(sets, num_tokens, dtype=torch.int16, device=q_THK.device)
    listed_XS = torch.zeros(segments, sets, dtype=torch.int32, device=q_THK.device)
    lists = (list_ST, listed_XS)
    row_tiles = num_tiles(num_tokens, num_docs, podiums.tile)
    tag_mask = _tag_mask(s_UGK.shape[0], podiums.units)
    podiums_kernel[(row_tiles * sets,)](
        *result, *lists, *packing, row_tiles, num_tokens, block_size, tag_mask, *q_THK.stride(), **shapes,
        SEGMENT=SEGMENT, **_launch(podiums),
    )  # fmt: skip
    listed_kernel[(min(segments * LIST_PARTS * sets, PROGRAMS_PER_CORE * _cores(q_THK.device)),)](
        *result, *lists, *packing, segments, num_tokens, block_size, *q_THK.stride(), **shapes,
        LATER=later, SEGMENT=SEGMENT, PARTS=LIST_PARTS, **_launch(rounds),
    )  # fmt: skip
    return ids_TSk, count_TS


def _launch(schedule: Schedule) -> dict[str, int]:
    tile, units, warps, stages, registers = schedule
    limit = {} if registers is None else {"maxnreg": registers}
    return {"TILE": tile, "UNITS": units, "num_warps": warps, "num_stages": stages, **limit}


def _podiums_of(q_THK: Tensor) -> Schedule:
    hopper = q_THK.is_cuda and torch.cuda.get_device_capability(q_THK.device)[0] == 9
    return PODIUMS if hopper and q_THK.shape[2] <= 128 else PODIUMS_UNLIMITED


def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else CORES_ON_CPU


def _tag_mask(num_units: int, columns: int) -> int:
    """1 in every bit that is needed to number the tiles of a document with num_units units, and in two at least: of 0
    and 1 a kernel would be made of their own."""
    last = max(triton.cdiv(num_units, columns) - 1, 0)
    return (1 << max(2, last.bit_length())) - 1


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
