"""Block selection where documents have few blocks: all scores of a row at once, in registers.

The gate (gate_triton.py) is made for rows of hundreds of scores. Where a document has at most 32 blocks, what it spends
on podiums, lists and sorting, and on finding its place in the packing for one small tile of queries and one head,
outweighs the work: to read the queries once and to write the ids. Here a program takes a tile of queries and several
heads in turn, the next head's queries are under way while one's blocks are sought, and a row's choice is a word with
one bit per block.

The budget-th best score of a row is sought as the best of those below the best, and so on: one reduction over the four
lanes that hold a row in each round. If as many scores as there are to choose reach it, they are the best, however it
was found. If not, there are ties, NaN or -inf among them, and the rows in doubt of the tile are sought again, one block
a round, which is right whatever the scores are.

The ids ascend as bits do: the i-th id is the lowest bit of the word that is left when i of them are gone.

Legend: T packed tokens, N documents, U units (blocks) of all documents, S selections per row, k selected per row, H
query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.offsets_triton import block_offsets, doc_of_tile, num_tiles
from pithwood.ops.operator import operator
from pithwood.ops.packing import Packing


class Schedule(NamedTuple):
    """How the kernel cuts its work; every one gives the same ids."""

    tile: int
    """Queries of a program."""
    heads: int
    """Query heads that a program takes in turn."""
    warps: int
    stages: int
    """Tiles in shared memory: with 2, the next head's queries are read while this one's blocks are sought."""
    registers: int | None = None
    """Most registers of a thread; None: as many as the compiler likes."""


MOST_UNITS = 32
"""Blocks of a document: a row's choice is a word of 32 bits."""
MOST_CHOSEN = 16
SHORT = Schedule(tile=64, heads=4, warps=4, stages=3, registers=80)
SHORT_WIDE = Schedule(tile=64, heads=4, warps=4, stages=2)
"""For head dims above 64."""
SHORT_FP32 = Schedule(tile=64, heads=1, warps=4, stages=1)
DIM_CHUNK_FP32 = 32
"""fp32 operands are multiplied on the CUDA cores, which hold a whole row of a chunk in registers."""


def selects_short(packing: Packing, num_units: int, top_k: int, block_size: int, held: bool) -> bool:
    """Whether `select_short` takes a causal selection by query heads with the own block forced.

    num_units  of the summaries
    held       they are those that a cache holds, perhaps of complete blocks alone
    """
    fits = top_k <= MOST_CHOSEN and _units_bound(packing.max_k, block_size, num_units, held) <= MOST_UNITS
    # Triton 3.7 fails on this kernel for a B200; the gate chooses there.
    return fits and not (packing.cu_q.is_cuda and torch.cuda.get_device_capability(packing.cu_q.device)[0] == 10)


@operator("select_short")
def select_short(
    q_THK: Tensor,
    s_UGK: Tensor,
    unit_start_N: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    max_k: int,
    top_k: int,
    block_size: int,
    tie: str,
    mean_dtype: str,
) -> tuple[Tensor, Tensor]:
    """(ids [T, H, top_k] int32, count [T, H] int32) as `select` promises, for documents of at most MOST_UNITS blocks.

    unit_start_N  row of s at which each document's means begin; None: packed, and one launch more counts the blocks

    Nothing is read on the host and sizes depend on shapes and bounds alone, so calls can be captured in a CUDA graph.
    """
    schedule = SHORT_WIDE if q_THK.shape[2] > 64 else SHORT
    if _in_fp32(q_THK, mean_dtype):
        schedule = SHORT_FP32
    return run_short(q_THK, s_UGK, unit_start_N, cu_q, cu_k, max_k, top_k, block_size, tie, mean_dtype, schedule)


@select_short.register_fake
def _(q_THK, s_UGK, unit_start_N, cu_q, cu_k, max_k, top_k, block_size, tie, mean_dtype):
    num_tokens, heads, _ = q_THK.shape
    ids_THk = q_THK.new_empty(num_tokens, heads, top_k, dtype=torch.int32)
    return ids_THk, q_THK.new_empty(num_tokens, heads, dtype=torch.int32)


