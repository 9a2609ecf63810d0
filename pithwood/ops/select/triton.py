# ruff: noqa: RUF005  (Triton cannot unpack tuples)
# mypy: disable-error-code="assignment"
"""Block selection on a GPU: gate and top-k in one kernel, in which scores live and die in registers.

A program owns TILE queries of one document and one set of heads. It walks over the document's block means in tiles of
UNITS, multiplies its queries with them (16-bit operands: one chain of WGMMAs with fp32 accumulators) and keeps the
best blocks of each query in a sorted list. The means of a document are read from L2 by every program; queries are read
once and ids written once, so the work is the product and the search:

  product     2 TILE UNITS K flops on the tensor cores
  search      rounds; each takes the best score of every row of the tile, finds its column, and strikes it out: six
              operations a score, which is what costs. A round happens while some row has a score that beats the worst
              of its list: about as many as the list is long in the first tile, three to five later

The list is a tuple of row vectors, not a [TILE, list] matrix. A row vector lies in the registers of the four lanes that
hold the row's accumulators, so that a round needs no shared memory but for its one test whether all rows are done; to
insert is one compare and four selections a slot. Several small programs share a multiprocessor: one multiplies or waits
while another searches.

Tiles are walked in the order in which ties are decided, so a score found later never wins a tie, and a strict
comparison with the list is exact. What must not be chosen is NaN, which no comparison lets through: candidates that are
none, scores struck out, scores that are NaN.

Legend: T packed tokens, N documents, U units (blocks) of all documents, S selections per row, k selected per row, H
query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.offsets_triton import block_offsets, doc_of_row, doc_of_tile, num_tiles

TILE = 64
"""Queries of a program: one warpgroup's WGMMA rows. Fewer rows mean fewer rounds, as the unluckiest row decides."""
UNITS = 128
"""Block means scored at a time, for 16-bit operands: 64 accumulators a thread."""
GATE_WARPS = 4
UNITS_FP32 = 64
DIM_CHUNK_FP32 = 32
"""fp32 operands are multiplied on the CUDA cores, which hold a whole row of a chunk in registers."""
MEANS_WARPS = 4
NO_ID = tl.constexpr(0x7FFFFFFF)
"""Sorts behind every id."""


@torch.library.custom_op("pithwood::select_blocks", mutates_args=())
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
    num_tokens, num_heads, dim = q_THK.shape
    num_kv_heads = s_UGK.shape[1]
    sets = num_kv_heads if per_group else num_heads
    ids_TSk = torch.empty(num_tokens, sets, top_k, dtype=torch.int32, device=q_THK.device)
    count_TS = torch.empty(num_tokens, sets, dtype=torch.int32, device=q_THK.device)
    if ids_TSk.numel() == 0:
        return ids_TSk, count_TS
    num_docs = cu_q.shape[0] - 1
    offsets_N = block_offsets(cu_k, block_size)
    # The mean of a group's queries has more digits than a 16-bit operand; so have means kept in fp32.
    in_fp32 = mean_dtype == "fp32" or per_group or q_THK.dtype == torch.float32
    means_UGK = _as_scored(s_UGK, offsets_N, mean_dtype, q_THK.dtype, torch.float32 if in_fp32 else q_THK.dtype)
    padded_dim = max(triton.next_power_of_2(dim), 16)
    _select_blocks[(num_tiles(num_tokens, num_docs, TILE) * sets,)](
        q_THK,
        means_UGK,
        ids_TSk,
        count_TS,
        cu_q,
        cu_k,
        offsets_N,
        num_docs,
        num_tiles(num_tokens, num_docs, TILE),
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
        TILE=TILE,
        UNITS=UNITS_FP32 if in_fp32 else UNITS,
        num_warps=GATE_WARPS,
    )
    return ids_TSk, count_TS


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


