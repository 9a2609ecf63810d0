"""Forward kernels of block-sparse attention: key-major partial results, then the own block and the merge, query-major.

Legend: T queries, H query heads, G KV heads, K query/key head dim, V value head dim, U units, k ids per query, X lists.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_kernel(
    q, k, v, partial_o, partial_lse,
    entry_P, start_X, count_X, item_list, item_chunk,
    key_start_U, key_count_U, position_U, position_T,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    num_units, rows_per_group, scale_log2,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    ALL_SEEN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one list chunk's queries to its unit: a normalised output and a log2-sum for every pair.

    One program owns up to CHUNK rows of a list. Units of one part keep K and V on chip and stream the gathered queries;
    larger units keep the queries of a tile and stream their keys. Rows go to [pair, V], where the merge reads all
    pairs of a query side by side. fp32 softmax and accumulators. ALL_SEEN: every key of every unit is visible.
    """
    item = tl.program_id(0)
    x = tl.load(item_list + item)
    if x < 0:
        return
    chunk = tl.load(item_chunk + item)
    group = x // num_units
    unit = x % num_units
    start = tl.load(start_X + x)
    first = chunk * CHUNK
    last = tl.minimum(tl.load(count_X + x), first + CHUNK)
    key_start = tl.load(key_start_U + unit).to(tl.int64)
    key_count = tl.load(key_count_U + unit)
    position = tl.load(position_U + unit)
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    key = tl.arange(0, KEYS)
    k_at = k + group.to(tl.int64) * stride_kg + key_start * stride_kt
    v_at = v + group.to(tl.int64) * stride_vg + key_start * stride_vt
    q_at = q + group.to(tl.int64) * RATIO * stride_qh
    out_row = group.to(tl.int64) * rows_per_group
    if PARTS == 1:
        k_tile = _load_keys(k_at, key, key_count, stride_kt, dim_k, K, K_PAD, ALL_SEEN and KEYS == BLOCK)
        v_tile = _load_keys(v_at, key, key_count, stride_vt, dim_v, V, V_PAD, ALL_SEEN and KEYS == BLOCK)
    for row0 in range(first, last, ROWS):
        row = row0 + tl.arange(0, ROWS)
        real = row < last
        pair = tl.load(entry_P + start + row, mask=real, other=0)
        q_row = pair // SLOTS
        t = q_row // RATIO
        q_ptr = q_at + t.to(tl.int64)[:, None] * stride_qt + (q_row % RATIO)[:, None] * stride_qh + dim_k[None, :]
        q_tile = tl.load(q_ptr) if K == K_PAD else tl.load(q_ptr, mask=dim_k[None, :] < K, other=0.0)
        reach = tl.full((ROWS,), BLOCK, tl.int32)
        if CAUSAL and not ALL_SEEN:
            reach = tl.load(position_T + t) - position + 1
        if PARTS == 1:
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
            s = _hide(s, key, reach, key_count, ALL_SEEN, KEYS == BLOCK)
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        else:
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, V_PAD), tl.float32)
            for part in range(PARTS):
                key_p = part * KEYS + key
                k_tile = _load_keys(k_at, key_p, key_count, stride_kt, dim_k, K, K_PAD, ALL_SEEN and BLOCK % KEYS == 0)
                v_tile = _load_keys(v_at, key_p, key_count, stride_vt, dim_v, V, V_PAD, ALL_SEEN and BLOCK % KEYS == 0)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
                s = _hide(s, key_p, reach, key_count, ALL_SEEN, BLOCK % KEYS == 0)
                new_top = tl.maximum(top, tl.max(s, 1))
                # A row may see nothing in the parts so far: -inf - -inf would be NaN.
                base = new_top if ALL_SEEN else tl.where(new_top == float("-inf"), 0.0, new_top)
                shrink = tl.exp2(top - base)
                p = tl.exp2(s - base[:, None])
                total = total * shrink + tl.sum(p, 1)
                acc = acc * shrink[:, None]
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
                top = new_top
        at = out_row + pair
        o_ptr = partial_o + at[:, None] * V + dim_v[None, :]
        share = 1.0 / total
        tl.store(
            o_ptr, (acc * share[:, None]).to(partial_o.dtype.element_ty), mask=real[:, None] & (dim_v < V)[None, :]
        )
        tl.store(partial_lse + at, top + tl.log2(total), mask=real)