def run_short(
    q_THK: Tensor,
    s_UGK: Tensor,
    unit_start_N: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    max_k: int,
    top_k: int,
    block_size: int,
    tie: str,
    mean_dtype: str,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """`select_short` by a given schedule."""
    num_tokens, heads, dim = q_THK.shape
    ids_THk = torch.empty(num_tokens, heads, top_k, dtype=torch.int32, device=q_THK.device)
    count_TH = torch.empty(num_tokens, heads, dtype=torch.int32, device=q_THK.device)
    num_docs = cu_q.shape[0] - 1
    if ids_THk.numel() == 0 or num_docs == 0:
        return ids_THk.fill_(-1), count_TH.zero_()
    in_fp32 = _in_fp32(q_THK, mean_dtype)
    padded_dim = max(triton.next_power_of_2(dim), 16)
    # The compiler cannot stage means that need no rounding.
    rounded = s_UGK.dtype == q_THK.dtype and mean_dtype == "input"
    bound = _units_bound(max_k, block_size, s_UGK.shape[0], unit_start_N is not None)
    row_tiles = num_tiles(num_tokens, num_docs, schedule.tile)
    a_program = min(schedule.heads, heads)
    select_short_kernel[(row_tiles * triton.cdiv(heads, a_program),)](
        q_THK, s_UGK, ids_THk, count_TH, cu_q, cu_k,
        block_offsets(cu_k, block_size) if unit_start_N is None else unit_start_N,
        num_docs, *q_THK.stride(), *s_UGK.stride(),
        HEADS=heads, RATIO=heads // s_UGK.shape[1], HEADS_A_PROGRAM=a_program, TOP_K=top_k,
        PADDED_K=triton.next_power_of_2(top_k), LATER=tie == "later", CENTERED=mean_dtype == "centered", DIM=dim,
        PADDED_DIM=padded_dim, BLOCK=block_size, IN_FP32=in_fp32,
        DIM_CHUNK=min(padded_dim, DIM_CHUNK_FP32), TILE=schedule.tile, UNITS=16 if bound <= 16 else MOST_UNITS,
        num_warps=schedule.warps, num_stages=1 if rounded else schedule.stages,
        maxnreg=schedule.registers,
    )  # fmt: skip
    return ids_THk, count_TH


def _units_bound(max_k: int, block_size: int, num_units: int, held: bool) -> int:
    """Blocks of one document; of its last one a cache may hold no summary."""
    return min((max_k + block_size - 1) // block_size, num_units + held)


def _in_fp32(q_THK: Tensor, mean_dtype: str) -> bool:
    """True if a 16-bit operand cannot hold what is multiplied."""
    return mean_dtype == "fp32" or q_THK.dtype == torch.float32


LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The least finite score."""


@triton.jit
def select_short_kernel(
    q_ptr, means_ptr, ids_ptr, count_ptr, cu_q_ptr, cu_k_ptr, offsets_ptr,
    num_docs, stride_qt, stride_qh, stride_qk, stride_mu, stride_mg, stride_mk,
    HEADS: tl.constexpr, RATIO: tl.constexpr, HEADS_A_PROGRAM: tl.constexpr, TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr, LATER: tl.constexpr, CENTERED: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr, IN_FP32: tl.constexpr, DIM_CHUNK: tl.constexpr, TILE: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """ids and counts of TILE queries and HEADS_A_PROGRAM heads; causal, the own block chosen, the best TOP_K - 1 past
    ones of at most UNITS - 1."""
    # Heads fastest, for their ids share cache lines.
    programs: tl.constexpr = (HEADS + HEADS_A_PROGRAM - 1) // HEADS_A_PROGRAM
    head0 = tl.program_id(0) % programs * HEADS_A_PROGRAM
    end = tl.minimum(head0 + HEADS_A_PROGRAM, HEADS)
    tile = tl.program_id(0) // programs
    doc = doc_of_tile(cu_q_ptr, num_docs, tile, TILE)
    q_begin = tl.load(cu_q_ptr + doc)
    q_length = tl.load(cu_q_ptr + doc + 1) - q_begin
    first = (tile - q_begin // TILE - doc) * TILE
    if first >= q_length:
        return
    shift = tl.load(cu_k_ptr + doc + 1) - tl.load(cu_k_ptr + doc) - q_length
    local = tl.minimum(tl.arange(0, TILE), q_length - 1 - first)
    real = tl.arange(0, TILE) < q_length - first
    position = first + shift + local
    own = tl.where(position >= 0, position // BLOCK, -1)
    last = tl.minimum(first + TILE, q_length) - 1 + shift
    last_own = tl.where(last >= 0, last // BLOCK, -1)
    unit = tl.arange(0, UNITS)

    # Rows that have nothing to choose from are not read, nor are blocks that no row may choose.
    t0 = tl.cast(q_begin + first, tl.int64)
    q_at = q_ptr + t0 * stride_qt + (local * stride_qt)[:, None]
    q_real = (real & (position >= BLOCK))[:, None]
    center_at = means_ptr + tl.load(offsets_ptr + doc).to(tl.int64) * stride_mu
    mean_at = center_at + (unit * stride_mu)[None, :]
    mean_real = (unit < last_own)[None, :]
    slot = tl.arange(0, PADDED_K)
    ids_at = ids_ptr + t0 * (HEADS * TOP_K) + (local * (HEADS * TOP_K))[:, None] + slot[None, :]
    count_at = count_ptr + t0 * HEADS + local * HEADS
    for head in range(head0, end):
        chosen = tl.zeros([TILE], tl.int32)
        if TOP_K > 1:
            of_head = tl.cast(head // RATIO, tl.int64) * stride_mg
            if IN_FP32:
                score = tl.zeros([TILE, UNITS], tl.float32)
                for chunk in range(0, PADDED_DIM, DIM_CHUNK):
                    dim = chunk + tl.arange(0, DIM_CHUNK)
                    q = _load_queries(q_at, head, q_real, dim, stride_qh, stride_qk, DIM).to(tl.float32)
                    mean = _load_means(
                        mean_at + of_head, center_at + of_head, mean_real, last_own, dim, stride_mk, CENTERED, DIM
                    )
                    score = tl.dot(q, mean, score, input_precision="ieee")
            else:
                dim = tl.arange(0, PADDED_DIM)
                q = _load_queries(q_at, head, q_real, dim, stride_qh, stride_qk, DIM)
                mean = _load_means(
                    mean_at + of_head, center_at + of_head, mean_real, last_own, dim, stride_mk, CENTERED, DIM
                )
                score = tl.dot(q, mean.to(q.dtype))
            chosen = _chosen(score, unit, own, last_own, TOP_K - 1, LATER)
        chosen |= tl.where(own >= 0, 1 << tl.maximum(own, 0), 0)
        tl.store(count_at + head, _num_bits(chosen), mask=real)
        left = tl.broadcast_to(chosen[:, None], [TILE, PADDED_K])
        of_slot = left
        for i in tl.static_range(1, TOP_K):
            left = left & (left - 1)
            of_slot = tl.where(slot[None, :] == i, left, of_slot)
        tl.store(ids_at + head * TOP_K, _lowest_bit(of_slot), mask=real[:, None] & (slot < TOP_K)[None, :])


@triton.jit
def _load_queries(at, head, real, dim, stride_h, stride_k, DIM: tl.constexpr):
    """[TILE, dims]"""
    at = at + tl.cast(head, tl.int64) * stride_h + (dim * stride_k)[None, :]
    return tl.load(at, mask=real & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _load_means(at, center_at, real, num_units, dim, stride_k, CENTERED: tl.constexpr, DIM: tl.constexpr):
    """[dims, UNITS] fp32 means; if CENTERED, less that of the document's first block where it is finite."""
    inside = dim < DIM
    mean = tl.load(at + (dim * stride_k)[:, None], mask=inside[:, None] & real, other=0.0).to(tl.float32)
    if CENTERED:
        center = tl.load(center_at + dim * stride_k, mask=inside & (num_units > 0), other=0.0).to(tl.float32)
        mean -= tl.where(tl.abs(center) < float("inf"), center, 0.0)[:, None]
    return mean


@triton.jit
def _chosen(score, unit, own, last_own, BUDGET: tl.constexpr, LATER: tl.constexpr):
    """[TILE] int32: the bits of the BUDGET best candidates of each row, NaN never among them."""
    candidate = unit[None, :] < own[:, None]
    if last_own <= BUDGET:
        # No row has more candidates than it may choose.
        chosen = _bits(candidate & (score == score), unit)
    else:
        open_score = tl.where(candidate, score, float("-inf"))
        least = tl.max(open_score, 1)
        for _ in tl.static_range(BUDGET - 1):
            least = tl.max(tl.where(open_score < least[:, None], open_score, float("-inf")), 1)
        # What is no candidate counts as -inf; candidates of -inf are left to the search below.
        chosen = _bits(open_score >= tl.maximum(least, LOWEST)[:, None], unit)
        in_doubt = _num_bits(chosen) != tl.minimum(tl.maximum(own, 0), BUDGET)
        if tl.max(in_doubt.to(tl.int32), 0) > 0:
            chosen = tl.where(in_doubt, 0, chosen)
            missing = tl.where(in_doubt, BUDGET, 0)
            left = tl.where(candidate, score, float("nan"))
            while tl.max(missing, 0) > 0:
                best = tl.max(left, 1)
                if LATER:
                    winner = tl.max(tl.where(left == best[:, None], unit[None, :], 0), 1)
                else:
                    winner = tl.min(tl.where(left == best[:, None], unit[None, :], 31), 1)
                found = (missing > 0) & (best == best)
                chosen |= tl.where(found, 1 << winner, 0)
                missing = tl.where(found, missing - 1, 0)
                left = tl.where(unit[None, :] == winner[:, None], float("nan"), left)
    return chosen


@triton.jit
def _bits(is_set, unit):
    """[TILE] int32: the bits `unit` [UNITS] that are set [TILE, UNITS]."""
    return tl.sum(tl.where(is_set, (tl.full(unit.shape, 1, tl.int32) << unit)[None, :], 0), 1)


@triton.jit
def _num_bits(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101 >> 24) & 0xFF


@triton.jit
def _lowest_bit(word):
    """The number of the lowest bit that is set, -1 where there is none: the exponent of a power of two."""
    exponent = ((word & -word).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.maximum(exponent - 127, -1)
