# mypy: disable-error-code="assignment"
"""The key-major backward kernel for Hopper at small head dims: each multiplying warpgroup goes at its own pace.

It does the work of `backward_hopper._keys_hopper_kernel` (which see). At head dim 64 the accumulators of a whole list
chunk leave registers free, and computing weights takes as long as the products. So two multiplying warpgroups, each
with half the keys, share nothing but the rows that they read: while one computes weights, the other's products keep the
tensor cores busy. A third warpgroup multiplies the handed-on dS with the keys and adds dQ to memory. Programs stay for
the whole launch and take one list chunk after the other; the gathering warps are already at the next one's keys while
the last rows of this one are worked on.

Legend: T queries, H query heads, G KV heads of the slice, K head dim of q, k and v, U units, X lists, P pairs.
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

from pithwood.ops.attend.backward_hopper import _rows_of_tile
from pithwood.ops.attend.backward_triton import LOG2_E
from pithwood.ops.attend.forward_hopper import _exp2
from pithwood.ops.gluon_support import async_load, thread_barrier

HALVES = gl.constexpr(2)
"""Multiplying warpgroups; each has half the keys."""
FIELDS = gl.constexpr(8)
"""Numbers that the gathering warps note of a work item for the others."""
ROW_SLOTS = gl.constexpr(8)
"""Tiles whose row numbers are kept: the adding warps may be three behind the multiplying ones, which are at most STAGES
behind the gathering ones."""


def hopper_apart_tiles() -> dict[str, int]:
    """Tile shape and launch options. The warps' registers are divided anew at run time."""
    registers = {"REGISTERS": 176, "ADD_REGISTERS": 80, "GATHER_REGISTERS": 80, "maxnreg": 128}
    return {"ROWS": 64, "STAGES": 4, "num_warps": 4, **registers}


@gluon.jit
def _note(notes, at, value):
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    notes.index(at).store(gl.zeros([1], gl.int32, LINE) + value)


@gluon.jit
def _noted(notes, at):
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(notes.index(at).load(LINE), 0)


@gluon.jit
def _copy_half(target, at, first, count, stride_t):
    """Begin to copy rows of a unit from `first` on, zero past its end."""
    HALF: gl.constexpr = target.shape[0]
    K: gl.constexpr = target.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    key = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
    inside = gl.expand_dims(key < count, 1)
    async_load(target, at + (gl.expand_dims(key.to(gl.int64) * stride_t, 1) + dim), mask=inside)


