"""Backward kernels of block-sparse attention: key-major for dK and dV, with dQ added row by row.

With P the softmax weights of the merged output, D = rowsum(dO * O) - dLSE, and dS = P * (dO V^T - D):
dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K. Scores are computed again from q, k and the saved log-sums.

Legend: T queries, H query heads, G KV heads of the slice, K query/key head dim, V value head dim, U units, X lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pithwood.ops.attend.forward_triton import _load_keys

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _delta_kernel(
    o, do, dlse, delta, num_rows, heads,
    stride_ot, stride_oh, stride_dt, stride_dh, stride_lt, stride_lh,
    V: tl.constexpr, V_PAD: tl.constexpr, HAS_DLSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [T, H] fp32 = rowsum(do * o) - dlse."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    t = row // heads
    head = row % heads
    dim = tl.arange(0, V_PAD)
    inside = real[:, None] & (dim < V)[None, :]
    o_tile = tl.load(o + t[:, None] * stride_ot + head[:, None] * stride_oh + dim[None, :], mask=inside, other=0.0)
    do_tile = tl.load(do + t[:, None] * stride_dt + head[:, None] * stride_dh + dim[None, :], mask=inside, other=0.0)
    d = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if HAS_DLSE:
        d -= tl.load(dlse + t * stride_lt + head * stride_lh, mask=real, other=0.0)
    tl.store(delta + row, d, mask=real)


@triton.jit
def _tile_grads(
    q_tile, do_tile, k_tile, v_tile, lse2, delta, seen, dk, dv, scale_log2,
    PRECISION: tl.constexpr, SEEN_ALL: tl.constexpr,
):  # fmt: skip
    """(dk, dv, ds^T) after one tile of queries [rows] against one tile of keys [keys]; scores are [keys, rows]."""
    s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
    p = tl.exp2(s - lse2[None, :])
    if not SEEN_ALL:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q_tile.dtype)
    dk = tl.dot(ds, q_tile, dk, input_precision=PRECISION)
    return dk, dv, ds


@triton.jit
def _keys_kernel(
    q, k, v, do, lse, delta, dq32, dk, dv, dk_hot, dv_hot,
    entry_P, start_X, count_X, hot_X, item_list, item_chunk,
    key_start_U, key_count_U, position_U, query_start_U, query_low_U, query_high_U, position_T,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dt, stride_dh,
    stride_dkt, stride_dkg, stride_dvt, stride_dvg, stride_lt, stride_qq,
    num_units, scale, scale_log2,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, OWN_TILES: tl.constexpr,
    OWN: tl.constexpr, CAUSAL: tl.constexpr, ADD_DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS keys from one chunk of their unit's list (and from the unit's own queries in chunk 0).

    K, V, dK and dV stay on chip; rows of Q and dO are gathered, and rows of dQ are added to fp32 memory [head, T, K].
    The heads of a KV head stand in one list, so their sum is formed in registers. A list of several chunks (hot_X >= 0)
    adds its sums to fp32 memory of its own, which `_hot_kernel` converts.
    """
    item = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    x = tl.load(item_list + item)
    if x < 0:
        return
    chunk = tl.load(item_chunk + item)
    group = x // num_units
    unit = x % num_units
    key_count = tl.load(key_count_U + unit)
    key = part * KEYS + tl.arange(0, KEYS)
    if part * KEYS >= key_count:
        return
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    key_start = tl.load(key_start_U + unit).to(tl.int64)
    position = tl.load(position_U + unit)
    k_at = k + group.to(tl.int64) * stride_kg + key_start * stride_kt
    v_at = v + group.to(tl.int64) * stride_vg + key_start * stride_vt
    k_tile = _load_keys(k_at, key, key_count, stride_kt, dim_k, K, K_PAD, False)
    v_tile = _load_keys(v_at, key, key_count, stride_vt, dim_v, V, V_PAD, False)
    dk_acc = tl.zeros((KEYS, K_PAD), tl.float32)
    dv_acc = tl.zeros((KEYS, V_PAD), tl.float32)
    head0 = group.to(tl.int64) * RATIO
    if OWN:  # noqa: SIM102  a compile-time test around a run-time one
        if chunk == 0:
            low = tl.load(query_low_U + unit)
            high = tl.load(query_high_U + unit)
            start_q = tl.load(query_start_U + unit)
            # Queries before this part of the unit see none of its keys.
            first_tile = part * KEYS // ROWS
            for step in range(0, (OWN_TILES - first_tile) * RATIO):
                at_row = (first_tile + step // RATIO) * ROWS + tl.arange(0, ROWS)
                head = head0 + step % RATIO
                query = start_q + at_row
                real = (query >= low) & (query < high) & (at_row < BLOCK)
                t = tl.where(real, query, 0).to(tl.int64)
                q_tile = _load_rows(q + t * stride_qt + head * stride_qh, dim_k, K, K_PAD)
                do_tile = _load_rows(do + t * stride_dt + head * stride_dh, dim_v, V, V_PAD)
                lse2 = tl.load(lse + t * stride_lt + head) * LOG2_E
                d = tl.load(delta + t * stride_lt + head)
                seen = real[None, :] & (key[:, None] <= at_row[None, :])
                dk_acc, dv_acc, ds = _tile_grads(
                    q_tile, do_tile, k_tile, v_tile, lse2, d, seen, dk_acc, dv_acc, scale_log2, PRECISION, False
                )
                if ADD_DQ:
                    dq = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION) * scale
                    at = (head * stride_qq + t)[:, None] * K + dim_k[None, :]
                    tl.atomic_add(dq32 + at, dq, mask=real[:, None] & (dim_k < K)[None, :], sem="relaxed")
    start = tl.load(start_X + x)
    first = chunk * CHUNK
    last = tl.minimum(tl.load(count_X + x), first + CHUNK)
    for row0 in range(first, last, ROWS):
        row = row0 + tl.arange(0, ROWS)
        real = row < last
        q_row = tl.load(entry_P + start + row, mask=real, other=0) // SLOTS
        t = (q_row // RATIO).to(tl.int64)
        head = head0 + q_row % RATIO
        q_tile = _load_rows(q + t * stride_qt + head * stride_qh, dim_k, K, K_PAD)
        do_tile = _load_rows(do + t * stride_dt + head * stride_dh, dim_v, V, V_PAD)
        lse2 = tl.load(lse + t * stride_lt + head) * LOG2_E
        # Rows past the end get weight zero: exp2(-inf).
        lse2 = tl.where(real, lse2, float("inf"))
        d = tl.load(delta + t * stride_lt + head)
        seen = real[None, :] & (key < key_count)[:, None]
        if CAUSAL and not OWN:
            seen = seen & ((position + key)[:, None] <= tl.load(position_T + t)[None, :])
        dk_acc, dv_acc, ds = _tile_grads(
            q_tile, do_tile, k_tile, v_tile, lse2, d, seen, dk_acc, dv_acc, scale_log2, PRECISION,
            OWN and BLOCK % KEYS == 0,
        )  # fmt: skip
        if ADD_DQ:
            dq = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION) * scale
            at = (head * stride_qq + t)[:, None] * K + dim_k[None, :]
            tl.atomic_add(dq32 + at, dq, mask=real[:, None] & (dim_k < K)[None, :], sem="relaxed")
    inside_k = (key < key_count)[:, None] & (dim_k < K)[None, :]
    inside_v = (key < key_count)[:, None] & (dim_v < V)[None, :]
    hot = tl.load(hot_X + x)
    if hot < 0:
        at_key = key_start + key
        dk_at = dk + at_key[:, None] * stride_dkt + group.to(tl.int64) * stride_dkg + dim_k[None, :]
        dv_at = dv + at_key[:, None] * stride_dvt + group.to(tl.int64) * stride_dvg + dim_v[None, :]
        tl.store(dk_at, (dk_acc * scale).to(dk.dtype.element_ty), mask=inside_k)
        tl.store(dv_at, dv_acc.to(dv.dtype.element_ty), mask=inside_v)
    else:
        hot_row = hot.to(tl.int64) * BLOCK + key
        tl.atomic_add(dk_hot + hot_row[:, None] * K + dim_k[None, :], dk_acc * scale, mask=inside_k, sem="relaxed")
        tl.atomic_add(dv_hot + hot_row[:, None] * V + dim_v[None, :], dv_acc, mask=inside_v, sem="relaxed")


