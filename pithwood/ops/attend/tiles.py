"""The work list of key-major attention: which queries meet which keys, cut into tiles of one size.

A selection says, per query, which units it sees. Key-major attention needs the transpose: per unit, the list of its
queries. Lists are sorted by (KV head, unit), all query heads of a KV head in one list, and cut into tiles of TILE_ROWS
queries, padded at the end. A tile never mixes units, so its numbers cannot depend on other documents. The unit that
holds the query itself needs no list where the selection promises it: those queries are contiguous (diagonal tiles).

Units longer than MAX_KEYS are cut into equal sub-units first, so long blocks waste nothing on short documents and the
causal half of a query's own block costs only its diagonal.

Legend: T packed tokens, H query heads, G KV heads, k selected per row, C keys per sub-unit, W tiles, P (query, head,
sub-unit) pairs, X sub-units that any query selected, Y diagonal segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pithwood.ops.packing import Packing, Selection
from pithwood.ops.units import UnitTable, unit_table

TILE_ROWS = 64
"""Queries per tile: enough to amortise the copy of C keys, few enough to pad little (half a tile per list)."""
MAX_KEYS = 128
"""Most keys per tile; longer units are cut."""
PAIR_BUDGET = 1 << 18
"""Most (query, head, sub-unit) pairs of one chunk; at head dim 64 their fp32 partial results take 64 MiB."""


@dataclass(frozen=True)
class Geometry:
    """What does not change over the chunks of one call."""

    packing: Packing
    selection: Selection
    num_heads: int
    num_kv_heads: int
    keys: int
    """C, keys per sub-unit."""
    parts: int
    """Sub-units per unit."""
    table: UnitTable
    query_doc_T: Tensor
    query_position_T: Tensor
    unit_offsets_N: Tensor

    @property
    def slots(self) -> int:
        """Pieces per (query, head) to merge, the diagonal apart."""
        return self.selection.ids.shape[2] * self.parts

    @property
    def diagonal(self) -> bool:
        return self.selection.own and self.packing.causal

    @staticmethod
    def of(packing: Packing, selection: Selection, num_heads: int, num_kv_heads: int, num_keys: int) -> Geometry:
        parts = -(-selection.unit // MAX_KEYS)
        return Geometry(
            packing,
            selection,
            num_heads,
            num_kv_heads,
            -(-selection.unit // parts),
            parts,
            unit_table(packing, selection.unit, num_keys),
            packing.query_doc(),
            packing.query_key_position(),
            packing.unit_offsets(selection.unit),
        )

    def chunks(self) -> list[tuple[int, int, int, int]]:
        """Query and key ranges (q0, q1, k0, k1) within the pair budget: whole documents, or slices of one long
        document.

        A document that is cut is cut at multiples from its own start, so the cuts do not depend on its neighbours.
        """
        cu_q, cu_k = self.packing.cu_q.tolist(), self.packing.cu_k.tolist()
        most = max(1, PAIR_BUDGET // (self.num_heads * (self.slots + 1) * self.selection.unit)) * self.selection.unit
        ranges: list[tuple[int, int, int, int]] = []
        open_range: tuple[int, int, int, int] | None = None
        for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            if open_range is not None and q1 - open_range[0] <= most:
                open_range = (open_range[0], q1, open_range[2], k1)
                continue
            if open_range is not None:
                ranges.append(open_range)
            open_range = (q0, q1, k0, k1)
            if q1 - q0 > most:
                ranges += [(q, min(q + most, q1), k0, k1) for q in range(q0, q1, most)]
                open_range = None
        if open_range is not None:
            ranges.append(open_range)
        return [r for r in ranges if r[1] > r[0]]


@dataclass(frozen=True)
class Segments:
    """Diagonal segments: runs of queries that stand in one sub-unit of their document, all [Y] int64."""

    query_Y: Tensor
    """Packed index of the first query."""
    count_Y: Tensor
    """Queries."""
    shift_Y: Tensor
    """Place of the first query among the segment's keys."""
    start_Y: Tensor
    """Packed index of the first key."""
    length_Y: Tensor
    """Keys."""


