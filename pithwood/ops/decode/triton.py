"""Decoding on a GPU: the keys of a document and KV head are split over programs, whose parts are then merged.

A decode step has few queries, so its time is that of reading keys and values once. A program takes a piece of a
document's keys for one KV head and up to 64 rows, a row being a query and one of the KV head's query heads: they share
what is read. Its product has 16 rows at least; what the tensor cores do with empty ones costs nothing beside the
reading. Per row and piece a normalised fp32 output and a log2-sum go to memory; the merge reads those of its row.

  all keys      Pieces are equal stretches of the document. Their length is such that the programs of the batch fill
                the GPU a few times over, by the bound `max_k`.
  selection     Pieces are units or equal parts of large ones. A row's parts lie by its slots: the list of what to read
                is the ids themselves. Every (row, slot) has programs; those whose unit an earlier row has selected too
                end at once, the first serves them all. A unit is read once, no list is built, no order is found.

Nothing is read on the host: grids depend on shapes and on the packing's bounds, programs past a document's end end at
once. Sums have one order, so results repeat bit for bit.

Legend: T queries, N documents, H query heads, G KV heads, K query/key head dim, V value head dim, k ids per query, P
pieces per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

LOG2_E = 1.4426950408889634
PROGRAMS_PER_CORE = 4
"""Programs wanted per streaming multiprocessor, of which three run at a time."""
CORES_ON_CPU = 4
"""Stands for the multiprocessors in the interpreter."""
LEAST_PIECE = 128
MOST_PIECE = 4096
"""Keys per piece: below, a program's start and its part's way through memory cost more than the reading; above, the
last programs to finish leave the GPU idle."""
MERGE_ELEMENTS = 4096
"""Elements of parts that a program of the merge reads at a time."""
MANY_PIECES = 16
"""From more pieces on, 32 channels have a merge program of their own."""


class Tiles(NamedTuple):
    """Most rows of a program, keys per step of it, and launch options."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles_for(dim: int, element_size: int) -> Tiles:
    """Of the pieces' kernel, by the larger head dim: at 128 and few rows three programs share a multiprocessor, each
    with two steps' keys and values under way (72 KiB)."""
    if element_size == 4:
        return Tiles(16, 32, 4, 1)
    return Tiles(64, 64 if dim <= 128 else 32, 4, 3)


