"""Forward of early queries: a sweep over all keys before them, in which rows leave out the units that they did not
choose.

A query at position p that attends to S = top_k * block_size keys costs p keys here and S keys key-major. But here there
are no lists, no gathered rows and no partial results, which cost more than to multiply twice as often. At p < S both
compute the same.

Legend: T queries, H query heads, G KV heads, K query/key head dim, V value head dim, U units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pithwood.ops.attend.forward_triton import _load_keys, _store_rows

UNIT_BITS = 64
"""Units that the set of a row can hold."""


@triton.jit
def _early_kernel(
    q, k, v, o, lse, ids,
    key_start_U, key_count_U, position_U, query_start_U, query_low_U, query_high_U,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_ot, stride_oh, stride_lt,
    stride_it, stride_ih, num_tiles, heads, early, scale_log2,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr, HEAD_RATIO: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of ROWS queries of one head that stand in one of the first `early` units of their document.

    One program streams the keys of the rows' own unit, causally, and then those of all units before it. fp32 softmax
    and accumulators. A row takes part in a unit if its bit of a 64-bit set says so: an unchosen unit's scores are set
    against a maximum of +inf, so that leaving it out costs nothing per score.
    """
    # Last tiles first: in a document they are the longest. Heads of one KV head run side by side, for its keys.
    head = tl.program_id(0) % heads
    at = num_tiles - 1 - tl.program_id(0) // heads
    unit = at // TILES
    offset = (at % TILES) * ROWS
    key_count = tl.load(key_count_U + unit)
    position = tl.load(position_U + unit)
    own = position // BLOCK
    if (offset >= key_count) | (own >= early):
        return
    at_row = offset + tl.arange(0, ROWS)
    query = tl.load(query_start_U + unit) + at_row
    real = (query >= tl.load(query_low_U + unit)) & (query < tl.load(query_high_U + unit)) & (at_row < BLOCK)
    if tl.max(real.to(tl.int32), 0) == 0:
        return
    t = tl.where(real, query, 0).to(tl.int64)
    dim_k = tl.arange(0, K_PAD)
    dim_v = tl.arange(0, V_PAD)
    key = tl.arange(0, KEYS)
    group = (head // HEAD_RATIO).to(tl.int64)
    head64 = head.to(tl.int64)
    key_start = tl.load(key_start_U + unit).to(tl.int64)
    k_at = k + group * stride_kg + key_start * stride_kt
    v_at = v + group * stride_vg + key_start * stride_vt
    q_ptr = q + t[:, None] * stride_qt + head64 * stride_qh + dim_k[None, :]
    q_tile = tl.load(q_ptr, mask=real[:, None] & (dim_k < K)[None, :], other=0.0)
    slot = tl.arange(0, TOP_K_PAD)
    id_ptr = ids + t[:, None] * stride_it + head64 * stride_ih + slot[None, :]
    id_tile = tl.load(id_ptr, mask=real[:, None] & (slot < TOP_K)[None, :], other=-1)
    chosen = (id_tile >= 0) & (id_tile <= own)
    # The ids of a row differ, so the sum of their bits is their set.
    bits = tl.sum(chosen.to(tl.int64) << tl.where(chosen, id_tile, 0).to(tl.int64), 1)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_PAD), tl.float32)
    for part0 in tl.range(0, tl.minimum(offset + ROWS, key_count), KEYS, num_stages=1):
        k_tile = _load_keys(k_at, part0 + key, key_count, stride_kt, dim_k, K, K_PAD, False)
        v_tile = _load_keys(v_at, part0 + key, key_count, stride_vt, dim_v, V, V_PAD, False)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        # Key 0 of the unit is seen by all its queries, so the first part leaves no row without a finite maximum.
        s = tl.where((part0 + key)[None, :] <= at_row[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    # All units before the own one are whole.
    k_at -= position.to(tl.int64) * stride_kt
    v_at -= position.to(tl.int64) * stride_vt
    for step in tl.range(0, own * PARTS, num_stages=STAGES):
        past = step // PARTS
        within = (step % PARTS) * KEYS + key
        if BLOCK % KEYS == 0:
            k_tile = _load_keys(k_at, step * KEYS + key, position, stride_kt, dim_k, K, K_PAD, True)
            v_tile = _load_keys(v_at, step * KEYS + key, position, stride_vt, dim_v, V, V_PAD, True)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        else:
            end = (past + 1) * BLOCK
            k_tile = _load_keys(k_at, past * BLOCK + within, end, stride_kt, dim_k, K, K_PAD, False)
            v_tile = _load_keys(v_at, past * BLOCK + within, end, stride_vt, dim_v, V, V_PAD, False)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
            s = tl.where((within < BLOCK)[None, :], s, float("-inf"))
        member = ((bits >> past) & 1) != 0
        new_top = tl.where(member, tl.maximum(top, tl.max(s, 1)), top)
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - tl.where(member, new_top, float("inf"))[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    promised = ((bits >> own) & 1) != 0
    _store_rows(o, lse, acc, total, top, promised, t, head, real, stride_ot, stride_oh, stride_lt, dim_v, V)