@gluon.jit
def _copy_rows(target, at, row, stride_t, stride_h, RATIO: gl.constexpr):
    """Begin to copy rows `t * RATIO + head` of Q or dO; zero where there is none."""
    K: gl.constexpr = target.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    to = (row // RATIO).to(gl.int64) * stride_t + row % RATIO * stride_h
    async_load(target, at + (gl.expand_dims(to, 1) + dim), mask=gl.expand_dims(row >= 0, 1))


@gluon.jit
def _gather(
    pointers, strides, lists, units, counter, num_items, num_units, rings, kv_rings, notes, barriers,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, PARTS: gl.constexpr, OWN_TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take work items until there are none; of each, note what the other warps need, and fill the rings with its keys
    and values and with tiles of Q, dO, log-sums, delta and row numbers. Copies announce themselves, and these warps go
    on. Rows that are none are zero throughout, and so add nothing."""
    q, k, v, do, lse, delta = pointers
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dt, stride_dh, stride_lt = strides
    entry_P, start_X, count_X, hot_X, item_list, item_chunk = lists
    key_start_U, key_count_U, query_start_U, query_low_U, query_high_U = units
    q_ring, do_ring, lse_ring, delta_ring, row_ring = rings
    k_ring, v_ring = kv_rings
    full, empty, kv_full, kv_empty = barriers
    WARPS: gl.constexpr = gl.num_warps()
    # Row numbers twice: a thread for each row, and the threads that copy a row.
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    WIDE: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [256 // K, K // 8], [WARPS, 1], [1, 0]))
    HALF: gl.constexpr = KEYS // HALVES
    item = gl.program_id(0)
    x = gl.load(item_list + item // PARTS, mask=item < num_items, other=-1)
    number = 0
    base = 0
    while x >= 0:
        place = number % 2
        chunk = gl.load(item_chunk + item // PARTS)
        part = item % PARTS
        group = x // num_units
        unit = x % num_units
        key_start = gl.load(key_start_U + unit)
        key_count = gl.load(key_count_U + unit)
        hot = gl.load(hot_X + x)
        first = chunk * CHUNK
        rows_left = gl.minimum(gl.load(count_X + x) - first, CHUNK)
        # Queries before this part of the unit see none of its keys.
        first_tile = part * KEYS // ROWS
        own_tiles = gl.where(chunk == 0, (OWN_TILES - first_tile) * RATIO, 0)
        list_tiles = (rows_left + ROWS - 1) // ROWS
        num_tiles = list_tiles + own_tiles
        work = (
            list_tiles, own_tiles, first_tile, gl.load(query_start_U + unit), gl.load(query_low_U + unit),
            gl.load(query_high_U + unit), gl.load(start_X + x) + first, rows_left,
        )  # fmt: skip
        row = _rows_of_tile(0, work, entry_P, RATIO, SLOTS, BLOCK, ROWS, LINE)
        wide = _rows_of_tile(0, work, entry_P, RATIO, SLOTS, BLOCK, ROWS, WIDE)
        group64 = group.to(gl.int64)
        head0 = group64 * RATIO

        mbarrier.wait(kv_empty.index(place), (number // 2 & 1) ^ 1)
        k_at = k + group64 * stride_kg + key_start.to(gl.int64) * stride_kt
        v_at = v + group64 * stride_vg + key_start.to(gl.int64) * stride_vt
        for half in gl.static_range(HALVES):
            first_key = part * KEYS + half * HALF
            _copy_half(k_ring.index(place * HALVES + half), k_at, first_key, key_count, stride_kt)
            _copy_half(v_ring.index(place * HALVES + half), v_at, first_key, key_count, stride_vt)
        async_copy.mbarrier_arrive(kv_full.index(place), increment_count=False)
        at = place * FIELDS
        _note(notes, at, list_tiles)
        _note(notes, at + 1, own_tiles)
        _note(notes, at + 2, first_tile)
        _note(notes, at + 3, part)
        _note(notes, at + 4, group)
        _note(notes, at + 5, key_start)
        _note(notes, at + 6, key_count)
        _note(notes, at + 7, hot)
        thread_barrier()
        mbarrier.arrive(kv_full.index(place), count=1)
        # The next item's list is known by the time that this one's tiles are on their way.
        item = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        next_x = gl.load(item_list + item // PARTS, mask=item < num_items, other=-1)

        q_at = q + head0 * stride_qh
        do_at = do + head0 * stride_dh
        lse_at = lse + head0
        delta_at = delta + head0
        for tile in range(num_tiles):
            slot = (base + tile) % STAGES
            next_row = _rows_of_tile(tile + 1, work, entry_P, RATIO, SLOTS, BLOCK, ROWS, LINE)
            next_wide = _rows_of_tile(tile + 1, work, entry_P, RATIO, SLOTS, BLOCK, ROWS, WIDE)
            mbarrier.wait(empty.index(slot), ((base + tile) // STAGES & 1) ^ 1)
            _copy_rows(q_ring.index(slot), q_at, wide, stride_qt, stride_qh, RATIO)
            _copy_rows(do_ring.index(slot), do_at, wide, stride_dt, stride_dh, RATIO)
            sum_at = (row // RATIO).to(gl.int64) * stride_lt + row % RATIO
            async_load(lse_ring.index(slot), lse_at + sum_at, mask=row >= 0)
            async_load(delta_ring.index(slot), delta_at + sum_at, mask=row >= 0)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            row_ring.index((base + tile) % ROW_SLOTS).store(row)
            thread_barrier()
            mbarrier.arrive(full.index(slot), count=1)
            row = next_row
            wide = next_wide
        base += num_tiles
        number += 1
        x = next_x
    place = number % 2
    mbarrier.wait(kv_empty.index(place), (number // 2 & 1) ^ 1)
    async_copy.mbarrier_arrive(kv_full.index(place), increment_count=False)
    _note(notes, place * FIELDS, -1)
    thread_barrier()
    mbarrier.arrive(kv_full.index(place), count=1)


@gluon.jit
def _step(
    g, dk, dv, own, first_row, at_key, k_tile, v_tile, ds_ring, rings, barriers, scale_log2,
    MINE: gl.constexpr, S: gl.constexpr, ACC: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(dk, dv) after tile g. own: it holds the unit's own queries, from first_row on."""
    q_ring, do_ring, lse_ring, delta_ring = rings
    full, empty, ds_full, ds_empty = barriers
    ROWS: gl.constexpr = q_ring.shape[1]
    KEYS: gl.constexpr = k_tile.shape[0]
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    slot = g % STAGES
    q_tile = q_ring.index(slot)
    do_tile = do_ring.index(slot)
    zero = gl.zeros([KEYS, ROWS], gl.float32, S)
    mbarrier.wait(full.index(slot), g // STAGES & 1)
    # What copies that announce themselves have written is not yet visible to WGMMA.
    fence_async_shared()
    s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse2 = lse_ring.index(slot).load(gl.SliceLayout(0, S)) * LOG2_E
    s = warpgroup_mma_wait(1, deps=(s,))
    x = s * scale_log2 - gl.expand_dims(lse2, 0)
    if own:
        at_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, S))
        # Keys past the unit's end, which only its own queries meet, are masked with those after a query.
        x = gl.where(gl.expand_dims(at_key, 1) <= gl.expand_dims(at_row, 0), gl.minimum(x, 0.0), float("-inf"))
    p = _exp2(x)
    dv = warpgroup_mma(gl.convert_layout(p.to(q_tile.dtype), P), do_tile, dv, is_async=True)
    d = delta_ring.index(slot).load(gl.SliceLayout(0, S))
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = (p * (dp - gl.expand_dims(d, 0))).to(q_tile.dtype)
    mbarrier.wait(ds_empty.index(g % 2), (g // 2 & 1) ^ 1)
    ds_ring.index(g % 2 * HALVES + MINE).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(g % 2), count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, P), q_tile, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    mbarrier.arrive(empty.index(slot), count=1)
    return dk, dv


@gluon.jit
def _multiply(
    grads, grad_strides, kv_rings, notes, ds_ring, rings, barriers, scale, scale_log2,
    K: gl.constexpr, RATIO: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    MINE: gl.constexpr,
):  # fmt: skip
    """dK and dV of every work item's MINE-th half of keys."""
    dk_out, dv_out, dk_hot, dv_hot = grads
    stride_dkt, stride_dkg, stride_dvt, stride_dvg = grad_strides
    k_ring, v_ring = kv_rings
    full, empty, ds_full, ds_empty, kv_full, kv_empty = barriers
    inner = (full, empty, ds_full, ds_empty)
    ROWS: gl.constexpr = rings[0].shape[1]
    HALF: gl.constexpr = KEYS // HALVES
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, K, 16])
    mine = MINE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
    number = 0
    base = 0
    mbarrier.wait(kv_full.index(0), 0)
    list_tiles = _noted(notes, 0)
    while list_tiles >= 0:
        place = number % 2
        at = place * FIELDS
        own_tiles = _noted(notes, at + 1)
        first_tile = _noted(notes, at + 2)
        part = _noted(notes, at + 3)
        group = _noted(notes, at + 4)
        key_start = _noted(notes, at + 5)
        key_count = _noted(notes, at + 6)
        hot = _noted(notes, at + 7)
        k_tile = k_ring.index(place * HALVES + MINE)
        v_tile = v_ring.index(place * HALVES + MINE)
        at_key = part * KEYS + mine
        dk = gl.zeros([HALF, K], gl.float32, ACC)
        dv = gl.zeros([HALF, K], gl.float32, ACC)
        # One loop for tiles of both kinds: ptxas 12.8 loses operands of products that a first loop of no turns shares
        # with a second one.
        num_tiles = list_tiles + own_tiles
        for tile in range(num_tiles):
            own_tile = own_tiles - 1 - (tile - list_tiles)
            first_row = (first_tile + own_tile // RATIO) * ROWS
            dk, dv = _step(
                base + tile, dk, dv, tile >= list_tiles, first_row, at_key, k_tile, v_tile, ds_ring, rings, inner,
                scale_log2, MINE, S, ACC, STAGES,
            )  # fmt: skip
        base += num_tiles
        mbarrier.arrive(kv_empty.index(place), count=1)

        key = part * KEYS + MINE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, ACC))
        dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, ACC)), 0)
        inside = gl.expand_dims(key < key_count, 1)
        dk = dk * scale
        if hot < 0:
            row = key_start.to(gl.int64) + key
            dk_at = dk_out + group.to(gl.int64) * stride_dkg
            dv_at = dv_out + group.to(gl.int64) * stride_dvg
            dtype: gl.constexpr = dk_out.dtype.element_ty
            gl.store(dk_at + (gl.expand_dims(row * stride_dkt, 1) + dim), dk.to(dtype), mask=inside)
            gl.store(dv_at + (gl.expand_dims(row * stride_dvt, 1) + dim), dv.to(dtype), mask=inside)
        else:
            hot_at = gl.expand_dims((hot.to(gl.int64) * BLOCK + key) * K, 1) + dim
            gl.atomic_add(dk_hot + hot_at, dk, mask=inside, sem="relaxed")
            gl.atomic_add(dv_hot + hot_at, dv, mask=inside, sem="relaxed")
        number += 1
        mbarrier.wait(kv_full.index(number % 2), number // 2 & 1)
        list_tiles = _noted(notes, number % 2 * FIELDS)


@gluon.jit
def _add_dq(
    dq32, num_queries, k_ring, notes, ds_ring, row_ring, barriers, scale,
    K: gl.constexpr, RATIO: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Multiply the halves of every dS with their keys and add dQ to fp32 memory [head, T, K]."""
    ds_full, ds_empty, kv_full, kv_empty = barriers
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, K, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // K, K // 4], [gl.num_warps(), 1], [1, 0])
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, OUT)), 0)
    none = gl.zeros([ROWS, K], gl.float32, ACC)
    number = 0
    base = 0
    mbarrier.wait(kv_full.index(0), 0)
    list_tiles = _noted(notes, 0)
    while list_tiles >= 0:
        place = number % 2
        num_tiles = list_tiles + _noted(notes, place * FIELDS + 1)
        head0 = _noted(notes, place * FIELDS + 4).to(gl.int64) * RATIO
        fence_async_shared()
        for g in range(base, base + num_tiles):
            mbarrier.wait(ds_full.index(g % 2), g // 2 & 1)
            dq = none
            for half in gl.static_range(HALVES):
                dq = warpgroup_mma(
                    ds_ring.index(g % 2 * HALVES + half).permute((1, 0)), k_ring.index(place * HALVES + half), dq,
                    use_acc=half > 0, is_async=True,
                )  # fmt: skip
            row = row_ring.index(g % ROW_SLOTS).load(gl.SliceLayout(1, OUT))
            dq = warpgroup_mma_wait(0, deps=(dq,))
            mbarrier.arrive(ds_empty.index(g % 2), count=1)
            dq = gl.convert_layout(dq * scale, OUT)
            at = ((head0 + row % RATIO) * num_queries + row // RATIO) * K
            gl.atomic_add(dq32 + (gl.expand_dims(at, 1) + dim), dq, mask=gl.expand_dims(row >= 0, 1), sem="relaxed")
        base += num_tiles
        mbarrier.arrive(kv_empty.index(place), count=1)
        number += 1
        mbarrier.wait(kv_full.index(number % 2), number // 2 & 1)
        list_tiles = _noted(notes, number % 2 * FIELDS)


@gluon.jit(do_not_specialize=["num_items"])
def _keys_apart_kernel(
    q, k, v, do, lse, delta, dq32, dk, dv, dk_hot, dv_hot,
    entry_P, start_X, count_X, hot_X, item_list, item_chunk, counter,
    key_start_U, key_count_U, query_start_U, query_low_U, query_high_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dt, stride_dh,
    stride_dkt, stride_dkg, stride_dvt, stride_dvg, stride_lt, num_queries, num_items,
    num_units, scale, scale_log2,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, PARTS: gl.constexpr, OWN_TILES: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, ADD_REGISTERS: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dK and dV of all work items, and all pairs' parts of dQ. Arguments as of `backward_hopper._keys_hopper_kernel`;
    a work item is (item, part), counter [1] int32 is zero, and num_items bounds their number."""
    dtype: gl.constexpr = q.dtype.element_ty
    HALF: gl.constexpr = KEYS // HALVES
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    S_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, ROWS], dtype)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    k_ring = gl.allocate_shared_memory(dtype, [2 * HALVES, HALF, K], TILE)
    v_ring = gl.allocate_shared_memory(dtype, [2 * HALVES, HALF, K], TILE)
    ds_ring = gl.allocate_shared_memory(dtype, [2 * HALVES, HALF, ROWS], S_TILE)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, K], TILE)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, K], TILE)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], LINE)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], LINE)
    row_ring = gl.allocate_shared_memory(gl.int32, [ROW_SLOTS, ROWS], LINE)
    notes = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], LINE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        # threads whose copies end, and one that has stored the row numbers
        mbarrier.init(full.index(i), count=32 * num_warps + 1)
        mbarrier.init(empty.index(i), count=HALVES)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=HALVES)
        mbarrier.init(ds_empty.index(i), count=1)
        mbarrier.init(kv_full.index(i), count=32 * num_warps + 1)
        mbarrier.init(kv_empty.index(i), count=HALVES + 1)
    pointers = (q, k, v, do, lse, delta)
    strides = (
        stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dt, stride_dh, stride_lt
    )  # fmt: skip
    lists = (entry_P, start_X, count_X, hot_X, item_list, item_chunk)
    units = (key_start_U, key_count_U, query_start_U, query_low_U, query_high_U)
    rings = (q_ring, do_ring, lse_ring, delta_ring)
    kv_rings = (k_ring, v_ring)
    grads = (dk, dv, dk_hot, dv_hot)
    grad_strides = (stride_dkt, stride_dkg, stride_dvt, stride_dvg)
    barriers = (full, empty, ds_full, ds_empty, kv_full, kv_empty)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    grads, grad_strides, kv_rings, notes, ds_ring, rings, barriers, scale, scale_log2, K, RATIO, BLOCK,
                    KEYS, STAGES, 0,
                ),
            ),
            (
                _multiply,
                (
                    grads, grad_strides, kv_rings, notes, ds_ring, rings, barriers, scale, scale_log2, K, RATIO, BLOCK,
                    KEYS, STAGES, 1,
                ),
            ),
            (
                _add_dq,
                (
                    dq32, num_queries, k_ring, notes, ds_ring, row_ring, (ds_full, ds_empty, kv_full, kv_empty), scale,
                    K, RATIO, ROWS,
                ),
            ),
            (
                _gather,
                (
                    pointers, strides, lists, units, counter, num_items, num_units,
                    (q_ring, do_ring, lse_ring, delta_ring, row_ring), kv_rings, notes,
                    (full, empty, kv_full, kv_empty), K, RATIO, SLOTS, BLOCK, CHUNK, ROWS, KEYS, PARTS, OWN_TILES,
                    STAGES,
                ),
            ),
        ],
        [num_warps, num_warps, num_warps],
        [REGISTERS, ADD_REGISTERS, GATHER_REGISTERS],
    )  # fmt: skip
