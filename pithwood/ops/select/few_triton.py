"""Block selection for decode steps: a few queries per document against many cached means.

With one query per document a program of the gate (gate_triton.py) would walk over a document's means alone. Here the
means are split over programs: one scores 32 of them, rounded as they are read, for all query heads of their KV head
(16 rows or more make a product), and writes the scores; a second kernel, a program per query and head, holds a row of
scores in registers and takes its best ones in turn. Scores become integers that order like the floats, with the number
of the block below them: all of a row differ, and ties are exact.

Legend: T packed tokens, N documents, U units (blocks) of all documents, H query heads, G KV heads, K head dim, k
selected per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator
from pithwood.ops.packing import Packing

MOST_QUERIES = 16
"""Queries per document up to which this is the faster schedule."""
MOST_CHOSEN = 16
MOST_UNITS = 8192
"""Blocks of a document whose scores one program can hold: a million tokens in blocks of 128."""
MOST_SCORE_BYTES = 256 * 2**20
UNITS = 32
"""Means per program of the first kernel: 16 KiB of fp32 at head dim 128."""
MOST_ROWS = 64
"""Rows per program; 16 of fp32, which are multiplied on the CUDA cores, out of registers."""
DOCS_CHUNK = 256
NO_KEY = tl.constexpr(-0x8000000000000000)
"""Sorts below the key of every score."""


def decodes_few(packing: Packing, num_heads: int, num_units: int, top_k: int, block_size: int) -> bool:
    """Whether `select_few` takes a causal selection by query heads with the own block forced."""
    units = _units_bound(packing.max_k, block_size, num_units)
    small = packing.num_queries * num_heads * units * 4 <= MOST_SCORE_BYTES
    return packing.max_q <= MOST_QUERIES and top_k <= MOST_CHOSEN and units <= MOST_UNITS and small


@operator("select_few")
def select_few(
    q_THK: Tensor,
    s_UGK: Tensor,
    unit_start_N: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    top_k: int,
    block_size: int,
    tie: str,
    mean_dtype: str,
) -> tuple[Tensor, Tensor]:
    """(ids [T, H, top_k] int32, count [T, H] int32) as `select` promises; sizes depend on shapes and bounds alone.

    unit_start_N  row of s at which each document's means begin; None: packed
    """
    num_tokens, heads, dim = q_THK.shape
    ids_THk = torch.empty(num_tokens, heads, top_k, dtype=torch.int32, device=q_THK.device)
    count_TH = torch.empty(num_tokens, heads, dtype=torch.int32, device=q_THK.device)
    num_docs, max_q = cu_q.shape[0] - 1, min(max_q, num_tokens)
    if ids_THk.numel() == 0 or num_docs == 0 or max_q == 0:
        return ids_THk.fill_(-1), count_TH.zero_()
    groups = s_UGK.shape[1]
    ratio = heads // groups
    num_units = _units_bound(max_k, block_size, s_UGK.shape[0])
    most_rows = 16 if mean_dtype == "fp32" or q_THK.dtype == torch.float32 else MOST_ROWS
    rows = max(16, min(most_rows, triton.next_power_of_2(max_q * ratio)))
    row_tiles = triton.cdiv(max_q * ratio, rows)
    chunks = triton.cdiv(num_units, UNITS)
    score = torch.empty(num_tokens, heads, num_units, dtype=torch.float32, device=q_THK.device)
    if top_k > 1 and num_units > 0:
        _score_kernel[(num_docs * row_tiles * groups * chunks,)](
            q_THK, s_UGK, score, unit_start_N, cu_q, cu_k, *q_THK.stride(), *s_UGK.stride(),
            row_tiles, groups, chunks, num_units, block_size, DIM=dim, PADDED_DIM=max(triton.next_power_of_2(dim), 16),
            RATIO=ratio, ROWS=rows, UNITS=UNITS, PACKED=unit_start_N is None, CENTERED=mean_dtype == "centered",
            KEEP_FP32=mean_dtype == "fp32", DOCS=DOCS_CHUNK, num_warps=4,
        )  # fmt: skip
    padded = max(triton.next_power_of_2(num_units), 16)
    _choose_kernel[(num_docs * max_q, heads)](
        score, ids_THk, count_TH, cu_q, cu_k, max_q, num_units, block_size, TOP_K=top_k,
        PADDED_K=triton.next_power_of_2(top_k), UNITS=padded, LATER=tie == "later",
        num_warps=1 if padded <= 256 else 4 if padded <= 4096 else 8,
    )  # fmt: skip
    return ids_THk, count_TH


@select_few.register_fake
def _(q_THK, s_UGK, unit_start_N, cu_q, cu_k, max_q, max_k, top_k, block_size, tie, mean_dtype):
    num_tokens, heads, _ = q_THK.shape
    ids_THk = q_THK.new_empty(num_tokens, heads, top_k, dtype=torch.int32)
    return ids_THk, q_THK.new_empty(num_tokens, heads, dtype=torch.int32)


def _units_bound(max_k: int, block_size: int, num_units: int) -> int:
    """Blocks of one document."""
    return min((max_k + block_size - 1) // block_size, num_units)


@triton.jit
def _score_kernel(
    q, means, score, unit_start_N, cu_q, cu_k,
    stride_qt, stride_qh, stride_qk, stride_mu, stride_mg, stride_mk,
    row_tiles, num_groups, chunks, num_units, block_size,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    PACKED: tl.constexpr, CENTERED: tl.constexpr, KEEP_FP32: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of rows, a row being a query and head, for UNITS means of one document and KV head; fp32 sums.

    Blocks that no query of the document may choose have no scores.
    """
    chunk = tl.program_id(0) % chunks
    rest = tl.program_id(0) // chunks
    group = rest % num_groups
    tile = rest // num_groups % row_tiles
    doc = rest // num_groups // row_tiles
    query0 = tl.load(cu_q + doc)
    num_queries = tl.load(cu_q + doc + 1) - query0
    length = tl.load(cu_k + doc + 1) - tl.load(cu_k + doc)
    past = (length - 1) // block_size
    if chunk * UNITS >= past or tile * ROWS >= num_queries * RATIO:
        return
    if PACKED:
        # Blocks of the documents before.
        unit0 = 0
        for first in range(0, doc, DOCS):
            other = first + tl.arange(0, DOCS)
            real = other < doc
            begin = tl.load(cu_k + other, mask=real, other=0)
            end = tl.load(cu_k + other + 1, mask=real, other=0)
            unit0 += tl.sum((end - begin + block_size - 1) // block_size, 0)
    else:
        unit0 = tl.load(unit_start_N + doc)
    dim = tl.arange(0, PADDED_DIM)
    unit = chunk * UNITS + tl.arange(0, UNITS)
    means_at = means + group.to(tl.int64) * stride_mg + tl.cast(unit0, tl.int64) * stride_mu + dim * stride_mk
    mean_ptr = means_at[None, :] + unit.to(tl.int64)[:, None] * stride_mu
    mean = tl.load(mean_ptr, mask=(unit < past)[:, None] & (dim < DIM)[None, :], other=0.0).to(tl.float32)
    if CENTERED:
        center = tl.load(means_at, mask=dim < DIM, other=0.0).to(tl.float32)
        mean -= tl.where(tl.abs(center) < float("inf"), center, 0.0)[None, :]
    row = tile * ROWS + tl.arange(0, ROWS)
    local = row // RATIO
    t = (query0 + local).to(tl.int64)
    head = group * RATIO + row % RATIO
    q_ptr = q + t[:, None] * stride_qt + head.to(tl.int64)[:, None] * stride_qh + dim[None, :] * stride_qk
    q_tile = tl.load(q_ptr, mask=(local < num_queries)[:, None] & (dim < DIM)[None, :], other=0.0)
    if KEEP_FP32:
        s = tl.dot(q_tile.to(tl.float32), tl.trans(mean), input_precision="ieee")
    else:
        s = tl.dot(q_tile, tl.trans(mean.to(q_tile.dtype)), input_precision="ieee")  # [ROWS, UNITS]
    score_ptr = score + (t * (num_groups * RATIO) + head)[:, None] * num_units + unit[None, :]
    tl.store(score_ptr, s, mask=(local < num_queries)[:, None] & (unit < past)[None, :])


@triton.jit
def _choose_kernel(
    score, ids, count, cu_q, cu_k, max_q, num_units, block_size,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, UNITS: tl.constexpr, LATER: tl.constexpr,
):  # fmt: skip
    """The best TOP_K - 1 past blocks of one query and head, ascending, then its own; -1 behind."""
    doc = tl.program_id(0) // max_q
    local = tl.program_id(0) % max_q
    head = tl.program_id(1)
    query0 = tl.load(cu_q + doc)
    num_queries = tl.load(cu_q + doc + 1) - query0
    if local >= num_queries:
        return
    position = local + tl.load(cu_k + doc + 1) - tl.load(cu_k + doc) - num_queries
    own = tl.where(position >= 0, position // block_size, -1)
    row = (query0 + local).to(tl.int64) * tl.num_programs(1) + head
    found = 0
    if TOP_K > 1:
        unit = tl.arange(0, UNITS)
        # -0.0 + 0.0 = +0.0: both zeros must tie.
        value = tl.load(score + row * num_units + unit, mask=unit < own, other=float("nan")) + 0.0
        bits = value.to(tl.int32, bitcast=True)
        # Negative floats order backwards as integers: flip all but the sign.
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        rank = unit if LATER else 0x7FFFFFFF - unit
        key = tl.where(value == value, (bits.to(tl.int64) << 32) + rank.to(tl.int64), NO_KEY)
        least = tl.max(key, 0)
        for _ in range(TOP_K - 2):
            least = tl.max(tl.where(key < least, key, NO_KEY), 0)
        chosen = (key >= least) & (key != NO_KEY)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(ids + row * TOP_K + place, unit, mask=chosen)
        found = tl.sum(chosen.to(tl.int32), 0)
    slot = tl.arange(0, PADDED_K)
    tail = tl.where(slot == found, own, -1)
    tl.store(ids + row * TOP_K + slot, tail, mask=(slot >= found) & (slot < TOP_K))
    tl.store(count + row, tl.where(own >= 0, found + 1, 0))