def piece_keys(num_pairs: int, keys: int, cores: int) -> int:
    """Keys per piece where num_pairs stretches (documents or units, by KV heads) of `keys` keys are to be read."""
    wanted = max(num_pairs * keys // (cores * PROGRAMS_PER_CORE), 1)
    return max(min(triton.next_power_of_2(wanted), MOST_PIECE), LEAST_PIECE)


@operator("decode_split")
def decode_split(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    ids_THk: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    key_start_N: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    unit: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o like q, lse [T, H] fp32) as `decode_attend` promises; ids None: all keys. Can be captured in a CUDA graph."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THK, k_TGK, v_TGV))
    num_queries, heads, dim = q.shape
    groups, value_dim = v.shape[1:]
    o = q.new_empty(num_queries, heads, value_dim)
    lse = torch.empty(num_queries, heads, dtype=torch.float32, device=q.device)
    num_docs, max_q = cu_q.shape[0] - 1, min(max_q, num_queries)
    if o.numel() == 0 or lse.numel() == 0:
        return o, lse
    if num_docs == 0 or k.shape[0] == 0 or max_k == 0 or max_q == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    ratio = heads // groups
    tiles = tiles_for(max(dim, value_dim), q.element_size())
    # More rows than a program takes are worked on in tiles, each reading the keys anew.
    rows = max(16, min(tiles.rows, triton.next_power_of_2(max_q * ratio)))
    row_tiles = triton.cdiv(max_q * ratio, rows)
    tile_rows = min(rows, max_q * ratio)
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else CORES_ON_CPU
    if ids_THk is None:
        top_k, size = 1, piece_keys(num_docs * groups, min(max_k, k.shape[0]), cores)
        parts = triton.cdiv(min(max_k, k.shape[0]), size)
        items = parts
        ids_strides = (0, 0)
    else:
        ids_THk = ids_THk if ids_THk.stride(-1) == 1 else ids_THk.contiguous()
        top_k, reach = ids_THk.shape[2], min(unit, max_k)
        if top_k == 0:
            return o.zero_(), lse.fill_(float("-inf"))
        # Counted as if every row selected alone: the own unit and what heads share is little of it.
        size = min(piece_keys(num_docs * groups * tile_rows * top_k, reach, cores), reach)
        parts = triton.cdiv(reach, size)
        items = tile_rows * top_k * parts
        ids_strides = (ids_THk.stride(0), ids_THk.stride(1))
    num_pieces = top_k * parts
    partial_o = torch.empty(num_queries * heads, num_pieces, value_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(num_queries * heads, num_pieces, dtype=torch.float32, device=q.device)
    key_start_N = cu_k if key_start_N is None else key_start_N
    v_pad = max(16, triton.next_power_of_2(value_dim))
    shared = {"V": value_dim, "SELECTED": ids_THk is not None, "UNIT": unit, "CAUSAL": causal}
    _pieces_kernel[(num_docs * row_tiles * groups * items,)](
        q, k, v, partial_o, partial_lse, ids_THk, cu_q, cu_k, key_start_N,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *ids_strides,
        row_tiles, groups, items, parts, size, num_pieces, scale * LOG2_E, **shared,
        K=dim, K_PAD=max(16, triton.next_power_of_2(dim)), V_PAD=v_pad, TOP_K=top_k,
        TOP_K_PAD=triton.next_power_of_2(top_k), RATIO=ratio, ROWS=rows, KEYS=tiles.keys, STAGES=tiles.stages,
        PRECISION="ieee", num_warps=tiles.warps, num_stages=1,
    )  # fmt: skip
    channels = v_pad if num_pieces <= MANY_PIECES else min(v_pad, 32)
    _merge_kernel[(num_docs * max_q, heads, triton.cdiv(value_dim, channels))](
        o, lse, partial_o, partial_lse, ids_THk, cu_q, cu_k, *ids_strides, max_q, parts, size, num_pieces, **shared,
        CHANNELS=channels, PIECES=min(MERGE_ELEMENTS // channels, triton.next_power_of_2(num_pieces)), num_warps=4,
    )  # fmt: skip
    return o, lse


@decode_split.register_fake
def _(q_THK, k_TGK, v_TGV, ids_THk, cu_q, cu_k, key_start_N, max_q, max_k, causal, unit, scale):
    num_queries, heads, _ = q_THK.shape
    o = q_THK.new_empty(num_queries, heads, v_TGV.shape[2])
    return o, q_THK.new_empty(num_queries, heads, dtype=torch.float32)


@triton.jit
def _pieces_kernel(
    q, k, v, partial_o, partial_lse, ids, cu_q, cu_k, key_start_N,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_it, stride_ih,
    row_tiles, num_groups, items, parts, size, num_pieces, scale_log2,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    SELECTED: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows to one piece of keys: a normalised fp32 output and a log2-sum per row that sees it.

    Part p of a row is that of the piece p * size of its document, or of slot p // parts and its unit's piece p % parts.
    """
    item = tl.program_id(0) % items
    rest = tl.program_id(0) // items
    group = rest % num_groups
    tile = rest // num_groups % row_tiles
    doc = rest // num_groups // row_tiles
    query0 = tl.load(cu_q + doc)
    num_queries = tl.load(cu_q + doc + 1) - query0
    if SELECTED:
        mine = item // parts // TOP_K
        if (tile * ROWS + mine) // RATIO >= num_queries:
            return
    length = tl.load(cu_k + doc + 1) - tl.load(cu_k + doc)
    row = tl.arange(0, ROWS)
    local = (tile * ROWS + row) // RATIO
    # A row sees the keys before its reach; rows past the document's queries and queries before its first key see none.
    reach = tl.where(local < num_queries, local + length - num_queries + 1, 0)
    if not CAUSAL:
        reach = tl.where(local < num_queries, length, 0)
    t = (query0 + local).to(tl.int64)
    head = group * RATIO + (tile * ROWS + row) % RATIO
    if SELECTED:
        part = item % parts
        slot = tl.arange(0, TOP_K_PAD)
        id_ptr = ids + t[:, None] * stride_it + head[:, None].to(tl.int64) * stride_ih + slot[None, :]
        id_tile = tl.load(id_ptr, mask=(local < num_queries)[:, None] & (slot < TOP_K)[None, :], other=-1)
        at_mine = (row == mine)[:, None] & (slot == item // parts % TOP_K)[None, :]
        chosen = tl.max(tl.max(tl.where(at_mine, id_tile, -1), 1), 0)
        # Units past the document's end do not exist; their keys' numbers might overflow.
        chosen = tl.where(chosen < (length + UNIT - 1) // UNIT, chosen, -1)
        same = id_tile == chosen
        begin = chosen * UNIT + part * size
        end = tl.minimum(begin + size, tl.minimum((chosen + 1) * UNIT, length))
        sees = (tl.max(same.to(tl.int32), 1) > 0) & (begin < reach) & (chosen >= 0)
        piece = tl.max(tl.where(same, slot[None, :], 0), 1) * parts + part
        # The first row that selected the unit works for all.
        works = tl.min(tl.where(sees, row, ROWS), 0) == mine
    else:
        begin = item * size
        end = tl.minimum(begin + size, length)
        sees = begin < reach
        piece = row * 0 + item
        works = tl.max(reach, 0) > begin
    if not works:
        return
    end = tl.minimum(end, tl.max(reach, 0))
    key_start = tl.load(key_start_N + doc).to(tl.int64)
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    q_ptr = q + t[:, None] * stride_qt + head[:, None].to(tl.int64) * stride_qh + dim_k[None, :]
    q_tile = tl.load(q_ptr, mask=(local < num_queries)[:, None] & (dim_k < K)[None, :], other=0.0)
    k_at = k + group.to(tl.int64) * stride_kg + key_start * stride_kt
    v_at = v + group.to(tl.int64) * stride_vg + key_start * stride_vt
    limit = tl.where(sees, tl.minimum(reach, end), 0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_PAD), tl.float32)
    for key0 in tl.range(begin, end, KEYS, num_stages=STAGES):
        key = key0 + tl.arange(0, KEYS)
        real = (key < end)[:, None]
        key_row = key.to(tl.int64)[:, None]
        k_tile = tl.load(k_at + key_row * stride_kt + dim_k[None, :], mask=real & (dim_k < K)[None, :], other=0.0)
        v_tile = tl.load(v_at + key_row * stride_vt + dim_v[None, :], mask=real & (dim_v < V)[None, :], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2  # [ROWS, KEYS]
        s = tl.where(key[None, :] < limit[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # Rows that do not take part see nothing: -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    at = (t * (num_groups * RATIO) + head) * num_pieces + piece
    o_ptr = partial_o + at[:, None] * V + dim_v[None, :]
    safe = tl.where(sees, total, 1.0)
    tl.store(o_ptr, acc / safe[:, None], mask=sees[:, None] & (dim_v < V)[None, :])
    tl.store(partial_lse + at, top + tl.log2(safe), mask=sees)


@triton.jit
def _merge_kernel(
    o, lse, partial_o, partial_lse, ids, cu_q, cu_k, stride_it, stride_ih, max_q, parts, size, num_pieces,
    V: tl.constexpr, SELECTED: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """CHANNELS of one query and head: its parts joined. Which parts exist follows from the ids and offsets."""
    doc = tl.program_id(0) // max_q
    local = tl.program_id(0) % max_q
    head = tl.program_id(1)
    query0 = tl.load(cu_q + doc)
    num_queries = tl.load(cu_q + doc + 1) - query0
    if local < num_queries:
        length = tl.load(cu_k + doc + 1) - tl.load(cu_k + doc)
        reach = local + length - num_queries + 1
        if not CAUSAL:
            reach = length
        t = (query0 + local).to(tl.int64)
        row = t * tl.num_programs(1) + head
        dim_v = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        top = float("-inf")
        total = 0.0
        acc = tl.zeros((CHANNELS,), tl.float32)
        for first in range(0, num_pieces, PIECES):
            piece = first + tl.arange(0, PIECES)
            real = piece < num_pieces
            if SELECTED:
                id_ptr = ids + t * stride_it + head.to(tl.int64) * stride_ih + piece // parts
                chosen = tl.load(id_ptr, mask=real, other=-1)
                chosen = tl.where(chosen < (length + UNIT - 1) // UNIT, chosen, -1)
                seen = (chosen >= 0) & (chosen * UNIT + piece % parts * size < reach)
            else:
                seen = real & (piece * size < reach)
            at = row * num_pieces + piece
            part = tl.load(partial_lse + at, mask=seen, other=float("-inf"))
            o_ptr = partial_o + at[:, None] * V + dim_v[None, :]
            o_part = tl.load(o_ptr, mask=seen[:, None] & (dim_v < V)[None, :], other=0.0)
            new_top = tl.maximum(top, tl.max(part, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - base)
            weight = tl.exp2(part - base)
            total = total * shrink + tl.sum(weight, 0)
            acc = acc * shrink + tl.sum(o_part * weight[:, None], 0)
            top = new_top
        some = total > 0
        total = tl.where(some, total, 1.0)
        tl.store(o + row * V + dim_v, (acc / total).to(o.dtype.element_ty), mask=dim_v < V)
        if tl.program_id(2) == 0:
            tl.store(lse + row, (top + tl.log2(total)) * 0.6931471805599453)
