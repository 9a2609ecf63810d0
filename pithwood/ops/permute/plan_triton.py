"""The plan of rows on a GPU: a stable, deterministic counting sort of (token, slot) pairs by expert.

Pairs are cut into tiles. One launch counts each tile's pairs by expert (and all pairs, by integer atomics, which give
the same in any order), one turns the counts into the first row of every (tile, expert), one ranks each pair among the
pairs of its tile and writes its row. Nothing waits for the host.

Legend: T packed tokens, E experts, k experts per token, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pithwood.ops.operator import operator

TILE = 256
"""Pairs that one program ranks: it compares each with all, in pieces of PIECE."""
PIECE = 32
COUNT_TILE = 1024
"""Pairs that one program counts where nothing but the counts is wanted."""
SCAN_TILES = 128
"""Tiles and bins that one program of the scan takes at a time."""
SCAN_BINS = 16
MIN_BINS = 32
"""As many as a warp has threads: a histogram of fewer saves nothing."""


@operator("plan_rows")
def plan_rows(
    ids_Tk: Tensor, num_experts: int, first: int = 0, max_rows: int = -1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(offsets [E + 1], row_Tk, pair_R, token_R, count [E]), all int32, as `plan_rows_ref` (max_rows -1: no bound); ids
    int32 or int64.
    """
    num_pairs = ids_Tk.numel()
    ids_Tk = ids_Tk.contiguous()
    make = lambda *size: torch.empty(size, dtype=torch.int32, device=ids_Tk.device)  # noqa: E731
    num_rows = num_pairs if max_rows < 0 else min(num_pairs, max_rows)
    offsets, row_Tk, pair_R, token_R = make(num_experts + 1), make(*ids_Tk.shape), make(num_rows), make(num_rows)
    if num_pairs == 0:
        return offsets.zero_(), row_Tk, pair_R, token_R, torch.zeros_like(offsets[1:])
    total = _sort(ids_Tk, num_experts, first, offsets, row_Tk, pair_R, token_R, capacity=0)
    return offsets, row_Tk, pair_R, token_R, total[:num_experts]


