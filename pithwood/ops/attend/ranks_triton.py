"""Ranks of (query, unit) pairs in their lists, for selections with an own unit, tile by tile.

A tile holds queries of one head and one own unit: they share their document and their segment. While the document has
few units before them, a tile counts for itself, in bytes, and asks every list's counter once; pair by pair, counters
that a thousand queries share would be what all wait for. Legend as in lists_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_UNITS = 64
"""Units before a tile up to which it counts for itself."""


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _own_tile(
    ids, key_count_U, position_U, query_start_U, query_low_U, query_high_U, stride_t, stride_h,
    SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(own unit, first unit of the document, t [QUERIES], past units [QUERIES, SLOTS_PAD], which of them are there,
    which slots are) of program (head, tile)."""
    head = tl.program_id(0)
    unit = tl.program_id(1) // TILES
    at_row = (tl.program_id(1) % TILES) * QUERIES + tl.arange(0, QUERIES)
    own = tl.load(position_U + unit) // BLOCK
    query = tl.load(query_start_U + unit) + at_row
    real = (query >= tl.load(query_low_U + unit)) & (query < tl.load(query_high_U + unit)) & (at_row < BLOCK)
    real = real & (tl.load(key_count_U + unit) > 0)
    t = tl.where(real, query, 0)
    slot = tl.arange(0, SLOTS_PAD)
    inside = real[:, None] & (slot < SLOTS)[None, :]
    at = t.to(tl.int64)[:, None] * stride_t + head * stride_h + slot[None, :]
    past = tl.load(ids + at, mask=inside, other=-1)
    seen = inside & (past >= 0) & (past < own)
    return own, unit - own, t, tl.where(seen, past, 0), seen, inside


@triton.jit
def _ranks_in_tile(past, seen, counter, base, total, WORDS: tl.constexpr):
    """Rank of every pair among those of its tile and unit; base: where every unit's counter stood, [4 * WORDS]."""
    bits = tl.reduce(seen.to(tl.int64) << past.to(tl.int64), 1, _either)
    word = tl.arange(0, WORDS)
    nibble = ((bits[:, None] >> (4 * word).to(tl.int64)[None, :]) & 15).to(tl.int32)
    # Four bits to the lowest bits of four bytes; a tile has at most 128 rows, so that bytes do not overflow.
    bytes_ = (nibble * 0x00204081) & 0x01010101
    before = tl.cumsum(bytes_, 0) - bytes_  # [QUERIES, WORDS]
    sums = tl.sum(bytes_, 0)
    for byte in tl.static_range(4):
        count = (sums >> (8 * byte)) & 255
        unit = 4 * word + byte
        stood = tl.atomic_add(counter + unit.to(tl.int64) * total, count, mask=count > 0, sem="relaxed")
        tl.store(base + unit, stood, mask=count > 0)
    return (tl.gather(before, past >> 2, 1) >> (8 * (past & 3))) & 255


@triton.jit
def _count_tiles_kernel(
    ids, rank, count_XS, base, key_count_U, position_U, query_start_U, query_low_U, query_high_U,
    stride_t, stride_h, num_units, rows_per_group, span, early, num_early, total,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    TILES: tl.constexpr, TILE_UNITS: tl.constexpr,
):  # fmt: skip
    """Rank of every pair: in its tile and unit, or in its segment where the tile has more than TILE_UNITS units before
    it. Counters end at the segments' lengths."""
    head = tl.program_id(0)
    own, first, t, past, seen, inside = _own_tile(
        ids, key_count_U, position_U, query_start_U, query_low_U, query_high_U, stride_t, stride_h, SLOTS, SLOTS_PAD,
        BLOCK, QUERIES, TILES,
    )  # fmt: skip
    group = (head // RATIO).to(tl.int64)
    segment = tl.minimum(tl.where(own < early, own // span, num_early + (own - early) // span), total - 1)
    counter = count_XS + (group * num_units + first) * total + segment
    base_at = base + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head) * TILE_UNITS
    if own <= TILE_UNITS // 2:
        place = _ranks_in_tile(past, seen, counter, base_at, total, TILE_UNITS // 8)
    elif own <= TILE_UNITS:
        place = _ranks_in_tile(past, seen, counter, base_at, total, TILE_UNITS // 4)
    else:
        place = tl.atomic_add(counter + past.to(tl.int64) * total, 1, mask=seen, sem="relaxed")
    pair = (t[:, None] * RATIO + head % RATIO) * SLOTS + tl.arange(0, SLOTS_PAD)[None, :]
    tl.store(rank + group * rows_per_group + pair, tl.where(seen, place, -1), mask=inside)


@triton.jit
def _scatter_tiles_kernel(
    ids, rank, start_SX, base, entry_P, key_count_U, position_U, query_start_U, query_low_U, query_high_U,
    stride_t, stride_h, num_units, rows_per_group, span, early, num_early, total, num_lists,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    TILES: tl.constexpr, TILE_UNITS: tl.constexpr,
):  # fmt: skip
    """Write every pair to its place in its list."""
    head = tl.program_id(0)
    own, first, t, past, seen, _ = _own_tile(
        ids, key_count_U, position_U, query_start_U, query_low_U, query_high_U, stride_t, stride_h, SLOTS, SLOTS_PAD,
        BLOCK, QUERIES, TILES,
    )  # fmt: skip
    group = (head // RATIO).to(tl.int64)
    pair = (t[:, None] * RATIO + head % RATIO) * SLOTS + tl.arange(0, SLOTS_PAD)[None, :]
    place = tl.load(rank + group * rows_per_group + pair, mask=seen, other=0)
    if own <= TILE_UNITS:
        base_at = base + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head) * TILE_UNITS
        place += tl.load(base_at + past, mask=seen, other=0)
    segment = tl.minimum(tl.where(own < early, own // span, num_early + (own - early) // span), total - 1)
    at = segment.to(tl.int64) * num_lists + group * num_units + first + past
    start = tl.load(start_SX + at, mask=seen, other=0)
    tl.store(entry_P + start + place, pair, mask=seen)