@triton.jit
def _select_blocks(
    q_ptr,
    means_ptr,
    ids_ptr,
    count_ptr,
    cu_q_ptr,
    cu_k_ptr,
    offsets_ptr,
    num_docs,
    num_row_tiles,
    block_size,
    stride_t,
    stride_h,
    stride_k,
    SETS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PER_SET: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    LOG_PADDED_K: tl.constexpr,
    BUDGET: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    LATER: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    DIM_CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
):
    # Heads fastest, for their ids share cache lines; last tiles of the batch first, for in a document they are longest.
    set_ = tl.program_id(0) % SETS
    tile = num_row_tiles - 1 - tl.program_id(0) // SETS
    doc = doc_of_tile(cu_q_ptr, num_docs, tile, TILE)
    q_begin = tl.load(cu_q_ptr + doc)
    q_length = tl.load(cu_q_ptr + doc + 1) - q_begin
    k_length = tl.load(cu_k_ptr + doc + 1) - tl.load(cu_k_ptr + doc)
    first = (tile - q_begin // TILE - doc) * TILE
    if first < q_length:
        shift = k_length - q_length
        # Rows past the document's end repeat its last query, so that they ask for no round of their own.
        row = tl.minimum(first + tl.arange(0, TILE), q_length - 1)
        position = row + shift
        own = tl.where(position >= 0, position // block_size, -1)
        last_position = tl.minimum(first + TILE, q_length) - 1 + shift
        if CAUSAL:
            num_units = tl.where(last_position >= 0, last_position // block_size, 0)
        else:
            num_units = (k_length + block_size - 1) // block_size
        # Below this unit every row may choose every unit.
        open_units = tl.where(first + shift >= 0, (first + shift) // block_size, 0) if CAUSAL else 0

        kv_head = set_ * KV_HEADS // SETS
        q_at = q_ptr + (q_begin + row).to(tl.int64)[:, None] * stride_t + set_.to(tl.int64) * HEADS_PER_SET * stride_h
        means_at = means_ptr + (tl.load(offsets_ptr + doc).to(tl.int64) * KV_HEADS + kv_head) * DIM
        dim = tl.arange(0, PADDED_DIM)
        if DIM_CHUNK == PADDED_DIM:
            q = _load_queries(q_at, dim, stride_h, stride_k, DIM, HEADS_PER_SET, means_ptr.dtype.element_ty)

        values = ()
        ids = ()
        for _ in tl.static_range(BUDGET):
            values = values + (tl.full([TILE], float("nan"), tl.float32),)
            ids = ids + (tl.full([TILE], NO_ID, tl.int32),)

        if BUDGET > 0:
            num_unit_tiles = (num_units + UNITS - 1) // UNITS
            for step in range(0, num_unit_tiles):
                first_unit = (num_unit_tiles - 1 - step if LATER else step) * UNITS
                unit = first_unit + tl.arange(0, UNITS)
                mean_at = means_at + unit.to(tl.int64)[None, :] * (KV_HEADS * DIM)
                if DIM_CHUNK == PADDED_DIM:
                    mean = tl.load(
                        mean_at + dim[:, None], mask=(dim < DIM)[:, None] & (unit < num_units)[None, :], other=0.0
                    )  # [PADDED_DIM, UNITS]
                    score = tl.dot(q, mean, input_precision="ieee")  # [TILE, UNITS]
                else:
                    score = tl.zeros([TILE, UNITS], tl.float32)
                    for chunk in range(0, PADDED_DIM, DIM_CHUNK):
                        some = chunk + tl.arange(0, DIM_CHUNK)
                        q = _load_queries(q_at, some, stride_h, stride_k, DIM, HEADS_PER_SET, tl.float32)
                        mean = tl.load(
                            mean_at + some[:, None], mask=(some < DIM)[:, None] & (unit < num_units)[None, :], other=0.0
                        )  # [DIM_CHUNK, UNITS]
                        score = tl.dot(q, mean, score, input_precision="ieee")
                if not CAUSAL:
                    candidate = (unit < num_units)[None, :]
                    if OWN:
                        candidate = candidate & (unit[None, :] != own[:, None])
                    score = tl.where(candidate, score, float("nan"))
                elif first_unit + UNITS > open_units:
                    score = tl.where(unit[None, :] < own[:, None], score, float("nan"))

                best = tl.max(score, 1)
                # A row is done when its best score is NaN or no better than the last of a full list.
                while tl.max(((best == best) & ~(values[BUDGET - 1] >= best)).to(tl.int32), 0) > 0:
                    if LATER:
                        chosen = tl.max(tl.where(score == best[:, None], unit[None, :], -1), 1)
                    else:
                        chosen = tl.min(tl.where(score == best[:, None], unit[None, :], NO_ID), 1)
                    score = tl.where(unit[None, :] == chosen[:, None], float("nan"), score)
                    values, ids = _insert(values, ids, best, chosen, BUDGET)
                    best = tl.max(score, 1)

        if OWN:
            ids = ids + (tl.where(own >= 0, own, NO_ID),)
        for _ in tl.static_range(PADDED_K - TOP_K):
            ids = ids + (tl.full([TILE], NO_ID, tl.int32),)
        ids = _sort(ids, PADDED_K, LOG_PADDED_K)
        slot = tl.arange(0, PADDED_K)
        chosen_ids = tl.full([TILE, PADDED_K], NO_ID, tl.int32)
        count = tl.zeros([TILE], tl.int32)
        for i in tl.static_range(TOP_K):
            chosen_ids = tl.where((slot == i)[None, :], ids[i][:, None], chosen_ids)
            count += (ids[i] != NO_ID).to(tl.int32)
        real = first + tl.arange(0, TILE) < q_length
        to = (q_begin + row).to(tl.int64) * SETS + set_  # [TILE]
        tl.store(
            ids_ptr + to[:, None] * TOP_K + slot[None, :],
            tl.where(chosen_ids == NO_ID, -1, chosen_ids),
            mask=real[:, None] & (slot < TOP_K)[None, :],
        )
        tl.store(count_ptr + to, count, mask=real)


@triton.jit
def _load_queries(at, dim, stride_h, stride_k, DIM: tl.constexpr, HEADS: tl.constexpr, dtype: tl.constexpr):
    """[TILE, dims] queries at `at` [TILE, 1], or the mean of HEADS heads in fp32."""
    at = at + dim.to(tl.int64)[None, :] * stride_k
    q = tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    if HEADS > 1:
        q = q.to(tl.float32)
        for head in range(1, HEADS):
            q += tl.load(at + head * stride_h, mask=(dim < DIM)[None, :], other=0.0).to(tl.float32)
        q = q / HEADS
    return q.to(dtype)


@triton.jit
def _insert(values, ids, value, id_, COUNT: tl.constexpr):
    """The sorted lists with one score and its unit put before the first that it beats; the last falls off."""
    new_values = ()
    new_ids = ()
    real = value == value
    before = real  # of slot i: the new score goes before slot i - 1, which moves into slot i
    for i in tl.static_range(COUNT):
        here = real & ~(values[i] >= value)
        if i == 0:
            new_values = new_values + (tl.where(here, value, values[0]),)
            new_ids = new_ids + (tl.where(here, id_, ids[0]),)
        else:
            new_values = new_values + (tl.where(before, values[i - 1], tl.where(here, value, values[i])),)
            new_ids = new_ids + (tl.where(before, ids[i - 1], tl.where(here, id_, ids[i])),)
        before = here
    return new_values, new_ids


@triton.jit
def _sort(values, COUNT: tl.constexpr, LOG_COUNT: tl.constexpr):
    """The 2 ** LOG_COUNT row vectors of a tuple in ascending order, row by row: a bitonic network in registers."""
    for log_size in tl.static_range(1, LOG_COUNT + 1):
        for done in tl.static_range(log_size):
            values = _sort_step(values, 2**log_size, 2 ** (log_size - 1 - done), COUNT)
    return values


@triton.jit
def _sort_step(values, SIZE: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    moved = ()
    for i in tl.static_range(COUNT):
        if ((i & STEP) == 0) == ((i & SIZE) == 0):
            moved = moved + (tl.minimum(values[i], values[i ^ STEP]),)
        else:
            moved = moved + (tl.maximum(values[i], values[i ^ STEP]),)
    return moved