@operator("plan_slots")
def plan_slots(ids_Tk: Tensor, num_parts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(offsets, row_Tk, pair_R, token_R, count), all int32, as `plan_slots_ref`; ids int32 or int64."""
    ids_Tk, num_rows = ids_Tk.contiguous(), num_parts * capacity
    pair_R = torch.full((num_rows,), -1, dtype=torch.int32, device=ids_Tk.device)
    token_R = torch.full_like(pair_R, -1)
    row_Tk = torch.empty_like(ids_Tk, dtype=torch.int32)
    offsets = torch.arange(0, num_rows + 1, capacity, dtype=torch.int32, device=ids_Tk.device)
    if not ids_Tk.numel():
        return offsets, row_Tk, pair_R, token_R, torch.zeros_like(offsets[1:])
    total = _sort(ids_Tk, num_parts, 0, torch.empty_like(offsets), row_Tk, pair_R, token_R, capacity=capacity)
    return offsets, row_Tk, pair_R, token_R, total[:num_parts]


def _sort(
    ids_Tk: Tensor,
    num_bins: int,
    first: int,
    starts: Tensor,
    row_Tk: Tensor,
    pair_R: Tensor,
    token_R: Tensor,
    capacity: int,
) -> Tensor:
    """Fill the tensors of a plan; returns the pairs of each bin, those of none behind them."""
    num_pairs, k = ids_Tk.numel(), ids_Tk.shape[1]
    # One bin more for pairs without an expert, and one for what a last tile has no pairs for.
    bins = max(triton.next_power_of_2(num_bins + 2), MIN_BINS)
    num_tiles = triton.cdiv(num_pairs, TILE)
    total = torch.zeros(bins, dtype=torch.int32, device=ids_Tk.device)
    first_row = torch.empty(num_tiles, bins, dtype=torch.int32, device=ids_Tk.device)
    _plan_count[(num_tiles,)](ids_Tk, first_row, total, num_pairs, num_bins, first, TILE=TILE, BINS=bins, num_warps=4)
    scan_bins = min(SCAN_BINS, bins)
    _plan_scan[(bins // scan_bins,)](
        first_row, total, starts, num_tiles, num_bins, num_pairs if capacity else pair_R.shape[0],
        TILES=SCAN_TILES, OWN=scan_bins, BINS=bins, num_warps=4,
    )  # fmt: skip
    _plan_rank[(num_tiles,)](
        ids_Tk, first_row, starts, row_Tk, pair_R, token_R, num_pairs, k, num_bins, first, pair_R.shape[0], capacity,
        SLOTS=capacity > 0, TILE=TILE, PIECE=PIECE, BINS=bins, num_warps=8,
    )  # fmt: skip
    return total


@operator("count_pairs")
def count_pairs(ids_Tk: Tensor, num_experts: int) -> Tensor:
    """[E] int64, as `count_pairs_ref`; ids int32 or int64."""
    ids_Tk = ids_Tk.contiguous()
    total = torch.zeros(num_experts, dtype=torch.int64, device=ids_Tk.device)
    if ids_Tk.numel():
        grid = (triton.cdiv(ids_Tk.numel(), COUNT_TILE),)
        bins = max(triton.next_power_of_2(num_experts + 2), MIN_BINS)
        _count_pairs[grid](ids_Tk, total, ids_Tk.numel(), num_experts, TILE=COUNT_TILE, BINS=bins, num_warps=4)
    return total


@count_pairs.register_fake
def _(ids_Tk: Tensor, num_experts: int) -> Tensor:
    return ids_Tk.new_empty(num_experts, dtype=torch.int64)


@plan_rows.register_fake
def _(
    ids_Tk: Tensor, num_experts: int, first: int = 0, max_rows: int = -1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    make = lambda *size: ids_Tk.new_empty(size, dtype=torch.int32)  # noqa: E731
    num_rows = ids_Tk.numel() if max_rows < 0 else min(ids_Tk.numel(), max_rows)
    return make(num_experts + 1), make(*ids_Tk.shape), make(num_rows), make(num_rows), make(num_experts)


@plan_slots.register_fake
def _(ids_Tk: Tensor, num_parts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    make = lambda *size: ids_Tk.new_empty(size, dtype=torch.int32)  # noqa: E731
    num_rows = num_parts * capacity
    return make(num_parts + 1), make(*ids_Tk.shape), make(num_rows), make(num_rows), make(num_parts)


@triton.jit
def _bin_of(ids_ptr, pair, num_pairs, num_experts, first_expert):
    """The bin of each pair: its expert, E where it has none here, E + 1 beyond the last pair."""
    expert = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=0).to(tl.int32) - first_expert
    none = (expert < 0) | (expert >= num_experts)
    return tl.where(pair < num_pairs, tl.where(none, num_experts, expert), num_experts + 1)


@triton.jit
def _plan_count(
    ids_ptr, count_ptr, total_ptr, num_pairs, num_experts, first_expert, TILE: tl.constexpr, BINS: tl.constexpr
):
    """count[tile, bin], and total[bin] over all tiles."""
    tile = tl.program_id(0)
    pair = tile * TILE + tl.arange(0, TILE)
    count = tl.histogram(_bin_of(ids_ptr, pair, num_pairs, num_experts, first_expert), BINS)
    at = tl.arange(0, BINS)
    tl.store(count_ptr + tile.to(tl.int64) * BINS + at, count)
    tl.atomic_add(total_ptr + at, count, mask=count > 0, sem="relaxed")


@triton.jit
def _count_pairs(ids_ptr, total_ptr, num_pairs, num_experts, TILE: tl.constexpr, BINS: tl.constexpr):
    pair = tl.program_id(0) * TILE + tl.arange(0, TILE)
    count = tl.histogram(_bin_of(ids_ptr, pair, num_pairs, num_experts, 0), BINS)
    at = tl.arange(0, BINS)
    tl.atomic_add(total_ptr + at, count.to(tl.int64), mask=(count > 0) & (at < num_experts), sem="relaxed")


@triton.jit
def _plan_scan(
    count_ptr, total_ptr, offsets_ptr, num_tiles, num_experts, num_rows,
    TILES: tl.constexpr, OWN: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Replace count[tile, bin] by the first row of that tile's pairs in that bin; OWN bins a program. Offsets end at
    num_rows.
    """
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    every = tl.arange(0, BINS)
    total = tl.load(total_ptr + every)
    start = tl.sum(tl.where(every[None, :] < own[:, None], total[None, :], 0), 1)
    tl.store(offsets_ptr + own, tl.minimum(start, num_rows), mask=own <= num_experts)
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = count_ptr + tile.to(tl.int64)[:, None] * BINS + own[None, :]
        real = (tile < num_tiles)[:, None] & (own < BINS)[None, :]
        count = tl.load(at, mask=real, other=0)  # [TILES, OWN]
        tl.store(at, start[None, :] + tl.cumsum(count, 0) - count, mask=real)
        start += tl.sum(count, 0)


@triton.jit
def _plan_rank(
    ids_ptr, first_row_ptr, offsets_ptr, row_ptr, pair_ptr, token_ptr, num_pairs, k, num_experts, first_expert,
    num_rows, capacity, SLOTS: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """A pair's row is the first one of its tile and bin, plus the pairs before it in the tile that share the bin. With
    SLOTS bin b begins at row b * capacity, and pairs beyond its capacity have no row.
    """
    tile = tl.program_id(0)
    inside = tl.arange(0, TILE)
    pair = tile * TILE + inside
    bin_ = _bin_of(ids_ptr, pair, num_pairs, num_experts, first_expert)
    before = tl.zeros([TILE, PIECE], tl.int32)
    for first in range(0, TILE, PIECE):
        other = first + tl.arange(0, PIECE)
        other_bin = _bin_of(ids_ptr, tile * TILE + other, num_pairs, num_experts, first_expert)
        same = (bin_[:, None] == other_bin[None, :]) & (other[None, :] < inside[:, None])
        before += same.to(tl.int32)
    real = pair < num_pairs
    row = tl.load(first_row_ptr + tile.to(tl.int64) * BINS + bin_, mask=real, other=0) + tl.sum(before, 1)
    if SLOTS:
        routed = real & (bin_ < num_experts)
        rank = row - tl.load(offsets_ptr + bin_, mask=routed, other=0)
        row = tl.where(routed & (rank < capacity), bin_ * capacity + rank, num_rows)
    tl.store(row_ptr + pair, row, mask=real)
    placed = real & (row < num_rows)
    tl.store(pair_ptr + row, pair, mask=placed)
    tl.store(token_ptr + row, pair // k, mask=placed)