@triton.jit
def _load_rows(row, dim, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows at these pointers [rows, DIM_PAD], zero past the head dim."""
    at = row[:, None] + dim[None, :]
    if DIM == DIM_PAD:
        return tl.load(at)
    return tl.load(at, mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def _hot_kernel(
    dk, dv, dk_hot, dv_hot, hot_list, key_start_U, key_count_U,
    stride_dkt, stride_dkg, stride_dvt, stride_dvg, num_units,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the sums of lists with several chunks to dk and dv."""
    hot = tl.program_id(0) // PARTS
    key = (tl.program_id(0) % PARTS) * KEYS + tl.arange(0, KEYS)
    x = tl.load(hot_list + hot)
    if x < 0:
        return
    group = (x // num_units).to(tl.int64)
    unit = x % num_units
    inside = key < tl.load(key_count_U + unit)
    at_key = tl.load(key_start_U + unit).to(tl.int64) + key
    hot_row = hot.to(tl.int64) * BLOCK + key
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    inside_k = inside[:, None] & (dim_k < K)[None, :]
    inside_v = inside[:, None] & (dim_v < V)[None, :]
    dk_rows = tl.load(dk_hot + hot_row[:, None] * K + dim_k[None, :], mask=inside_k)
    dv_rows = tl.load(dv_hot + hot_row[:, None] * V + dim_v[None, :], mask=inside_v)
    dk_at = dk + at_key[:, None] * stride_dkt + group * stride_dkg + dim_k[None, :]
    dv_at = dv + at_key[:, None] * stride_dvt + group * stride_dvg + dim_v[None, :]
    tl.store(dk_at, dk_rows.to(dk.dtype.element_ty), mask=inside_k)
    tl.store(dv_at, dv_rows.to(dv.dtype.element_ty), mask=inside_v)


@triton.jit
def _cast_dq_kernel(
    dq32, dq, num_queries, stride_dqt, stride_dqh,
    K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq in its own dtype and layout from the fp32 sums [head, T, K]."""
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, K_PAD)
    inside = (t < num_queries)[:, None] & (dim < K)[None, :]
    sums = tl.load(dq32 + (head * num_queries + t)[:, None] * K + dim[None, :], mask=inside)
    at = dq + t[:, None] * stride_dqt + head * stride_dqh + dim[None, :]
    tl.store(at, sums.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _ds_tile(
    q_tile, do_tile, k_tile, v_tile, lse2, delta, seen, dq, scale_log2, PRECISION: tl.constexpr, SEEN_ALL: tl.constexpr
):  # fmt: skip
    """dq [rows, K] after one tile of keys, without the scale."""
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
    p = tl.exp2(s - lse2[:, None])
    if not SEEN_ALL:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k_tile.dtype)
    return tl.dot(ds, k_tile, dq, input_precision=PRECISION)


@triton.jit
def _rows_dq_kernel(
    q, k, v, do, lse, delta, dq_partial,
    entry_P, start_X, count_X, item_list, item_chunk,
    key_start_U, key_count_U, position_U, position_T,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dt, stride_dh, stride_lt,
    num_units, rows_per_group, scale, scale_log2,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The deterministic way to dQ: the part of every pair, [pair, K] fp32, summed by `_own_dq_kernel` in slot order.

    One program owns a tile of ROWS rows of one list and streams the unit's keys.
    """
    item = tl.program_id(0)
    x = tl.load(item_list + item)
    if x < 0:
        return
    group = x // num_units
    unit = x % num_units
    first = tl.load(item_chunk + item) * ROWS
    row = first + tl.arange(0, ROWS)
    real = row < tl.load(count_X + x)
    pair = tl.load(entry_P + tl.load(start_X + x) + row, mask=real, other=0)
    q_row = pair // SLOTS
    t = (q_row // RATIO).to(tl.int64)
    head = group.to(tl.int64) * RATIO + q_row % RATIO
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    q_tile = _load_rows(q + t * stride_qt + head * stride_qh, dim_k, K, K_PAD)
    do_tile = _load_rows(do + t * stride_dt + head * stride_dh, dim_v, V, V_PAD)
    lse2 = tl.load(lse + t * stride_lt + head) * LOG2_E
    d = tl.load(delta + t * stride_lt + head)
    key_start = tl.load(key_start_U + unit).to(tl.int64)
    key_count = tl.load(key_count_U + unit)
    reach = tl.full((ROWS,), PARTS * KEYS, tl.int32)
    if MASKED:
        reach = tl.load(position_T + t) - tl.load(position_U + unit) + 1
    k_at = k + group.to(tl.int64) * stride_kg + key_start * stride_kt
    v_at = v + group.to(tl.int64) * stride_vg + key_start * stride_vt
    dq = tl.zeros((ROWS, K_PAD), tl.float32)
    for part in range(PARTS):
        key = part * KEYS + tl.arange(0, KEYS)
        k_tile = _load_keys(k_at, key, key_count, stride_kt, dim_k, K, K_PAD, False)
        v_tile = _load_keys(v_at, key, key_count, stride_vt, dim_v, V, V_PAD, False)
        seen = (key < key_count)[None, :] & (key[None, :] < reach[:, None])
        dq = _ds_tile(q_tile, do_tile, k_tile, v_tile, lse2, d, seen, dq, scale_log2, PRECISION, False)
    at = (group.to(tl.int64) * rows_per_group + pair)[:, None] * K + dim_k[None, :]
    tl.store(dq_partial + at, dq * scale, mask=real[:, None] & (dim_k < K)[None, :])


@triton.jit
def _own_dq_kernel(
    q, k, v, do, lse, delta, dq_partial, dq, ids,
    key_start_U, key_count_U, position_U, query_start_U, query_low_U, query_high_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dt, stride_dh, stride_lt,
    stride_dqt, stride_dqh, stride_it, stride_ih, num_queries, scale, scale_log2,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries of one head: through their own unit, plus the parts of their pairs."""
    unit = tl.program_id(0) // TILES
    offset = (tl.program_id(0) % TILES) * ROWS
    head = tl.program_id(1)
    key_count = tl.load(key_count_U + unit)
    if offset >= key_count:
        return
    at_row = offset + tl.arange(0, ROWS)
    query = tl.load(query_start_U + unit) + at_row
    real = (query >= tl.load(query_low_U + unit)) & (query < tl.load(query_high_U + unit)) & (at_row < BLOCK)
    t = tl.where(real, query, 0).to(tl.int64)
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    head64 = head.to(tl.int64)
    q_tile = _load_rows(q + t * stride_qt + head64 * stride_qh, dim_k, K, K_PAD)
    do_tile = _load_rows(do + t * stride_dt + head64 * stride_dh, dim_v, V, V_PAD)
    lse2 = tl.load(lse + t * stride_lt + head) * LOG2_E
    d = tl.load(delta + t * stride_lt + head)
    key_start = tl.load(key_start_U + unit).to(tl.int64)
    group = (head // RATIO).to(tl.int64)
    k_at = k + group * stride_kg + key_start * stride_kt
    v_at = v + group * stride_vg + key_start * stride_vt
    acc = tl.zeros((ROWS, K_PAD), tl.float32)
    for part0 in range(0, tl.minimum(offset + ROWS, key_count), KEYS):
        key = part0 + tl.arange(0, KEYS)
        k_tile = _load_keys(k_at, key, key_count, stride_kt, dim_k, K, K_PAD, False)
        v_tile = _load_keys(v_at, key, key_count, stride_vt, dim_v, V, V_PAD, False)
        seen = real[:, None] & (key[None, :] <= at_row[:, None])
        acc = _ds_tile(q_tile, do_tile, k_tile, v_tile, lse2, d, seen, acc, scale_log2, PRECISION, False)
    acc = acc * scale
    own = tl.load(position_U + unit) // BLOCK
    pair0 = ((group * num_queries + t) * RATIO + head % RATIO) * SLOTS
    for slot in range(SLOTS):
        id_slot = tl.load(ids + t * stride_it + head64 * stride_ih + slot, mask=real, other=-1)
        seen_slot = (id_slot >= 0) & (id_slot < own)
        at = (pair0 + slot)[:, None] * K + dim_k[None, :]
        acc += tl.load(dq_partial + at, mask=seen_slot[:, None] & (dim_k < K)[None, :], other=0.0)
    at = dq + t[:, None] * stride_dqt + head64 * stride_dqh + dim_k[None, :]
    tl.store(at, acc.to(dq.dtype.element_ty), mask=real[:, None] & (dim_k < K)[None, :])


@triton.jit
def _sum_dq_kernel(
    dq_partial, dq, ids, limit_T, stride_dqt, stride_dqh, stride_it, stride_ih, num_queries,
    K: tl.constexpr, K_PAD: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dQ as the sum of the parts of its pairs in slot order, for selections without an own unit."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_queries
    t = tl.where(real, row, 0).to(tl.int64)
    limit = tl.load(limit_T + t, mask=real, other=0)
    dim_k = tl.arange(0, K_PAD)
    pair0 = (((head // RATIO).to(tl.int64) * num_queries + t) * RATIO + head % RATIO) * SLOTS
    acc = tl.zeros((ROWS, K_PAD), tl.float32)
    for slot in range(SLOTS):
        id_slot = tl.load(ids + t * stride_it + head.to(tl.int64) * stride_ih + slot, mask=real, other=-1)
        seen = (id_slot >= 0) & (id_slot < limit)
        at = (pair0 + slot)[:, None] * K + dim_k[None, :]
        acc += tl.load(dq_partial + at, mask=seen[:, None] & (dim_k < K)[None, :], other=0.0)
    at = dq + t[:, None] * stride_dqt + head.to(tl.int64) * stride_dqh + dim_k[None, :]
    tl.store(at, acc.to(dq.dtype.element_ty), mask=real[:, None] & (dim_k < K)[None, :])
