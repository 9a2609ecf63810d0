"""The key-major forward kernel for Hopper: warps that gather queries beside a warpgroup that multiplies.

It does the work of `forward_triton._rows_kernel` for selections with an own unit and units of one part, by explicit
WGMMA. One program owns one list chunk, and two programs share a multiprocessor: K and V of the unit stay in shared
memory, gathering warps copy tiles of Q rows into a ring, the multiplying warpgroup has two products, a softmax and the
stores of a tile to do, during which the other program has the tensor cores.

Legend: T queries, G KV heads of the slice, K head dim of q, k and v, U units, X lists, P pairs.
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


def hopper_forward_tiles(block: int) -> dict[str, int]:
    """Tile shape and launch options of `_rows_hopper_kernel`, CHUNK the rows of a list that one program takes. Two
    programs share a multiprocessor; their gathering warps keep WORKER_REGISTERS per thread."""
    shape = {"ROWS": 64, "KEYS": 64 if block == 64 else 128, "STAGES": 3, "CHUNK": 4096}
    return {**shape, "GATHER_WARPS": 4, "WORKER_REGISTERS": 56, "num_warps": 4, "maxnreg": 128}


@gluon.jit
def _work_item(item_list, item_chunk, first_item_X, num_items, first_list, num_lists):
    """(list, chunk) of this program. Of the items of all heads these are the slice's: list 0 is the slice's first, and
    a program that finds the next slice's items, or none, gets -1."""
    item = gl.program_id(0) + gl.load(first_item_X + first_list)
    x = gl.load(item_list + item, mask=item < num_items, other=-1) - first_list
    x = gl.where((x >= 0) & (x < num_lists), x, -1)
    return x, gl.load(item_chunk + item, mask=x >= 0, other=0)


@gluon.jit
def _pairs_of_tile(tile, entry_P, list_start, last, ROWS: gl.constexpr, LINE: gl.constexpr):
    """Entries of a tile of the list, -1 where there are none."""
    row = tile * ROWS + gl.arange(0, ROWS, layout=LINE)
    return gl.load(entry_P + list_start + row, mask=(row < last) & (row >= 0), other=-1)


@gluon.jit
def _offsets(pair, stride_qt, stride_qh, RATIO: gl.constexpr, SLOTS: gl.constexpr):
    """[rows, 1] where the queries of entries lie. Rows past the end read row 0; their results are not stored."""
    row = gl.maximum(pair, 0) // SLOTS
    return gl.expand_dims((row // RATIO).to(gl.int64) * stride_qt + row % RATIO * stride_qh, 1)


@gluon.jit
def _gather(
    q, entry_P, stride_qt, stride_qh, list_start, last, num_tiles, q_ring, pair_ring, barriers,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings with tiles of Q and their entries, from the list's last tile to its first.

    All lists of a document end near its last queries, so programs that walk backwards together find each other's
    queries in the L2 cache, and write rows that are neighbours.
    """
    full, empty = barriers
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    LINE: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ROWS: gl.constexpr = q_ring.shape[1]
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # Entries are read a tile ahead.
    pair = _pairs_of_tile(num_tiles - 1, entry_P, list_start, last, ROWS, LINE)
    for tile in range(num_tiles):
        slot = tile % STAGES
        at = _offsets(pair, stride_qt, stride_qh, RATIO, SLOTS)
        next_pair = _pairs_of_tile(num_tiles - 2 - tile, entry_P, list_start, last, ROWS, LINE)
        mbarrier.wait(empty.index(slot), (tile // STAGES & 1) ^ 1)
        async_load(q_ring.index(slot), q + (at + dim))
        pair_ring.index(slot).store(pair)
        pair = next_pair
        # The copies announce themselves, and these warps go on to the next tile.
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        thread_barrier()
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _exp2(x):
    """2^x by one instruction; results under 2^-126 are zero."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _weights(s, scale_log2, BLOCK: gl.constexpr, S: gl.constexpr):
    """(weights, row maxima, row sums) of scores [rows, keys], all in terms of 2^x."""
    KEYS: gl.constexpr = s.shape[1]
    if BLOCK < KEYS:
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
        s = gl.where(gl.expand_dims(key < BLOCK, 0), s, float("-inf"))
    top = gl.max(s, 1) * scale_log2
    p = _exp2(s * scale_log2 - gl.expand_dims(top, 1))
    return p, top, gl.sum(p, 1)


@gluon.jit
def _copy_keys(tile, at, stride_t, BLOCK: gl.constexpr):
    """Begin to copy the rows of a unit, zero past its end, as a group."""
    KEYS: gl.constexpr = tile.shape[0]
    K: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, LAYOUT)), 0)
    key = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    if BLOCK < KEYS:
        async_load(tile, at + (key * stride_t + dim), mask=key < BLOCK)
    else:
        async_load(tile, at + (key * stride_t + dim))
    async_copy.commit_group()


