"""The key-major backward kernel for Hopper: warps that gather, warps that multiply and warps that add dQ to memory.

It does the work of `backward_triton._keys_kernel` (which see for the formulas) for selections with an own unit, by
explicit WGMMA. One program owns KEYS keys of one list chunk. Two multiplying warpgroups hold dK and dV in registers;
gathering warps copy tiles of Q and dO rows into a ring in shared memory; adding warps take finished dQ tiles from
shared memory and add them to fp32 memory. The three meet at mbarriers only.

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

from pithwood.ops.gluon_support import async_load, thread_barrier


def hopper_tiles() -> dict[str, int]:
    """Tile shape and launch options. The warps' registers are divided anew at run time: the gathering and adding warps
    keep WORKER_REGISTERS per thread, the multiplying warps get the rest."""
    shape = {"ROWS": 64, "STAGES": 3, "PIECE": 16, "GATHER_WARPS": 4, "ADD_WARPS": 4}
    return {**shape, "WORKER_REGISTERS": 32, "num_warps": 8, "maxnreg": 128}


@gluon.jit
def _rows_of_tile(
    tile, work, entry_P,
    RATIO: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, LINE: gl.constexpr,
):  # fmt: skip
    """`t * RATIO + head` of a tile's rows, -1 where there is none: those listed from the last to the first, then the
    unit's own queries. All units of a document have their last rows near its end: walking backwards together, they
    find each other's rows in the L2 cache."""
    list_tiles, own_tiles, first_tile, start_q, low, high, list_start, last = work
    lane = gl.arange(0, ROWS, layout=LINE)
    own_tile = own_tiles - 1 - (tile - list_tiles)
    at_row = (first_tile + own_tile // RATIO) * ROWS + lane
    t = start_q + at_row
    row = (list_tiles - 1 - tile) * ROWS + lane
    listed = (row < last) & (row >= 0)
    pair = gl.load(entry_P + list_start + row, mask=listed, other=-SLOTS)
    inside = (t >= low) & (t < high) & (at_row < BLOCK) & (own_tile >= 0)
    own_row = gl.where(inside, t * RATIO + own_tile % RATIO, -1)
    return gl.where(tile >= list_tiles, own_row, pair // SLOTS)


@gluon.jit
def _starts_of_rows(lse, delta, q_row, stride_lt, scale, RATIO: gl.constexpr):
    """What the products of rows with keys and values start from, (-lse / scale, -delta); rows that are none get weight
    zero: exp2(-inf)."""
    at = (q_row // RATIO).to(gl.int64) * stride_lt + q_row % RATIO
    log_sum = gl.load(lse + at, mask=q_row >= 0, other=float("inf"))
    return -log_sum / scale, -gl.load(delta + at, mask=q_row >= 0, other=0.0)


@gluon.jit
def _gather(
    pointers, strides, work, num_tiles, rings, row_ring, barriers, scale,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Fill the rings with tiles of Q and dO, what their products start from, and the row numbers dQ is added to."""
    q, do, lse, delta, entry_P = pointers
    stride_qt, stride_qh, stride_dt, stride_dh, stride_lt = strides
    q_ring, do_ring, s_ring, dp_ring = rings
    full, empty = barriers
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    ROW_SLOTS: gl.constexpr = row_ring.shape[0]
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # Row numbers are read a tile ahead, log-sums when the tile before is on its way.
    q_row = _rows_of_tile(0, work, entry_P, RATIO, SLOTS, BLOCK, ROWS, LINE)
    s_start, dp_start = _starts_of_rows(lse, delta, q_row, stride_lt, scale, RATIO)
    for tile in range(num_tiles):
        slot = tile % STAGES
        next_row = _rows_of_tile(tile + 1, work, entry_P, RATIO, SLOTS, BLOCK, ROWS, LINE)
        mbarrier.wait(empty.index(slot), (tile // STAGES & 1) ^ 1)
        rows = row_ring.index(tile % ROW_SLOTS)
        rows.store(q_row)
        s_ring.index(slot).store(s_start)
        dp_ring.index(slot).store(dp_start)
        for piece in gl.static_range(ROWS // PIECE):
            row = rows.slice(piece * PIECE, PIECE).load(gl.SliceLayout(1, LAYOUT))
            mask = gl.expand_dims(row >= 0, 1)
            t = (row // RATIO).to(gl.int64)
            head = row % RATIO
            q_at = q + (gl.expand_dims(t * stride_qt + head * stride_qh, 1) + dim)
            do_at = do + (gl.expand_dims(t * stride_dt + head * stride_dh, 1) + dim)
            q_part = q_ring.index(slot).slice(piece * PIECE, PIECE)
            do_part = do_ring.index(slot).slice(piece * PIECE, PIECE)
            async_load(q_part, q_at, mask=mask)
            async_load(do_part, do_at, mask=mask)
        q_row = next_row
        s_start, dp_start = _starts_of_rows(lse, delta, q_row, stride_lt, scale, RATIO)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _add_dq(
    dq32, num_queries, num_tiles, dq_tile, row_ring, barriers, scale,
    K: gl.constexpr, RATIO: gl.constexpr, ROWS: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Add finished tiles of dQ to fp32 memory [head, T, K], PIECE rows at a time."""
    full, empty = barriers
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // K, K // 4], [gl.num_warps(), 1], [1, 0])
    ROW_SLOTS: gl.constexpr = row_ring.shape[0]
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    for tile in range(num_tiles):
        mbarrier.wait(full, tile & 1)
        rows = row_ring.index(tile % ROW_SLOTS)
        for piece in gl.static_range(ROWS // PIECE):
            dq = dq_tile.slice(piece * PIECE, PIECE).load(LAYOUT) * scale
            row = rows.slice(piece * PIECE, PIECE).load(gl.SliceLayout(1, LAYOUT))
            at = ((row % RATIO).to(gl.int64) * num_queries + row // RATIO) * K
            gl.atomic_add(dq32 + (gl.expand_dims(at, 1) + dim), dq, mask=gl.expand_dims(row >= 0, 1), sem="relaxed")
        mbarrier.arrive(empty, count=1)


@gluon.jit
def _step(
    tile, dk, dv, at_key, key_count, first_row, k_tile, v_tile, ds_tile, dq_tile, rings, barriers, scale_log2,
    MASKED: gl.constexpr, S: gl.constexpr, ACC: gl.constexpr, DQ: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(dk, dv) after one tile of rows. Products start as soon as their operands are there; waits are in their order."""
    q_ring, do_ring, s_ring, dp_ring = rings
    full, empty, dq_full, dq_empty = barriers
    ROWS: gl.constexpr = q_ring.shape[1]
    K: gl.constexpr = k_tile.shape[1]
    slot = tile % STAGES
    q_tile = q_ring.index(slot)
    do_tile = do_ring.index(slot)
    mbarrier.wait(full.index(slot), tile // STAGES & 1)
    # Both products start from what would be subtracted from them, which then needs no registers beside theirs. The
    # selections rule out keys past the unit's end, and they give every register a value of its own before the first
    # product: copies between the two products would make ptxas wait for the first one (note C7517).
    inside = gl.expand_dims(at_key < key_count, 1)
    s_start = s_ring.index(slot).load(gl.SliceLayout(0, S))
    dp_start = dp_ring.index(slot).load(gl.SliceLayout(0, S))
    s = gl.where(inside, gl.expand_dims(s_start, 0), float("-inf"))
    dp = gl.where(inside, gl.expand_dims(dp_start, 0), 0.0)
    s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), s, is_async=True)
    dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), dp, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    x = s * scale_log2
    if MASKED:
        at_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, S))
        x = gl.where(gl.expand_dims(at_key, 1) <= gl.expand_dims(at_row, 0), x, float("-inf"))
    # Weights are kept in the inputs' dtype, as both products below take them; fp32 would not fit the registers.
    p = gl.exp2(x).to(q_tile.dtype)
    dv = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, ACC, 2)), do_tile, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = (p.to(gl.float32) * dp).to(q_tile.dtype)
    ds_tile.store(ds)
    fence_async_shared()
    dk = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, ACC, 2)), q_tile, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=(dv,))
    no_dq = gl.zeros([ROWS, K], gl.float32, DQ)
    dq = warpgroup_mma(ds_tile.permute((1, 0)), k_tile, no_dq, use_acc=False, is_async=True)
    dk, dq = warpgroup_mma_wait(0, deps=(dk, dq))
    mbarrier.arrive(empty.index(slot), count=1)
    mbarrier.wait(dq_empty, (tile & 1) ^ 1)
    dq_tile.store(dq)
    mbarrier.arrive(dq_full, count=1)
    return dk, dv


@gluon.jit
def _multiply(
    work, num_tiles, part, key_count, k_tile, v_tile, ds_tile, dq_tile, rings, barriers, scale_log2,
    RATIO: gl.constexpr, S: gl.constexpr, ACC: gl.constexpr, DQ: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(dk, dv) [KEYS, K] fp32 of all tiles, without the scale."""
    list_tiles, own_tiles, first_tile = work[0], work[1], work[2]
    ROWS: gl.constexpr = rings[0].shape[1]
    KEYS: gl.constexpr = k_tile.shape[0]
    K: gl.constexpr = k_tile.shape[1]
    at_key = part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, S))
    dk = gl.zeros([KEYS, K], gl.float32, ACC)
    dv = gl.zeros([KEYS, K], gl.float32, ACC)
    for tile in range(list_tiles):
        dk, dv = _step(
            tile, dk, dv, at_key, key_count, 0, k_tile, v_tile, ds_tile, dq_tile, rings, barriers, scale_log2,
            False, S, ACC, DQ, STAGES,
        )  # fmt: skip
    for tile in range(list_tiles, num_tiles):
        own_tile = own_tiles - 1 - (tile - list_tiles)
        first_row = (first_tile + own_tile // RATIO) * ROWS
        dk, dv = _step(
            tile, dk, dv, at_key, key_count, first_row, k_tile, v_tile, ds_tile, dq_tile, rings, barriers, scale_log2,
            True, S, ACC, DQ, STAGES,
        )  # fmt: skip
    return dk, dv


@gluon.jit
def _keys_hopper_kernel(
    q, k, v, do, lse, delta, dq32, dk, dv, dk_hot, dv_hot,
    entry_P, start_X, count_X, hot_X, item_list, item_chunk,
    key_start_U, key_count_U, query_start_U, query_low_U, query_high_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dt, stride_dh,
    stride_dkt, stride_dkg, stride_dvt, stride_dvg, stride_lt, num_queries,
    num_units, scale, scale_log2,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, PARTS: gl.constexpr, OWN_TILES: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, GATHER_WARPS: gl.constexpr, ADD_WARPS: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS keys from one chunk of their unit's list (and from the unit's own queries in chunk 0), and all
    these pairs' parts of dQ. Arguments as of `backward_triton._keys_kernel`; lse and delta are views of the slice."""
    item = gl.program_id(0) // PARTS
    part = gl.program_id(0) % PARTS
    x = gl.load(item_list + item)
    if x < 0:
        return
    chunk = gl.load(item_chunk + item)
    group = x // num_units
    unit = x % num_units
    key_count = gl.load(key_count_U + unit)
    if part * KEYS >= key_count:
        return
    key_start = gl.load(key_start_U + unit).to(gl.int64)
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

    dtype: gl.constexpr = q.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    S_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], dtype)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    k_tile = gl.allocate_shared_memory(dtype, [KEYS, K], TILE)
    v_tile = gl.allocate_shared_memory(dtype, [KEYS, K], TILE)
    ds_tile = gl.allocate_shared_memory(dtype, [KEYS, ROWS], S_TILE)
    dq_tile = gl.allocate_shared_memory(gl.float32, [ROWS, K], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, K], TILE)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, K], TILE)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], LINE)
    dp_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], LINE)
    # The adding warps may be two tiles behind the multiplying ones, which are at most STAGES behind the gathering ones.
    ROW_SLOTS: gl.constexpr = 4 if STAGES == 2 else 8
    row_ring = gl.allocate_shared_memory(gl.int32, [ROW_SLOTS, ROWS], LINE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    dq_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    dq_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(dq_full, count=1)
    mbarrier.init(dq_empty, count=1)

    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [num_warps, 1], [1, 0])
    dim = gl.arange(0, K, layout=gl.SliceLayout(0, LOAD))
    at_key = part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LOAD))
    inside = gl.expand_dims(at_key < key_count, 1)
    key_row = key_start + at_key
    k_at = k + group.to(gl.int64) * stride_kg
    v_at = v + group.to(gl.int64) * stride_vg
    k_tile.store(
        gl.load(k_at + (gl.expand_dims(key_row * stride_kt, 1) + gl.expand_dims(dim, 0)), mask=inside, other=0.0)
    )
    v_tile.store(
        gl.load(v_at + (gl.expand_dims(key_row * stride_vt, 1) + gl.expand_dims(dim, 0)), mask=inside, other=0.0)
    )
    fence_async_shared()

    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, K, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, K * 4 // num_warps, 16])
    head0 = group.to(gl.int64) * RATIO
    q_at = q + head0 * stride_qh
    do_at = do + head0 * stride_dh
    pointers = (q_at, do_at, lse + head0, delta + head0, entry_P)
    strides = (stride_qt, stride_qh, stride_dt, stride_dh, stride_lt)
    rings = (q_ring, do_ring, s_ring, dp_ring)
    dk_acc, dv_acc = gl.warp_specialize(
        [
            (
                _multiply,
                (
                    work, num_tiles, part, key_count, k_tile, v_tile, ds_tile, dq_tile, rings,
                    (full, empty, dq_full, dq_empty), scale_log2, RATIO, S, ACC, DQ, STAGES,
                ),
            ),
            (
                _gather,
                (
                    pointers, strides, work, num_tiles, rings, row_ring, (full, empty), scale, K, RATIO, SLOTS, BLOCK,
                    ROWS, STAGES, PIECE,
                ),
            ),
            (
                _add_dq,
                (
                    dq32 + head0 * num_queries * K, num_queries, num_tiles, dq_tile, row_ring, (dq_full, dq_empty),
                    scale, K, RATIO, ROWS, PIECE,
                ),
            ),
        ],
        [GATHER_WARPS, ADD_WARPS],
        [WORKER_REGISTERS, WORKER_REGISTERS],
    )  # fmt: skip

    key = part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, ACC))
    dim_acc = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, ACC)), 0)
    inside_acc = gl.expand_dims(key < key_count, 1)
    dk_acc = dk_acc * scale
    hot = gl.load(hot_X + x)
    if hot < 0:
        row = key_start + key
        dk_at = dk + group.to(gl.int64) * stride_dkg
        dv_at = dv + group.to(gl.int64) * stride_dvg
        gl.store(dk_at + (gl.expand_dims(row * stride_dkt, 1) + dim_acc), dk_acc.to(dtype), mask=inside_acc)
        gl.store(dv_at + (gl.expand_dims(row * stride_dvt, 1) + dim_acc), dv_acc.to(dtype), mask=inside_acc)
    else:
        at = gl.expand_dims((hot.to(gl.int64) * BLOCK + key) * K, 1) + dim_acc
        gl.atomic_add(dk_hot + at, dk_acc, mask=inside_acc, sem="relaxed")
        gl.atomic_add(dv_hot + at, dv_acc, mask=inside_acc, sem="relaxed")