@triton.jit
def _load_keys(
    base, key, key_count, stride_t, dim, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """[keys, DIM_PAD] rows of one head; zero past the unit's end and the head dim."""
    at = base + key.to(tl.int64)[:, None] * stride_t + dim[None, :]
    if WHOLE and DIM == DIM_PAD:
        return tl.load(at)
    return tl.load(at, mask=(key < key_count)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _hide(s, key, reach, key_count, ALL_SEEN: tl.constexpr, FILLED: tl.constexpr):
    """Scores [rows, keys] with -inf for keys past the row's reach or the unit's end."""
    if ALL_SEEN:
        if not FILLED:
            s = tl.where((key < key_count)[None, :], s, float("-inf"))
    else:
        s = tl.where((key < key_count)[None, :] & (key[None, :] < reach[:, None]), s, float("-inf"))
    return s


@triton.jit
def _own_kernel(
    q, k, v, o, lse, partial_o, partial_lse, ids,
    key_start_U, key_count_U, position_U, query_start_U, query_low_U, query_high_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_ot, stride_oh, stride_lt,
    stride_it, stride_ih, num_queries, early, scale_log2,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr,
    RATIO: tl.constexpr, HEAD_RATIO: tl.constexpr, SLOTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Causal attention of a tile of queries to their own unit, merged with their SLOTS partial results.

    One program owns ROWS queries of one head and unit; the first `early` units of a document are `_early_kernel`'s. A
    query whose ids lack its own unit gets NaN: the selection's promise `own` is not kept.
    """
    unit = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    head = tl.program_id(1)
    key_count = tl.load(key_count_U + unit)
    offset = tile * ROWS
    own = tl.load(position_U + unit) // BLOCK
    if (offset >= key_count) | (own < early):
        return
    at_row = offset + tl.arange(0, ROWS)
    query = tl.load(query_start_U + unit) + at_row
    real = (query >= tl.load(query_low_U + unit)) & (query < tl.load(query_high_U + unit)) & (at_row < BLOCK)
    if tl.max(real.to(tl.int32), 0) == 0:
        return
    t = tl.where(real, query, 0).to(tl.int64)
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    key_start = tl.load(key_start_U + unit).to(tl.int64)
    group = (head // HEAD_RATIO).to(tl.int64)
    k_at = k + group * stride_kg + key_start * stride_kt
    v_at = v + group * stride_vg + key_start * stride_vt
    q_ptr = q + t[:, None] * stride_qt + head.to(tl.int64) * stride_qh + dim_k[None, :]
    q_tile = tl.load(q_ptr, mask=real[:, None] & (dim_k < K)[None, :], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_PAD), tl.float32)
    for part0 in range(0, tl.minimum(offset + ROWS, key_count), KEYS):
        key = part0 + tl.arange(0, KEYS)
        k_tile = _load_keys(k_at, key, key_count, stride_kt, dim_k, K, K_PAD, False)
        v_tile = _load_keys(v_at, key, key_count, stride_vt, dim_v, V, V_PAD, False)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        # Key 0 of the unit is seen by all its queries, so the first part leaves no row without a finite maximum.
        s = tl.where(key[None, :] <= at_row[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    slot_k = tl.arange(0, TOP_K_PAD)
    id_ptr = ids + t[:, None] * stride_it + head.to(tl.int64) * stride_ih + slot_k[None, :]
    id_tile = tl.load(id_ptr, mask=real[:, None] & (slot_k < TOP_K)[None, :], other=-1)
    promised = tl.max((id_tile == own).to(tl.int32), 1) > 0
    # Pairs lie as [G, T, RATIO, SLOTS]: the slots of a query head are neighbours.
    pair0 = (((head // RATIO).to(tl.int64) * num_queries + t) * RATIO + head % RATIO) * SLOTS
    seen = (slot_k < SLOTS)[None, :] & (id_tile >= 0) & (id_tile < own)
    piece = tl.load(partial_lse + pair0[:, None] + slot_k[None, :], mask=seen, other=float("-inf"))
    new_top = tl.maximum(top, tl.max(piece, 1))
    shrink = tl.exp2(top - new_top)
    weight = tl.exp2(piece - new_top[:, None])
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    # Rows that are not seen hold anything, NaN too: they are loaded, so that loads wait for nothing, but not used.
    for slot in tl.range(SLOTS, num_stages=STAGES):
        o_ptr = partial_o + (pair0 + slot)[:, None] * V + dim_v[None, :]
        if V == V_PAD:
            o_piece = tl.load(o_ptr)
        else:
            o_piece = tl.load(o_ptr, mask=(dim_v < V)[None, :], other=0.0)
        w = tl.sum(tl.where((slot_k == slot)[None, :], weight, 0.0), 1)
        acc += tl.where((w > 0)[:, None], o_piece.to(tl.float32) * w[:, None], 0.0)
    top = new_top
    _store_rows(o, lse, acc, total, top, promised, t, head, real, stride_ot, stride_oh, stride_lt, dim_v, V)


@triton.jit
def _store_rows(
    o, lse, acc, total, top, promised, t, head, real, stride_ot, stride_oh, stride_lt, dim_v, V: tl.constexpr
):  # fmt: skip
    """Normalised rows and natural log-sums; NaN where the promise is broken."""
    total = tl.where(promised, total, float("nan"))
    o_ptr = o + t[:, None] * stride_ot + head.to(tl.int64) * stride_oh + dim_v[None, :]
    tl.store(o_ptr, (acc / total[:, None]).to(o.dtype.element_ty), mask=real[:, None] & (dim_v < V)[None, :])
    tl.store(lse + t * stride_lt + head, (top + tl.log2(total)) * 0.6931471805599453, mask=real)


@triton.jit
def _merge_kernel(
    o, lse, partial_o, partial_lse, ids, limit_T,
    stride_ot, stride_oh, stride_lt, stride_it, stride_ih, num_queries,
    V: tl.constexpr, V_PAD: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of a tile of queries of one head; rows without any give zero and -inf."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_queries
    t = tl.where(real, row, 0).to(tl.int64)
    limit = tl.load(limit_T + t, mask=real, other=0)
    dim_v = tl.arange(0, V_PAD)
    pair0 = (((head // RATIO).to(tl.int64) * num_queries + t) * RATIO + head % RATIO) * SLOTS
    id_row = ids + t * stride_it + head.to(tl.int64) * stride_ih
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_PAD), tl.float32)
    for slot in range(SLOTS):
        id_slot = tl.load(id_row + slot, mask=real, other=-1)
        seen = (id_slot >= 0) & (id_slot < limit)
        piece = tl.load(partial_lse + pair0 + slot, mask=seen, other=float("-inf"))
        o_ptr = partial_o + (pair0 + slot)[:, None] * V + dim_v[None, :]
        o_piece = tl.load(o_ptr, mask=seen[:, None] & (dim_v < V)[None, :], other=0.0).to(tl.float32)
        new_top = tl.maximum(top, piece)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(piece - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + o_piece * weight[:, None]
        top = new_top
    some = total > 0
    total = tl.where(some, total, 1.0)
    o_ptr = o + t[:, None] * stride_ot + head.to(tl.int64) * stride_oh + dim_v[None, :]
    tl.store(o_ptr, (acc / total[:, None]).to(o.dtype.element_ty), mask=real[:, None] & (dim_v < V)[None, :])
    tl.store(lse + t * stride_lt + head, (top + tl.log2(total)) * 0.6931471805599453, mask=real)