@gluon.jit
def _store(
    partial_o, partial_lse, o, top, total, pair, pair_s, staging,
    K: gl.constexpr, S: gl.constexpr, ACC: gl.constexpr, OUT: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """Normalised rows and log2-sums, to the places of their pairs. STAGED: staging is free to pass the rows through."""
    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, ACC))
    o = (o * gl.expand_dims(share, 1)).to(partial_o.dtype.element_ty)
    if STAGED:
        staging.store(o)
        o = staging.load(OUT)
    else:
        o = gl.convert_layout(o, OUT)
    dim = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, OUT)), 0)
    at = gl.expand_dims(pair.to(gl.int64) * K, 1) + dim
    gl.store(partial_o + at, o, mask=gl.expand_dims(pair >= 0, 1))
    # Eight programs write each 32 bytes of log-sums, at different times: those bytes had better stay in the L2 cache.
    gl.store(partial_lse + pair_s, top + gl.log2(total), mask=pair_s >= 0, eviction_policy="evict_last")


@gluon.jit
def _multiply(
    partial_o, partial_lse, scale_log2, num_tiles, k_at, v_at, stride_kt, stride_vt,
    k_tile, v_tile, q_ring, pair_ring, barriers,
    BLOCK: gl.constexpr, S: gl.constexpr, ACC: gl.constexpr, OUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend with every tile of queries to the unit's keys and store the results."""
    full, empty = barriers
    ROWS: gl.constexpr = q_ring.shape[1]
    KEYS: gl.constexpr = k_tile.shape[0]
    K: gl.constexpr = k_tile.shape[1]
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    dtype: gl.constexpr = k_tile.dtype
    no_s = gl.zeros([ROWS, KEYS], gl.float32, S)
    no_o = gl.zeros([ROWS, K], gl.float32, ACC)
    keys = k_tile.permute((1, 0))
    _copy_keys(k_tile, k_at, stride_kt, BLOCK)
    _copy_keys(v_tile, v_at, stride_vt, BLOCK)
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()
    for tile in range(num_tiles):
        slot = tile % STAGES
        q_tile = q_ring.index(slot)
        mbarrier.wait(full.index(slot), tile // STAGES & 1)
        # What copies that announce themselves have written is not yet visible to WGMMA.
        fence_async_shared()
        s = warpgroup_mma(q_tile, keys, no_s, use_acc=False, is_async=True)
        pair = pair_ring.index(slot).load(gl.SliceLayout(1, OUT))
        pair_s = pair_ring.index(slot).load(gl.SliceLayout(1, S))
        s = warpgroup_mma_wait(0, deps=(s,))
        p, top, total = _weights(s, scale_log2, BLOCK, S)
        p = gl.convert_layout(p.to(dtype), P)
        o = warpgroup_mma(p, v_tile, no_o, use_acc=False, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        _store(partial_o, partial_lse, o, top, total, pair, pair_s, q_tile, K, S, ACC, OUT, True)
        mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit(do_not_specialize=["num_items", "first_list", "num_lists"])
def _rows_hopper_kernel(
    q, k, v, partial_o, partial_lse,
    entry_P, start_X, count_X, item_list, item_chunk, first_item_X, key_start_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    num_items, first_list, num_lists, num_units, rows_per_group, scale_log2,
    K: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, GATHER_WARPS: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A normalised output and a log2-sum for every pair of one list chunk. Arguments as of
    `forward_triton._rows_kernel` and `_work_item`; every listed unit has BLOCK keys, and KEYS holds them all.
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

    dtype: gl.constexpr = q.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    k_tile = gl.allocate_shared_memory(dtype, [KEYS, K], TILE)
    v_tile = gl.allocate_shared_memory(dtype, [KEYS, K], TILE)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, K], TILE)
    pair_ring = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], LINE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        # threads whose copies end, and one that has stored the entries
        mbarrier.init(full.index(i), count=GATHER_WARPS * 32 + 1)
        mbarrier.init(empty.index(i), count=1)

    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, KEYS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, K, 16])
    OUT: gl.constexpr = _out_layout(K, True)
    out_row = group * rows_per_group
    k_at = k + group * stride_kg + key_start * stride_kt
    v_at = v + group * stride_vg + key_start * stride_vt
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    partial_o + out_row * K, partial_lse + out_row, scale_log2, num_tiles, k_at, v_at, stride_kt,
                    stride_vt, k_tile, v_tile, q_ring, pair_ring, (full, empty), BLOCK, S, ACC, OUT, STAGES,
                ),
            ),
            (
                _gather,
                (
                    q + group * RATIO * stride_qh, entry_P, stride_qt, stride_qh, list_start, last,
                    num_tiles, q_ring, pair_ring, (full, empty), K, RATIO, SLOTS, STAGES,
                ),
            ),
        ],
        [GATHER_WARPS],
        [WORKER_REGISTERS],
    )  # fmt: skip


@gluon.constexpr_function
def _out_layout(dim, wide):
    """Where a tile of results lies when it is stored: 16 bytes a thread, a row in the four threads that computed it, or
    wide: in as many as it has 16 bytes, still in the warp that computed it."""
    if wide:
        per_row = dim // 8
        return gl.BlockedLayout([16 * per_row // 32, 8], [32 // per_row, per_row], [4, 1], [1, 0])
    columns = [[0, 1], [0, 2], [0, 4]]
    more = [[0, 1 << i] for i in range(5, dim.bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*columns, [8, 0], *more], lanes, [[16, 0], [32, 0]], [], [64, dim])