@dataclass(frozen=True)
class Tiles:
    """One chunk's work. Result rows: the tiles' rows, then the diagonal's, then one row of zeros for absent pieces."""

    rows_WR: Tensor
    """[W, TILE_ROWS] int64: query rows `t * H + h`; padding repeats the tile's first row."""
    fill_W: Tensor
    """[W] int64: real rows of each tile."""
    visible_WR: Tensor
    """[W, TILE_ROWS] int64: how many of the tile's keys each row sees; all C in the first num_clean tiles."""
    unit_W: Tensor
    """[W] int64: which of the X sub-units each tile belongs to, ascending."""
    start_X: Tensor
    """[X] int64: packed index of each sub-unit's first key."""
    length_X: Tensor
    head_X: Tensor
    """[X] int64: KV head."""
    num_clean: int
    """Tiles before this one need no mask."""
    num_clean_units: int
    segments: Segments
    piece: Tensor
    """[tokens * H, slots (+ 1)] int64: result row of every piece of a query."""
    num_results: int
    """Result rows, the zero row included (it is the last)."""


def build_tiles(geo: Geometry, q0: int, q1: int) -> Tiles:
    """The work list of queries q0..q1. Reads its sizes on the host."""
    device = geo.packing.cu_q.device
    unit, parts, keys, heads, groups = geo.selection.unit, geo.parts, geo.keys, geo.num_heads, geo.num_kv_heads
    ratio, num_tokens = heads // groups, q1 - q0
    doc_T, position_T = geo.query_doc_T[q0:q1], geo.query_position_T[q0:q1]
    lengths_N = (geo.packing.cu_k[1:] - geo.packing.cu_k[:-1]).long()
    ids_THk = _ids_of_range(geo, q0, q1)

    # Every (query, head, id, part): how many keys of the sub-unit the query sees. Keys of sub-units are local here.
    part_s = torch.arange(parts, device=device)
    first_THs = (ids_THk[..., None] * unit + part_s * keys).flatten(2)
    end_THs = torch.minimum((ids_THk[..., None] + 1) * unit, lengths_N[doc_T][:, None, None, None])
    length_THs = (end_THs - (ids_THk[..., None] * unit + part_s * keys)).clamp(max=keys).flatten(2)
    visible_THs = length_THs
    if geo.packing.causal:
        visible_THs = torch.minimum(visible_THs, position_T[:, None, None] + 1 - first_THs)
    chosen_THs = (ids_THk >= 0).repeat_interleave(parts, dim=2) & (visible_THs > 0)
    own_T = position_T // unit * parts + position_T % unit // keys
    sub_THs = (ids_THk[..., None] * parts + part_s).flatten(2)
    if geo.diagonal:
        chosen_THs &= sub_THs != own_T[:, None, None]

    # Sort the pairs by (masked, KV head, sub-unit); the sort is stable, so each list stays in query order.
    pair_P = chosen_THs.view(-1).nonzero().squeeze(1)
    num_subs = geo.table.start_U.shape[0] * parts
    head_H = torch.arange(heads, device=device) // ratio
    key_THs = (geo.unit_offsets_N[doc_T] * parts)[:, None, None] + sub_THs + (head_H * num_subs)[:, None]
    key_THs += (visible_THs < keys).long() * (groups * num_subs)
    key_P, order_P = key_THs.view(-1)[pair_P].sort(stable=True)
    pair_P = pair_P[order_P]
    list_X, count_X = key_P.unique_consecutive(return_counts=True)
    tiles_X = (count_X + TILE_ROWS - 1) // TILE_ROWS
    tile_end_X, first_X = tiles_X.cumsum(0), count_X.cumsum(0) - count_X
    num_clean_units = int((list_X < groups * num_subs).sum())
    num_tiles = int(tile_end_X[-1]) if list_X.numel() else 0
    num_clean = int(tile_end_X[num_clean_units - 1]) if num_clean_units else 0
    # Where the pair at place i of the sorted order goes: its list starts at a tile boundary.
    shift_X = (tile_end_X - tiles_X) * TILE_ROWS - first_X
    place_P = torch.arange(pair_P.shape[0], device=device) + shift_X.repeat_interleave(count_X)
    row_P = pair_P // geo.slots + q0 * heads
    unit_W = torch.arange(list_X.shape[0], device=device).repeat_interleave(tiles_X)
    rows_WR = row_P[first_X[unit_W]][:, None].repeat(1, TILE_ROWS) if num_tiles else row_P.new_zeros(0, TILE_ROWS)
    rows_WR.view(-1)[place_P] = row_P
    visible_WR = torch.full_like(rows_WR, keys)
    visible_WR.view(-1)[place_P] = visible_THs.reshape(-1)[pair_P]
    tile_W = torch.arange(num_tiles, device=device) - (tile_end_X - tiles_X)[unit_W]
    fill_W = (count_X[unit_W] - tile_W * TILE_ROWS).clamp(max=TILE_ROWS)

    sub_X = list_X % num_subs
    unit_X, part_X = sub_X // parts, sub_X % parts
    start_X = geo.table.start_U[unit_X] + part_X * keys
    length_X = (geo.table.length_U[unit_X] - part_X * keys).clamp(max=keys)

    num_results = num_tiles * TILE_ROWS
    segments, diagonal_piece = _diagonal(geo, q0, position_T, doc_T, own_T, num_results)
    num_results += segments.query_Y.shape[0] * groups * keys * ratio
    piece = torch.full((num_tokens * heads, geo.slots), num_results, device=device)
    piece.view(-1)[pair_P] = place_P
    if diagonal_piece is not None:
        diagonal_piece = torch.where(position_T[:, None] >= 0, diagonal_piece, num_results)
        piece = torch.cat([piece, diagonal_piece.reshape(-1, 1)], dim=1)
    head_X = list_X // num_subs % groups
    return Tiles(
        rows_WR, fill_W, visible_WR, unit_W, start_X, length_X, head_X, num_clean, num_clean_units, segments, piece,
        num_results + 1,
    )  # fmt: skip


