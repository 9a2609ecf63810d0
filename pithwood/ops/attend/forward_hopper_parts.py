"""The key-major forward kernel for Hopper and units of several parts: queries stay, keys and values pass by.

It does the work of `forward_triton._rows_kernel` for selections with an own unit, as `forward_hopper.py` does for units
of one part. One program owns a list chunk and a multiprocessor: two multiplying warpgroups attend with half a tile of
gathered queries each, and loading warps bring the tiles of Q and, in rings that both share, the parts of K and V. While
one warpgroup has its softmax the other has the tensor cores.

Legend: T queries, G KV heads of the slice, K head dim of q, k and v, U units, X lists, P pairs.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pithwood.ops.attend.forward_hopper import (
    _exp2,
    _offsets,
    _out_layout,
    _pairs_of_tile,
    _rows_hopper_kernel,
    _store,
    _work_item,
    hopper_forward_tiles,
)
from pithwood.ops.gluon_support import async_load, thread_barrier

PIECE = gl.constexpr(16)
"""Keys whose addresses the loading warps hold at a time; more would not fit their registers."""


def hopper_parts_tiles() -> dict[str, int]:
    """Tile shape and launch options of `_parts_hopper_kernel`. One program has a multiprocessor; each multiplying warp
    has WORKER_REGISTERS per thread, each loading one LOAD_REGISTERS."""
    registers = {"WORKER_REGISTERS": 224, "LOAD_REGISTERS": 56, "maxnreg": 168}
    return {"ROWS": 128, "KEYS": 128, "CHUNK": 1024, "num_warps": 4, **registers}


@gluon.jit
def _announce(barrier, PENDING: gl.constexpr):
    """Tell those who wait that all copies but the last PENDING groups of them are there."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _load(
    q, k_at, v_at, entry_P, stride_qt, stride_qh, stride_kt, stride_vt, list_start, last, num_tiles,
    q_ring, pair_ring, k_ring, v_ring, fulls, empties,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Fill the rings: for every tile its queries, then all parts of the keys and values.

    Each copy is announced when the next has begun. Q, K and V have two places each.
    """
    q_full, k_full, v_full = fulls
    q_empty, k_empty, v_empty = empties
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    LINE: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    HALF: gl.constexpr = q_ring.shape[1]
    KEYS: gl.constexpr = k_ring.shape[1]
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    key = gl.expand_dims(gl.arange(0, PIECE, layout=LINE), 1)
    first_k = k_at + (key * stride_kt + dim)
    first_v = v_at + (key * stride_vt + dim)
    # Entries are read a tile ahead.
    pair0 = _pairs_of_tile(0, entry_P, list_start, last, HALF, LINE)
    pair1 = _pairs_of_tile(1, entry_P, list_start, last, HALF, LINE)
    count = 0
    for tile in range(num_tiles):
        place = tile % 2
        mbarrier.wait(q_empty.index(place), (tile // 2 & 1) ^ 1)
        pair_ring.index(place * 2).store(pair0)
        pair_ring.index(place * 2 + 1).store(pair1)
        async_load(q_ring.index(place * 2), q + (_offsets(pair0, stride_qt, stride_qh, RATIO, SLOTS) + dim))
        async_load(q_ring.index(place * 2 + 1), q + (_offsets(pair1, stride_qt, stride_qh, RATIO, SLOTS) + dim))
        async_copy.commit_group()
        pair0 = _pairs_of_tile(tile * 2 + 2, entry_P, list_start, last, HALF, LINE)
        pair1 = _pairs_of_tile(tile * 2 + 3, entry_P, list_start, last, HALF, LINE)
        if tile > 0:
            _announce(v_full.index((count - 1) % 2), 1)
        k_ptr = first_k
        v_ptr = first_v
        for part in range(PARTS):
            slot = count % 2
            phase = (count // 2 & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            for piece in gl.static_range(KEYS // PIECE):
                async_load(k_ring.index(slot).slice(piece * PIECE, PIECE), k_ptr)
                k_ptr += PIECE * stride_kt
            async_copy.commit_group()
            if part == 0:
                _announce(q_full.index(place), 1)
            else:
                _announce(v_full.index(slot ^ 1), 1)
            mbarrier.wait(v_empty.index(slot), phase)
            for piece in gl.static_range(KEYS // PIECE):
                async_load(v_ring.index(slot).slice(piece * PIECE, PIECE), v_ptr)
                v_ptr += PIECE * stride_vt
            async_copy.commit_group()
            _announce(k_full.index(slot), 1)
            count += 1
    _announce(v_full.index((count - 1) % 2), 0)


@gluon.jit
def _multiply(
    half, partial_o, partial_lse, scale_log2, num_tiles, q_ring, pair_ring, k_ring, v_ring, fulls, empties,
    PARTS: gl.constexpr, S: gl.constexpr, ACC: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Attend with one half of every tile of queries to the unit's keys and store the results.

    The scores of the next part are asked for before the values of this one are summed, so that they are there when the
    tensor cores have done both.
    """
    q_full, k_full, v_full = fulls
    q_empty, k_empty, v_empty = empties
    ROWS: gl.constexpr = q_ring.shape[1]
    K: gl.constexpr = q_ring.shape[2]
    KEYS: gl.constexpr = k_ring.shape[1]
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    LINE: gl.constexpr = gl.SliceLayout(1, ACC)
    dtype: gl.constexpr = q_ring.dtype
    no_s = gl.zeros([ROWS, KEYS], gl.float32, S)
    count = 0
    for tile in range(num_tiles):
        place = tile % 2
        q_tile = q_ring.index(place * 2 + half)
        mbarrier.wait(q_full.index(place), tile // 2 & 1)
        pair = pair_ring.index(place * 2 + half).load(gl.SliceLayout(1, OUT))
        pair_s = pair_ring.index(place * 2 + half).load(gl.SliceLayout(1, S))
        mbarrier.wait(k_full.index(count % 2), count // 2 & 1)
        s = warpgroup_mma(q_tile, k_ring.index(count % 2).permute((1, 0)), no_s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(count % 2), count=1)
        top = gl.max(s, 1) * scale_log2
        p32 = _exp2(s * scale_log2 - gl.expand_dims(top, 1))
        total = gl.sum(p32, 1)
        p = gl.convert_layout(p32.to(dtype), P)
        o = gl.zeros([ROWS, K], gl.float32, ACC)
        for _ in range(1, PARTS):
            slot = count % 2
            after = slot ^ 1
            mbarrier.wait(k_full.index(after), (count + 1) // 2 & 1)
            s = warpgroup_mma(q_tile, k_ring.index(after).permute((1, 0)), no_s, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), count // 2 & 1)
            o = warpgroup_mma(p, v_ring.index(slot), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(k_empty.index(after), count=1)
            new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
            shrink = _exp2(top - new_top)
            p32 = _exp2(s * scale_log2 - gl.expand_dims(new_top, 1))
            total = total * shrink + gl.sum(p32, 1)
            top = new_top
            o = warpgroup_mma_wait(0, deps=(o,))
            mbarrier.arrive(v_empty.index(slot), count=1)
            o = o * gl.expand_dims(gl.convert_layout(shrink, LINE), 1)
            p = gl.convert_layout(p32.to(dtype), P)
            count += 1
        mbarrier.arrive(q_empty.index(place), count=1)
        slot = count % 2
        mbarrier.wait(v_full.index(slot), count // 2 & 1)
        o = warpgroup_mma(p, v_ring.index(slot), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        count += 1
        _store(partial_o, partial_lse, o, top, total, pair, pair_s, q_tile, K, S, ACC, OUT, False)


@gluon.jit(do_not_specialize=["num_items", "first_list", "num_lists"])
def _parts_hopper_kernel(
    q, k, v, partial_o, partial_lse,
    entry_P, start_X, count_X, item_list, item_chunk, first_item_X, key_start_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    num_items, first_list, num_lists, num_units, rows_per_group, scale_log2,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, WORKER_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """A normalised output and a log2-sum for every pair of one list chunk. Arguments as of
    `forward_triton._rows_kernel` and `_work_item`; every listed unit has BLOCK keys, a multiple of KEYS.
    scale_log2 > 0."""
    x, chunk = _work_item(item_list, item_chunk, first_item_X, num_items, first_list, num_lists)
    if x < 0:
        return
    first = chunk * CHUNK
    group = (x // num_units).to(gl.int64)
    last = gl.minimum(gl.load(count_X + x) - first, CHUNK)
    list_start = gl.load(start_X + x) + first
    key_start = gl.load(key_start_U + x % num_units).to(gl.int64)
    num_tiles = (last + ROWS - 1) // ROWS

    HALF: gl.constexpr = ROWS // 2
    dtype: gl.constexpr = q.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(dtype, [4, HALF, K], TILE)
    k_ring = gl.allocate_shared_memory(dtype, [2, KEYS, K], TILE)
    v_ring = gl.allocate_shared_memory(dtype, [2, KEYS, K], TILE)
    pair_ring = gl.allocate_shared_memory(gl.int32, [4, HALF], LINE)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        # both warpgroups
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)

    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, KEYS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, K, 16])
    OUT: gl.constexpr = _out_layout(K, False)
    out_row = group * rows_per_group
    fulls = (q_full, k_full, v_full)
    empties = (q_empty, k_empty, v_empty)
    out = partial_o + out_row * K
    out_lse = partial_lse + out_row
    k_at = k + group * stride_kg + key_start * stride_kt
    v_at = v + group * stride_vg + key_start * stride_vt
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, out, out_lse, scale_log2, num_tiles, q_ring, pair_ring, k_ring, v_ring, fulls, empties,
                    BLOCK // KEYS, S, ACC, OUT,
                ),
            ),
            (
                _multiply,
                (
                    1, out, out_lse, scale_log2, num_tiles, q_ring, pair_ring, k_ring, v_ring, fulls, empties,
                    BLOCK // KEYS, S, ACC, OUT,
                ),
            ),
            (
                _load,
                (
                    q + group * RATIO * stride_qh, k_at, v_at, entry_P, stride_qt, stride_qh, stride_kt, stride_vt,
                    list_start, last, num_tiles, q_ring, pair_ring, k_ring, v_ring, fulls, empties,
                    K, RATIO, SLOTS, BLOCK // KEYS,
                ),
            ),
        ],
        [num_warps, 4],
        [WORKER_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def hopper_forward(block: int) -> tuple[Any, dict[str, int]]:
    """(kernel, options) of the key-major forward with blocks of this size: up to 128, or a multiple of 128."""
    if block <= 128:
        return _rows_hopper_kernel, hopper_forward_tiles(block)
    return _parts_hopper_kernel, hopper_parts_tiles()
