# ruff: noqa: RUF005  (Triton cannot unpack tuples)
# mypy: disable-error-code="assignment"
"""The sweep of early queries for Hopper: warps that load keys and values beside warps that multiply.

It does the work of `early_triton._early_kernel` (which see) for blocks of whole tiles, by explicit WGMMA. A program
works on one tile of queries after the other. While the tensor cores multiply weights with values, a multiplying
warpgroup computes the weights of the next tile of keys. There are two of these, each with half the rows and at its own
pace, so that one keeps the tensor cores busy while the other computes weights. The loading warps run ahead, into the
next tile of queries too.

Legend: T queries, H query heads, G KV heads, K head dim of q, k and v, U units.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pithwood.ops.attend.forward_hopper import _exp2
from pithwood.ops.gluon_support import async_load, thread_barrier

EARLY_TILE = 128
"""Queries, and keys, of a tile."""
GROUPS = gl.constexpr(2)
"""Groups of multiplying warps."""


def early_hopper_tiles(dim: int) -> dict[str, int]:
    """Tile shape and launch options. Registers are divided at run time: each group of multiplying warps gets REGISTERS
    per thread, the loading warps keep LOAD_REGISTERS."""
    multiplying, loading = 4, 4
    registers = 65536 // (32 * (2 * multiplying + loading)) // 8 * 8
    shape = {"TILE": EARLY_TILE, "STAGES": 2 if dim > 64 else 4, "PIECE": 32, "LOAD_WARPS": loading}
    return {**shape, "REGISTERS": 232, "LOAD_REGISTERS": 40, "num_warps": multiplying, "maxnreg": registers}


@gluon.jit
def _look_up(item, tables, heads, num_tiles, TILES: gl.constexpr):
    """What the tables hold of a work item's unit.

    Last tiles come first: in a document they are the longest. Heads of one KV head run side by side, for its keys.
    """
    key_start_U, key_count_U, position_U, query_start_U, query_low_U, query_high_U = tables
    unit = gl.maximum(num_tiles - 1 - item // heads, 0) // TILES
    return (
        gl.load(key_start_U + unit), gl.load(key_count_U + unit), gl.load(position_U + unit),
        gl.load(query_start_U + unit), gl.load(query_low_U + unit), gl.load(query_high_U + unit),
    )  # fmt: skip


@gluon.jit
def _tile_of_queries(
    item, row, heads, num_tiles, early, BLOCK: gl.constexpr, TILE: gl.constexpr
):  # fmt: skip
    """(head, first query, low, high, position of the first query, key position past the last, packed index of the
    document's first key, number of tiles of keys) of a work item; no tile of keys if it is none."""
    key_start, key_count, position, query_start, low, high = row
    offset = ((num_tiles - 1 - item // heads) % (BLOCK // TILE)) * TILE
    query = query_start + offset
    some = (offset < key_count) & (position < early * BLOCK) & (query < high) & (query + TILE > low)
    count = gl.where(some, (position + offset) // TILE + 1, 0)
    return item % heads, query, low, high, position + offset, position + key_count, key_start - position, count


@gluon.jit
def _load(
    q, k, v, tables, strides, heads, num_tiles, early, rings, barriers,
    K: gl.constexpr, HEAD_RATIO: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    """Fill the rings: step g of a tile of queries brings its g-th tile of keys and the values of the one before."""
    q_ring, k_ring, v_ring = rings
    full, empty, q_empty = barriers
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg = strides
    TILE: gl.constexpr = k_ring.shape[1]
    ROWS: gl.constexpr = q_ring.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    lane = gl.arange(0, PIECE, layout=gl.SliceLayout(1, LAYOUT))
    base = 0
    number = 0
    for item in range(gl.program_id(0), num_tiles * heads, gl.num_programs(0)):
        row = _look_up(item, tables, heads, num_tiles, BLOCK // TILE)
        head, query, low, high, _, end, first_key, count = _tile_of_queries(
            item, row, heads, num_tiles, early, BLOCK, TILE
        )
        if count > 0:
            group = (head // HEAD_RATIO).to(gl.int64)
            q_at = q + head.to(gl.int64) * stride_qh
            k_at = k + group * stride_kg + first_key.to(gl.int64) * stride_kt
            v_at = v + group * stride_vg + first_key.to(gl.int64) * stride_vt
            q_slot = number % 2
            mbarrier.wait(q_empty.index(q_slot), (number // 2 & 1) ^ 1)
            for piece in gl.static_range(TILE // PIECE):
                t = query + piece * PIECE + lane
                at = gl.expand_dims(t.to(gl.int64) * stride_qt, 1) + dim
                inside = gl.expand_dims((t >= low) & (t < high), 1)
                q_part = q_ring.index(q_slot * GROUPS + piece * PIECE // ROWS).slice(piece * PIECE % ROWS, PIECE)
                async_load(q_part, q_at + at, mask=inside)
            for step in range(count + 1):
                slot = (base + step) % STAGES
                mbarrier.wait(empty.index(slot), ((base + step) // STAGES & 1) ^ 1)
                for piece in gl.static_range(TILE // PIECE):
                    # The rows' own keys come first.
                    key = (count - 1 - step) * TILE + piece * PIECE + lane
                    at = gl.expand_dims(key.to(gl.int64) * stride_kt, 1) + dim
                    inside = gl.expand_dims((key >= 0) & (key < end), 1)
                    part = k_ring.index(slot).slice(piece * PIECE, PIECE)
                    async_load(part, k_at + at, mask=inside)
                    key += TILE
                    at = gl.expand_dims(key.to(gl.int64) * stride_vt, 1) + dim
                    inside = gl.expand_dims((key < end) & (step > 0), 1)
                    part = v_ring.index(slot).slice(piece * PIECE, PIECE)
                    async_load(part, v_at + at, mask=inside)
                async_copy.commit_group()
                if STAGES == 2:
                    async_copy.wait_group(0)
                    fence_async_shared()
                    thread_barrier()
                    mbarrier.arrive(full.index(slot), count=1)
                elif step > 0:
                    # The step before is there, while this one is on its way.
                    async_copy.wait_group(1)
                    fence_async_shared()
                    thread_barrier()
                    mbarrier.arrive(full.index((base + step - 1) % STAGES), count=1)
            if STAGES > 2:
                async_copy.wait_group(0)
                fence_async_shared()
                thread_barrier()
                mbarrier.arrive(full.index((base + count) % STAGES), count=1)
            base += count + 1
            number += 1


@gluon.jit
def _multiply(
    o, lse, ids, tables, strides, heads, num_tiles, early, scale_log2, rings, barriers,
    TOP_K: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Attend with every tile of queries to all keys up to it, and store the rows: the MINE-th of GROUPS parts."""
    q_ring, k_ring, v_ring = rings
    full, empty, q_empty = barriers
    stride_ot, stride_oh, stride_lt, stride_it, stride_ih = strides
    TILE: gl.constexpr = k_ring.shape[1]
    K: gl.constexpr = k_ring.shape[2]
    ROWS: gl.constexpr = q_ring.shape[1]
    PARTS: gl.constexpr = BLOCK // TILE
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TILE, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, K, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    dtype: gl.constexpr = k_ring.dtype
    no_s = gl.zeros([ROWS, TILE], gl.float32, S)
    row = MINE * ROWS + gl.arange(0, ROWS, layout=ROW)
    out_row = MINE * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    out_dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, OUT)), 0)
    base = 0
    number = 0
    next_unit = _look_up(gl.program_id(0), tables, heads, num_tiles, PARTS)
    for item in range(gl.program_id(0), num_tiles * heads, gl.num_programs(0)):
        head, query, low, high, position, _, _, count = _tile_of_queries(
            item, next_unit, heads, num_tiles, early, BLOCK, TILE
        )
        # On its way while this item is worked on.
        next_unit = _look_up(item + gl.num_programs(0), tables, heads, num_tiles, PARTS)
        if count > 0:
            head64 = head.to(gl.int64)
            t = query + row
            real = (t >= low) & (t < high)
            id_at = ids + head64 * stride_ih + t.to(gl.int64) * stride_it
            units = ()
            for slot_k in gl.static_range(TOP_K):
                units = units + (gl.load(id_at + slot_k, mask=real, other=-1),)
            q_tile = q_ring.index(number % 2 * GROUPS + MINE)
            slot = base % STAGES
            mbarrier.wait(full.index(slot), base // STAGES & 1)
            s = warpgroup_mma(q_tile, k_ring.index(slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(empty.index(slot), count=1)
            # The tile's first key is seen by all its rows, so that no row is without a finite maximum.
            column = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
            s = gl.where(gl.expand_dims(column, 0) <= gl.expand_dims(row, 1), s, float("-inf"))
            top = gl.max(s, 1) * scale_log2
            weight = _exp2(s * scale_log2 - gl.expand_dims(top, 1))
            total = gl.sum(weight, 1)
            p = gl.convert_layout(weight.to(dtype), P)
            acc = gl.zeros([ROWS, K], gl.float32, ACC)
            own = position // BLOCK
            bits = gl.zeros([ROWS], gl.int64, ROW)
            for slot_k in gl.static_range(TOP_K):
                chosen = (units[slot_k] >= 0) & (units[slot_k] <= own)
                # The ids of a row differ, so the sum of their bits is their set.
                bits += chosen.to(gl.int64) << gl.where(chosen, units[slot_k], 0).to(gl.int64)
            for step in range(1, count):
                slot = (base + step) % STAGES
                mbarrier.wait(full.index(slot), (base + step) // STAGES & 1)
                s = warpgroup_mma(q_tile, k_ring.index(slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
                acc = warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)
                member = ((bits >> ((count - 1 - step) // PARTS)) & 1) != 0
                s = warpgroup_mma_wait(1, deps=(s,))
                new_top = gl.where(member, gl.maximum(top, gl.max(s, 1) * scale_log2), top)
                # Rows that did not choose the unit set it against +inf: all weights are zero.
                weight = _exp2(s * scale_log2 - gl.expand_dims(gl.where(member, new_top, float("inf")), 1))
                shrink = _exp2(top - new_top)
                total = total * shrink + gl.sum(weight, 1)
                top = new_top
                next_p = gl.convert_layout(weight.to(dtype), P)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(slot), count=1)
                acc = acc * gl.expand_dims(gl.convert_layout(shrink, ACC_ROW), 1)
                p = next_p
            slot = (base + count) % STAGES
            mbarrier.wait(full.index(slot), (base + count) // STAGES & 1)
            acc = warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(slot), count=1)
            # A row without its own unit breaks the promise of the selection.
            total = gl.where(((bits >> own) & 1) != 0, total, float("nan"))
            gl.store(
                lse + head + t.to(gl.int64) * stride_lt, (top + gl.log2(total)) * 0.6931471805599453, mask=real
            )  # fmt: skip
            acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, ACC_ROW), 1)
            # Q is not needed any more: its tile takes the rows, for stores of whole lines.
            q_tile.store(acc.to(dtype))
            out = q_tile.load(OUT)
            out_t = query + out_row
            inside = gl.expand_dims((out_t >= low) & (out_t < high), 1)
            o_at = o + head64 * stride_oh + (gl.expand_dims(out_t.to(gl.int64) * stride_ot, 1) + out_dim)
            gl.store(o_at, out, mask=inside)
            # The loading warps fill the tile by another way than these stores.
            fence_async_shared()
            thread_barrier()
            mbarrier.arrive(q_empty.index(number % 2), count=1)
            base += count + 1
            number += 1


@gluon.jit
def _early_hopper_kernel(
    q, k, v, o, lse, ids,
    key_start_U, key_count_U, position_U, query_start_U, query_low_U, query_high_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_ot, stride_oh, stride_lt,
    stride_it, stride_ih, num_tiles, heads, early, scale_log2,
    K: gl.constexpr, HEAD_RATIO: gl.constexpr, TOP_K: gl.constexpr, BLOCK: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, LOAD_WARPS: gl.constexpr,
    REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """o and lse of all queries that stand in the first `early` units of their documents. Arguments as of
    `early_triton._early_kernel`; BLOCK is a multiple of TILE, and scale_log2 > 0."""
    dtype: gl.constexpr = q.dtype.element_ty
    ROWS: gl.constexpr = TILE // GROUPS
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(dtype, [2 * GROUPS, ROWS, K], SHARED)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, K], SHARED)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, K], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(q_empty.index(i), count=GROUPS)
    tables = (key_start_U, key_count_U, position_U, query_start_U, query_low_U, query_high_U)
    strides = (stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg)
    out_strides = (stride_ot, stride_oh, stride_lt, stride_it, stride_ih)
    rings = (q_ring, k_ring, v_ring)
    barriers = (full, empty, q_empty)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    o, lse, ids, tables, out_strides, heads, num_tiles, early, scale_log2, rings, barriers, TOP_K,
                    BLOCK, STAGES, 0,
                ),
            ),
            (
                _multiply,
                (
                    o, lse, ids, tables, out_strides, heads, num_tiles, early, scale_log2, rings, barriers, TOP_K,
                    BLOCK, STAGES, 1,
                ),
            ),
            (
                _load,
                (
                    q, k, v, tables, strides, heads, num_tiles, early, rings, barriers, K, HEAD_RATIO, BLOCK,
                    STAGES, PIECE,
                ),
            ),
        ],
        [num_warps, LOAD_WARPS],
        [REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