def _ids_of_range(geo: Geometry, q0: int, q1: int) -> Tensor:
    """[tokens, H, k] int64 ids of queries q0..q1, spelled out per query head."""
    ids = geo.selection.ids
    if geo.selection.row_size == 1:
        ids = ids[q0:q1]
    else:
        row_offsets = geo.packing.row_offsets(geo.selection.row_size)
        doc_T = geo.query_doc_T[q0:q1]
        local_T = torch.arange(q0, q1, device=ids.device) - geo.packing.cu_q.long()[doc_T]
        ids = ids[row_offsets[doc_T] + local_T // geo.selection.row_size]
    return ids.long().repeat_interleave(geo.num_heads // ids.shape[1], dim=1)


def _diagonal(
    geo: Geometry, q0: int, position_T: Tensor, doc_T: Tensor, own_T: Tensor, base: int
) -> tuple[Segments, Tensor | None]:
    """Segments of consecutive queries in one sub-unit, and each query's result row [tokens, H] among theirs."""
    if not geo.diagonal:
        empty = position_T.new_zeros(0)
        return Segments(empty, empty, empty, empty, empty), None
    unit, parts, keys = geo.selection.unit, geo.parts, geo.keys
    ratio = geo.num_heads // geo.num_kv_heads
    # One number per (document, sub-unit); queries before the first key form segments of their own, dropped below.
    sub_T = (geo.unit_offsets_N[doc_T] * parts + own_T).masked_fill(position_T < 0, -1)
    _, inverse_T, count_Y = sub_T.unique_consecutive(return_inverse=True, return_counts=True)
    begin_Y = count_Y.cumsum(0) - count_Y
    real_Y = position_T[begin_Y] >= 0
    index_T = (real_Y.cumsum(0) - 1)[inverse_T]
    within_T = torch.arange(position_T.shape[0], device=sub_T.device) - begin_Y[inverse_T]
    begin_Y, count_Y = begin_Y[real_Y], count_Y[real_Y]
    position_Y, doc_Y = position_T[begin_Y], doc_T[begin_Y]
    first_Y = position_Y // unit * unit + position_Y % unit // keys * keys
    lengths_N = (geo.packing.cu_k[1:] - geo.packing.cu_k[:-1]).long()
    end_Y = torch.minimum((position_Y // unit + 1) * unit, lengths_N[doc_Y])
    length_Y = (end_Y - first_Y).clamp(max=keys)
    start_Y = geo.packing.cu_k.long()[doc_Y] + first_Y
    head_H = torch.arange(geo.num_heads, device=sub_T.device)
    block_TH = index_T[:, None] * geo.num_kv_heads + head_H // ratio
    piece_TH = base + (block_TH * keys + within_T[:, None]) * ratio + head_H % ratio
    return Segments(begin_Y + q0, count_Y, position_Y - first_Y, start_Y, length_Y), piece_TH
