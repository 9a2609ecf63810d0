"""From query-major block ids to block-major lists of queries, without a sort and without a host sync.

A list belongs to a KV head and a unit and holds the rows of all query heads of that KV head, so that keys and values
are loaded once for all of them. Count with ranks, scan, scatter: three passes over the ids. Ranks come from atomic
counters, so the order inside a list may differ from call to call; the ordered form sorts stably instead.

Legend: T queries, H query heads, G KV heads of the slice at hand, U units, X = G * U lists, P pairs of a (query, head)
and one of its slots.
An entry of a list is `(t * RATIO + r) * SLOTS + slot`, r the query head within its KV head.

A list is cut into segments by the queries' position in their document. Inside a segment the order is free, segments
ascend: programs that walk over the lists of one document in step find each other's rows in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.attend.plan import BlockPlan
from pithwood.ops.attend.ranks_triton import TILE_UNITS, _count_tiles_kernel, _scatter_tiles_kernel

QUERIES = 128
"""Queries per program of the passes over ids."""
TILE_BLOCK = 64
"""Selections with an own unit of at least so many keys have their ranks counted tile by tile, unless they are ordered.
The tiles of smaller units would be too many, and Triton 3.6 compiles scans and gathers over them wrongly."""
LISTS = 256
"""Lists per program that writes work items."""
SEGMENT_QUERIES = 256
"""Queries of a document that one segment takes up, a unit at least."""
LATE_SEGMENTS = 16
"""Segments of the queries that are not early; those of long documents crowd the last one."""


@dataclass(frozen=True)
class Segments:
    """How lists are cut by the queries' own unit."""

    own: bool
    """False: there are no own units to go by, and one segment."""
    span: int
    """Units of a segment."""
    early: int
    """Queries with an own unit below this are early: they have segments apart from the others."""
    num_early: int
    total: int
    """A list has so many."""

    @staticmethod
    def of(block_size: int, early: int, own: bool) -> Segments:
        if not own:
            return Segments(False, 1, 0, 0, 1)
        span = max(SEGMENT_QUERIES // block_size, 1)
        num_early = triton.cdiv(early, span)
        return Segments(True, span, early, num_early, num_early + LATE_SEGMENTS)


@dataclass(frozen=True)
class Lists:
    """Block-major lists of some KV heads: list x = g * U + u."""

    entry_P: Tensor
    """int32; the entries of list x are entry_P[start_X[x] : start_X[x] + count_X[x]]."""
    start_X: Tensor
    """int64"""
    count_X: Tensor
    """int32"""


@triton.jit
def _segment(own, span, early, num_early, total):
    """The segment of queries with these own units."""
    late = num_early + (own - early) // span
    return tl.minimum(tl.where(own < early, own // span, late), total - 1)


@triton.jit
def _count_kernel(
    ids, rank, count_XS, first_unit_T, limit_T,
    num_queries, stride_t, stride_h, num_units, rows_per_group, span, early, num_early, total,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Rank of every pair in its segment; counters end at the segments' lengths. One program: QUERIES rows of a head."""
    # Neighbouring programs count different heads: fewer meet at one counter.
    head = tl.program_id(0)
    t = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    slot = tl.arange(0, SLOTS_PAD)
    real = t < num_queries
    first = tl.load(first_unit_T + t, mask=real, other=0)
    limit = tl.load(limit_T + t, mask=real, other=0)
    inside = real[:, None] & (slot < SLOTS)[None, :]
    at = t.to(tl.int64)[:, None] * stride_t + head * stride_h + slot[None, :]
    unit = tl.load(ids + at, mask=inside, other=-1)  # [QUERIES, SLOTS_PAD]
    seen = inside & (unit >= 0) & (unit < limit[:, None])
    group = head // RATIO
    x = group.to(tl.int64) * num_units + first[:, None] + unit
    segment = _segment(limit, span, early, num_early, total)
    place = tl.atomic_add(count_XS + x * total + segment[:, None], 1, mask=seen, sem="relaxed")
    pair = (t[:, None] * RATIO + head % RATIO) * SLOTS + slot[None, :]
    tl.store(rank + group.to(tl.int64) * rows_per_group + pair, tl.where(seen, place, -1), mask=inside)


@triton.jit
def _scatter_kernel(
    ids, rank, start_SX, entry_P, first_unit_T, limit_T,
    num_queries, stride_t, stride_h, num_units, rows_per_group, span, early, num_early, total, num_lists,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, QUERIES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Write every pair to its place in its list. WHOLE: ranks count from the start of the list, not of the segment."""
    # Neighbouring programs count different heads: fewer meet at one counter.
    head = tl.program_id(0)
    t = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    slot = tl.arange(0, SLOTS_PAD)
    real = t < num_queries
    first = tl.load(first_unit_T + t, mask=real, other=0)
    limit = tl.load(limit_T + t, mask=real, other=0)
    inside = real[:, None] & (slot < SLOTS)[None, :]
    at = t.to(tl.int64)[:, None] * stride_t + head * stride_h + slot[None, :]
    unit = tl.load(ids + at, mask=inside, other=-1)
    group = head // RATIO
    pair = (t[:, None] * RATIO + head % RATIO) * SLOTS + slot[None, :]
    place = tl.load(rank + group.to(tl.int64) * rows_per_group + pair, mask=inside, other=-1)
    seen = place >= 0
    at = group.to(tl.int64) * num_units + first[:, None] + unit
    if not WHOLE:
        at += _segment(limit, span, early, num_early, total)[:, None].to(tl.int64) * num_lists
    start = tl.load(start_SX + at, mask=seen, other=0)
    tl.store(entry_P + start + place, pair, mask=seen)


@triton.jit
def _bounds_kernel(
    count_XS, end_XS, start_X, count_X, late_start_X, late_count_X, start_SX, num_lists, num_early, total,
    LISTS: tl.constexpr,
):  # fmt: skip
    """Where lists, and their parts that are not early, begin, and how long they are; and where segments begin, those of
    all lists side by side: neighbouring queries are in one segment of many lists."""
    x = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    real = x < num_lists
    at = x.to(tl.int64) * total
    start = tl.load(end_XS + at, mask=real, other=0) - tl.load(count_XS + at, mask=real, other=0)
    end = tl.load(end_XS + at + total - 1, mask=real, other=0)
    for segment in range(total):
        first = tl.load(end_XS + at + segment, mask=real, other=0) - tl.load(
            count_XS + at + segment, mask=real, other=0
        )
        tl.store(start_SX + x.to(tl.int64) + segment * num_lists, first, mask=real)
    at += num_early
    late_start = tl.load(end_XS + at, mask=real, other=0) - tl.load(count_XS + at, mask=real, other=0)
    tl.store(start_X + x, start, mask=real)
    tl.store(count_X + x, (end - start).to(tl.int32), mask=real)
    tl.store(late_start_X + x, late_start, mask=real)
    tl.store(late_count_X + x, (end - late_start).to(tl.int32), mask=real)


@triton.jit
def _items_kernel(
    count_X, end_item_X, key_count_U, item_list, item_chunk, first_item_X, num_lists, num_units,
    CHUNK: tl.constexpr, AT_LEAST_ONE: tl.constexpr, LONGEST_FIRST: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """Cut every list into chunks of CHUNK rows and write one work item for each, and the first item of every list.
    LONGEST_FIRST: of LISTS neighbouring lists."""
    x = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    real = x < num_lists
    chunks = _num_chunks(count_X, key_count_U, x, real, num_units, CHUNK, AT_LEAST_ONE)
    first = tl.load(end_item_X + x, mask=real, other=0) - chunks
    if LONGEST_FIRST:
        # The shorter, the later; lists past the last one come last.
        count = tl.load(count_X + x, mask=real, other=-1)
        key = tl.sort((count.to(tl.int64) << 32) | tl.arange(0, LISTS).to(tl.int64), descending=True)
        x = tl.program_id(0) * LISTS + (key & 0xFFFFFFFF).to(tl.int32)
        real = x < num_lists
        start = tl.min(tl.where(tl.arange(0, LISTS) == 0, first, 0x7FFFFFFFFFFFFFFF), 0)
        chunks = _num_chunks(count_X, key_count_U, x, real, num_units, CHUNK, AT_LEAST_ONE)
        first = start + tl.cumsum(chunks, 0) - chunks
    tl.store(first_item_X + x, first, mask=real)
    most = tl.max(chunks, 0)
    chunk = 0
    while chunk < most:
        inside = chunk < chunks
        tl.store(item_list + first + chunk, x, mask=inside)
        tl.store(item_chunk + first + chunk, tl.zeros_like(x) + chunk, mask=inside)
        chunk += 1


@triton.jit
def _chunks_kernel(
    count_X, key_count_U, chunks_X, num_lists, num_units,
    CHUNK: tl.constexpr, AT_LEAST_ONE: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    real = x < num_lists
    tl.store(chunks_X + x, _num_chunks(count_X, key_count_U, x, real, num_units, CHUNK, AT_LEAST_ONE), mask=real)


@triton.jit
def _num_chunks(
    count_X, key_count_U, x, real, num_units, CHUNK: tl.constexpr, AT_LEAST_ONE: tl.constexpr
):  # fmt: skip
    count = tl.load(count_X + x, mask=real, other=0)
    chunks = (count + CHUNK - 1) // CHUNK
    if AT_LEAST_ONE:
        keys = tl.load(key_count_U + x % num_units, mask=real, other=0)
        chunks = tl.where(keys > 0, tl.maximum(chunks, 1), 0)
    return chunks


def empty_lists(ids_THk: Tensor, plan: BlockPlan, num_groups: int, slots: int) -> Lists:
    """Lists of the same sizes as `build_lists` gives, with nothing in them."""
    device, num_lists = ids_THk.device, num_groups * plan.num_units
    entry_P = torch.zeros(ids_THk.shape[0] * ids_THk.shape[1] * slots, dtype=torch.int32, device=device)
    start_X = torch.zeros(num_lists, dtype=torch.int64, device=device)
    return Lists(entry_P, start_X, torch.zeros(num_lists, dtype=torch.int32, device=device))


def build_lists(
    ids_THk: Tensor, plan: BlockPlan, num_groups: int, slots: int, segments: Segments, ordered: bool
) -> tuple[Lists, Lists]:
    """Lists of the heads in ids [T, H, k] (a slice of heads is fine), which belong to num_groups KV heads; and those
    parts of them that belong to queries that are not early.

    slots     leading ids of each row that can be past units: k, or k - 1 if the own unit is among them
    ordered   entries ascend in every list, whatever ran when; slower
    """
    num_queries, heads, _ = ids_THk.shape
    ratio = heads // num_groups
    num_lists, bound = num_groups * plan.num_units, num_queries * heads * slots
    rows_per_group = num_queries * ratio * slots
    if rows_per_group >= 2**31:
        raise ValueError(
            f"{num_queries} queries x {ratio} query heads per KV head x {slots} selected blocks exceed 2^31 pairs; "
            "use fewer tokens per call or a smaller top_k"
        )
    device = ids_THk.device
    count_XS = torch.zeros(num_lists, segments.total, dtype=torch.int32, device=device)
    rank = torch.empty(bound, dtype=torch.int32, device=device)
    entry_P = torch.empty(bound, dtype=torch.int32, device=device)
    shape = {"RATIO": ratio, "SLOTS": slots, "SLOTS_PAD": triton.next_power_of_2(slots)}
    by_tiles = segments.own and plan.block_size >= TILE_BLOCK and not ordered
    sizes = (
        ids_THk.stride(0), ids_THk.stride(1), plan.num_units, rows_per_group, segments.span, segments.early,
        segments.num_early, segments.total,
    )  # fmt: skip
    if by_tiles:
        shape |= {"BLOCK": plan.block_size, "QUERIES": min(QUERIES, triton.next_power_of_2(plan.block_size))}
        shape |= {"TILES": triton.cdiv(plan.block_size, shape["QUERIES"]), "TILE_UNITS": TILE_UNITS}
        grid = (heads, plan.num_units * shape["TILES"])
        base = torch.empty(grid[0] * grid[1] * TILE_UNITS, dtype=torch.int32, device=device)
        tables = (
            plan.key_count_U, plan.position_U, plan.query_start_U, plan.query_low_U, plan.query_high_U
        )  # fmt: skip
        _count_tiles_kernel[grid](ids_THk, rank, count_XS, base, *tables, *sizes, **shape)
    else:
        grid = (heads, triton.cdiv(num_queries, QUERIES))
        shape["QUERIES"] = QUERIES
        _count_kernel[grid](ids_THk, rank, count_XS, plan.first_unit_T, plan.limit_T, num_queries, *sizes, **shape)
    end_XS = count_XS.view(-1).cumsum(0)
    start_X, late_start_X = (torch.empty(num_lists, dtype=torch.int64, device=device) for _ in range(2))
    count_X, late_count_X = (torch.empty(num_lists, dtype=torch.int32, device=device) for _ in range(2))
    start_SX = torch.empty(segments.total, num_lists, dtype=torch.int64, device=device)
    _bounds_kernel[(triton.cdiv(num_lists, LISTS),)](
        count_XS, end_XS, start_X, count_X, late_start_X, late_count_X, start_SX, num_lists, segments.num_early,
        segments.total, LISTS=LISTS,
    )  # fmt: skip
    if by_tiles:
        _scatter_tiles_kernel[grid](ids_THk, rank, start_SX, base, entry_P, *tables, *sizes, num_lists, **shape)
    else:
        if ordered:
            _sort_ranks(ids_THk, rank, start_X, plan, num_groups, slots)
        starts = start_X if ordered else start_SX
        _scatter_kernel[grid](
            ids_THk, rank, starts, entry_P, plan.first_unit_T, plan.limit_T, num_queries, *sizes, num_lists, **shape,
            WHOLE=ordered,
        )  # fmt: skip
    return Lists(entry_P, start_X, count_X), Lists(entry_P, late_start_X, late_count_X)


def _sort_ranks(ids_THk: Tensor, rank: Tensor, start_X: Tensor, plan: BlockPlan, num_groups: int, slots: int) -> None:
    """Replace ranks in segments, which atomic counters gave, by those in whole lists in the order of their entries."""
    num_queries, heads, _ = ids_THk.shape
    ratio = heads // num_groups
    list_of_pair = plan.first_unit_T.long()[:, None, None] + ids_THk[..., :slots]
    # [T, G, ratio, slots] -> [G, T, ratio, slots]: the order of ranks
    list_of_pair = list_of_pair.view(num_queries, num_groups, ratio, slots).transpose(0, 1)
    group = torch.arange(num_groups, device=rank.device)[:, None, None, None]
    key = (list_of_pair + group * plan.num_units).reshape(-1)
    seen = rank >= 0
    # Pairs that are in no list go last.
    key = torch.where(seen, key, num_groups * plan.num_units)
    order = key.sort(stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    start = start_X[key.clamp(max=start_X.shape[0] - 1)]
    rank.copy_(torch.where(seen, place - start, -1))


@dataclass(frozen=True)
class Items:
    """Work items: at most CHUNK rows of one list each. Items past the last one have list -1."""

    list_I: Tensor
    chunk_I: Tensor
    first_X: Tensor
    """int64: the first item of every list."""
    bound: int


def build_items(
    lists: Lists, plan: BlockPlan, chunk: int, most: int, at_least_one: bool, longest_first: bool = False
) -> Items:
    """One item per `chunk` rows of every list, in the order of lists; at_least_one: also for empty lists of units that
    hold keys. `most`: entries that the lists can have in all. longest_first: of LISTS neighbouring lists, so that the
    last ones to be taken are short."""
    num_lists = lists.count_X.shape[0]
    bound = most // chunk + num_lists
    device = lists.count_X.device
    chunks_X = torch.empty(num_lists, dtype=torch.int32, device=device)
    grid = (triton.cdiv(num_lists, LISTS),)
    options = {"CHUNK": chunk, "AT_LEAST_ONE": at_least_one, "LISTS": LISTS}
    _chunks_kernel[grid](lists.count_X, plan.key_count_U, chunks_X, num_lists, plan.num_units, **options)
    end_item_X = chunks_X.cumsum(0)
    list_I = torch.full((bound,), -1, dtype=torch.int32, device=device)
    chunk_I = torch.empty(bound, dtype=torch.int32, device=device)
    first_X = torch.empty_like(end_item_X)
    _items_kernel[grid](
        lists.count_X, end_item_X, plan.key_count_U, list_I, chunk_I, first_X, num_lists, plan.num_units,
        LONGEST_FIRST=longest_first, **options,
    )  # fmt: skip
    return Items(list_I, chunk_I, first_X, bound)
