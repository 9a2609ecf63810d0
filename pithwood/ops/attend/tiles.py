"""The work list of key-major attention: which queries meet which keys, cut into tiles of one size.

A selection says, per query, which units it sees. Key-major attention needs the transpose: per unit, the list of its
queries. Lists are sorted by (KV head, unit), all query heads of a KV head in one list, and cut into tiles of TILE_ROWS
queries, padded at the end. A tile never mixes units, so its numbers cannot depend on other documents. The unit that
holds the query itself needs no list where the selection promises it: those queries are contiguous (diagonal tiles).

Units longer than MAX_KEYS are cut into equal sub-units first, so long blocks waste nothing on short documents and the
causal half of a query's own block costs only its diagonal.

Legend: T packed tokens, H query heads, G KV heads, k selected per row, s pieces per query (k times sub-units per unit),
C keys per sub-unit, U sub-units of the chunk's documents, X lists (per KV head and sub-unit), W tiles, R rows of a
tile, P (query, head, sub-unit) pairs, Y diagonal segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pithwood.ops.checks import work_budget
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.units import UnitTable, unit_table

TILE_ROWS = 64
"""Queries per tile: enough to amortise the copy of C keys, few enough to pad little (half a tile per list)."""
MAX_KEYS = 128
"""Most keys per tile; longer units are cut."""
PAIR_BUDGET = 1 << 17
"""Most (query, head, sub-unit) pairs of one chunk; at head dim 64 their fp32 partial results take 32 MiB."""
INT32_MAX = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Chunk:
    """Packed ranges of queries, keys and documents that are worked on together."""

    q0: int
    q1: int
    k0: int
    k1: int
    unit0: int
    """Units of earlier documents."""
    unit1: int


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
    whole_docs: list[int]
    """Documents whose every query sees all it can: they have no lists, and are attended to without gathering."""
    whole_T: Tensor | None
    """[T] bool: queries of those documents; None if there are none."""

    @property
    def slots(self) -> int:
        """Pieces per (query, head) to merge, the diagonal apart."""
        return self.selection.ids.shape[2] * self.parts

    @property
    def diagonal(self) -> bool:
        return self.selection.own and self.packing.causal

    @property
    def unmasked(self) -> bool:
        """Whether every listed pair sees all C keys: units before a query's own are complete, and cut evenly."""
        return self.diagonal and self.selection.unit == self.keys * self.parts

    @staticmethod
    def of(packing: Packing, selection: Selection, num_heads: int, num_kv_heads: int, num_keys: int) -> Geometry:
        parts = -(-selection.unit // MAX_KEYS)
        query_doc_T, query_position_T = packing.query_doc(), packing.query_key_position()
        whole_docs, whole_T = _whole_documents(packing, selection, query_doc_T, query_position_T)
        return Geometry(
            packing,
            selection,
            num_heads,
            num_kv_heads,
            -(-selection.unit // parts),
            parts,
            unit_table(packing, selection.unit, num_keys),
            query_doc_T,
            query_position_T,
            packing.unit_offsets(selection.unit),
            whole_docs,
            whole_T,
        )

    def chunks(self) -> list[Chunk]:
        """Chunks within the pair budget: whole documents, or slices of one long document.

        A document that is cut is cut at multiples from its own start, so the cuts do not depend on its neighbours.
        """
        cu_q, cu_k = self.packing.cu_q.tolist(), self.packing.cu_k.tolist()
        units = self.unit_offsets_N.tolist()
        budget = work_budget(PAIR_BUDGET, self.packing.cu_q.device)
        most = max(1, budget // (self.num_heads * (self.slots + 1) * self.selection.unit)) * self.selection.unit
        found: list[Chunk] = []
        first = 0
        for doc in range(self.packing.num_docs):
            if cu_q[doc + 1] - cu_q[first] <= most:
                continue
            found.append(Chunk(cu_q[first], cu_q[doc], cu_k[first], cu_k[doc], units[first], units[doc]))
            first = doc
            if cu_q[doc + 1] - cu_q[doc] > most:
                for q in range(cu_q[doc], cu_q[doc + 1], most):
                    q1 = min(q + most, cu_q[doc + 1])
                    found.append(Chunk(q, q1, cu_k[doc], cu_k[doc + 1], units[doc], units[doc + 1]))
                first = doc + 1
        found.append(Chunk(cu_q[first], cu_q[-1], cu_k[first], cu_k[-1], units[first], units[-1]))
        return [chunk for chunk in found if chunk.q1 > chunk.q0]


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
    sub_Y: Tensor
    """Sub-unit, counted within the chunk."""


@dataclass(frozen=True)
class Tiles:
    """One chunk's work. Result rows: the tiles' rows, then the diagonal's, then one row of zeros for absent pieces."""

    rows_WR: Tensor
    """[W, R] int32 or int64: query rows `t * H + h`; padding repeats the list's last row."""
    fill_W: Tensor
    """[W] int64: real rows of each tile."""
    visible_WR: Tensor | None
    """[masked tiles, R]: how many of the tile's keys each row sees. Tiles before num_clean see all C."""
    list_W: Tensor
    """[W] int64: which of the X lists each tile belongs to, ascending."""
    list_of_tile: list[int]
    """The same on the host."""
    start_X: Tensor
    """[X] int64: first key of each list's sub-unit. Lists are ordered [masked, KV head, sub-unit]."""
    length_X: Tensor
    head_X: Tensor
    """[X] int64: KV head."""
    num_subs: int
    """U."""
    num_clean: int
    """Tiles before this one need no mask."""
    segments: Segments
    piece: Tensor
    """[tokens * H, s (+ 1 with a diagonal)] int32 or int64: result row of every piece of a query."""
    num_results: int
    """Result rows, the zero row included (it is the last)."""


def build_tiles(geo: Geometry, chunk: Chunk) -> Tiles:
    """The work list of one chunk. Reads its sizes on the host."""
    device, heads, groups = geo.packing.cu_q.device, geo.num_heads, geo.num_kv_heads
    num_tokens = chunk.q1 - chunk.q0
    num_subs = (chunk.unit1 - chunk.unit0) * geo.parts
    lists = groups * num_subs * (1 if geo.unmasked else 2)
    # Half the width of int64 halves the time of sorting and gathering; result rows are at most twice the pairs' rows.
    most = max(lists, geo.query_doc_T.shape[0] * heads, num_tokens * heads * (geo.slots + 1) + lists * TILE_ROWS)
    narrow = torch.int32 if most + groups * num_subs * geo.keys < INT32_MAX else torch.int64
    doc_T, position_T = geo.query_doc_T[chunk.q0 : chunk.q1], geo.query_position_T[chunk.q0 : chunk.q1]
    unit, parts, keys = geo.selection.unit, geo.parts, geo.keys
    own_T = position_T.div(unit, rounding_mode="floor") * parts + position_T.remainder(unit) // keys
    ids_THk = _ids_of_chunk(geo, chunk)
    sub_THs = ids_THk.to(narrow)
    if parts > 1:
        sub_THs = (sub_THs[..., None] * parts + torch.arange(parts, device=device, dtype=narrow)).flatten(2)
    head_H1 = (torch.arange(heads, device=device, dtype=narrow) // (heads // groups) * num_subs)[:, None]
    base_T = (geo.unit_offsets_N[doc_T] * parts - chunk.unit0 * parts).to(narrow)
    key_THs = sub_THs + (base_T[:, None, None] + head_H1)
    visible_THs = None
    if geo.unmasked:
        # An absent id is negative, and so are all its sub-units.
        chosen_THs = (sub_THs >= 0) & (sub_THs < own_T.to(narrow)[:, None, None])
    else:
        visible_THs = _visible_keys(geo, sub_THs, doc_T, position_T)
        chosen_THs = visible_THs > 0
        if geo.diagonal:
            chosen_THs &= sub_THs != own_T[:, None, None]
        key_THs = key_THs + (visible_THs < keys) * (groups * num_subs)

    if geo.whole_T is not None:
        chosen_THs &= ~geo.whole_T[chunk.q0 : chunk.q1, None, None]

    # Sort the pairs by list; the sort is stable, so each list stays in query order.
    pair_P = chosen_THs.view(-1).nonzero().squeeze(1)
    key_P, order_P = key_THs.view(-1).index_select(0, pair_P).to(narrow).sort(stable=True)
    pair_P = pair_P.index_select(0, order_P)
    edge_X = torch.searchsorted(key_P, torch.arange(lists + 1, device=device, dtype=key_P.dtype))
    first_X, count_X = edge_X[:-1], edge_X.diff()
    tiles_X = (count_X + TILE_ROWS - 1) // TILE_ROWS
    tile0_X = tiles_X.cumsum(0) - tiles_X
    list_W = torch.arange(lists, device=device).repeat_interleave(tiles_X)
    num_tiles = list_W.shape[0]
    num_clean = num_tiles if geo.unmasked else int((list_W < groups * num_subs).sum())
    # A tile's place within its list, then the sorted pairs it holds.
    begin_W = (torch.arange(num_tiles, device=device) - tile0_X[list_W]) * TILE_ROWS
    last_W = first_X[list_W] + count_X[list_W] - 1
    source_WR = (first_X[list_W] + begin_W)[:, None] + torch.arange(TILE_ROWS, device=device)
    source_WR = torch.minimum(source_WR, last_W[:, None])
    row_P = pair_P.to(narrow).div(geo.slots, rounding_mode="floor") + chunk.q0 * heads
    rows_WR = row_P.index_select(0, source_WR.view(-1)).view(source_WR.shape)
    fill_W = (count_X[list_W] - begin_W).clamp(max=TILE_ROWS)
    visible_WR = None
    if visible_THs is not None:
        visible_WR = visible_THs.reshape(-1)[pair_P][source_WR[num_clean:]]

    # Where the pair at place i of the sorted order stands among the tiles' rows.
    place_P = torch.arange(pair_P.shape[0], device=device)
    place_P += (tile0_X * TILE_ROWS - first_X).repeat_interleave(count_X)
    num_results = num_tiles * TILE_ROWS
    segments, diagonal_piece = _diagonal(geo, chunk, position_T, doc_T, own_T, num_results)
    num_results += segments.query_Y.shape[0] * heads * keys
    piece = torch.full((num_tokens * heads * geo.slots,), num_results, device=device, dtype=narrow)
    piece = piece.scatter_(0, pair_P, place_P.to(narrow)).view(num_tokens * heads, geo.slots)
    if diagonal_piece is not None:
        absent_T = position_T < 0 if geo.whole_T is None else (position_T < 0) | geo.whole_T[chunk.q0 : chunk.q1]
        diagonal_piece = diagonal_piece.masked_fill(absent_T[:, None], num_results).to(narrow)
        piece = torch.cat([piece, diagonal_piece.view(-1, 1)], dim=1)

    list_X = torch.arange(lists, device=device)
    unit_X, part_X = chunk.unit0 + list_X % max(num_subs, 1) // parts, list_X % parts
    return Tiles(
        rows_WR,
        fill_W,
        visible_WR,
        list_W,
        list_W.tolist(),
        geo.table.start_U[unit_X] + part_X * keys,
        (geo.table.length_U[unit_X] - part_X * keys).clamp(max=keys),
        list_X // max(num_subs, 1) % groups,
        num_subs,
        num_clean,
        segments,
        piece,
        num_results + 1,
    )


def _whole_documents(
    packing: Packing, selection: Selection, query_doc_T: Tensor, query_position_T: Tensor
) -> tuple[list[int], Tensor | None]:
    """Causal self-attention documents whose queries all selected every unit up to their own, as short ones do."""
    none: tuple[list[int], Tensor | None] = ([], None)
    if not (packing.causal and packing.self_attention and selection.own and selection.row_size == 1):
        return none
    # Document by document a GPU waits for launches: gathering is faster there (14 against 33 ms for 32 x 1024 tokens).
    if packing.num_queries == 0 or packing.cu_q.is_cuda:
        return none
    own_T = (query_position_T // selection.unit).to(selection.ids.dtype)[:, None, None]
    # Units ahead of the query are legal ids that it does not see: they must not stand in for one that it lacks.
    seen_TS = ((selection.ids >= 0) & (selection.ids <= own_T)).sum(-1)
    missed_T = (seen_TS <= own_T[..., 0]).any(1)
    cu = packing.cu_q.long()
    missed = torch.cat([cu.new_zeros(1), missed_T.cumsum(0)])[cu].diff()
    whole_N = (missed == 0) & (cu.diff() > 0)
    docs = whole_N.nonzero().squeeze(1).tolist()
    return (docs, whole_N[query_doc_T]) if docs else none


def _ids_of_chunk(geo: Geometry, chunk: Chunk) -> Tensor:
    """[tokens, H, k] ids of the chunk's queries, spelled out per query head."""
    ids = geo.selection.ids
    if geo.selection.row_size == 1:
        ids = ids[chunk.q0 : chunk.q1]
    else:
        row_offsets = geo.packing.row_offsets(geo.selection.row_size)
        doc_T = geo.query_doc_T[chunk.q0 : chunk.q1]
        local_T = torch.arange(chunk.q0, chunk.q1, device=ids.device) - geo.packing.cu_q.long()[doc_T]
        ids = ids[row_offsets[doc_T] + local_T // geo.selection.row_size]
    return ids if ids.shape[1] == geo.num_heads else ids.repeat_interleave(geo.num_heads // ids.shape[1], dim=1)


def _visible_keys(geo: Geometry, sub_THs: Tensor, doc_T: Tensor, position_T: Tensor) -> Tensor:
    """[tokens, H, s] int64: how many keys of each sub-unit its query sees; not positive where none or no id."""
    unit, parts, keys = geo.selection.unit, geo.parts, geo.keys
    lengths_T = (geo.packing.cu_k[1:] - geo.packing.cu_k[:-1]).long()[doc_T][:, None, None]
    unit_THs = sub_THs.long().div(parts, rounding_mode="floor")
    first_THs = unit_THs * unit + sub_THs.long().remainder(parts) * keys
    end_THs = torch.minimum(torch.minimum((unit_THs + 1) * unit, first_THs + keys), lengths_T)
    if geo.packing.causal:
        end_THs = torch.minimum(end_THs, position_T[:, None, None] + 1)
    return (end_THs - first_THs).masked_fill_(sub_THs < 0, 0)


def _diagonal(
    geo: Geometry, chunk: Chunk, position_T: Tensor, doc_T: Tensor, own_T: Tensor, base: int
) -> tuple[Segments, Tensor | None]:
    """Segments of consecutive queries in one sub-unit, and each query's result row [tokens, H] among theirs."""
    if not geo.diagonal:
        empty = position_T.new_zeros(0)
        return Segments(empty, empty, empty, empty, empty, empty), None
    unit, parts, keys = geo.selection.unit, geo.parts, geo.keys
    ratio = geo.num_heads // geo.num_kv_heads
    # One number per (document, sub-unit); queries before the first key form segments of their own, dropped below.
    sub_T = (geo.unit_offsets_N[doc_T] * parts + own_T).masked_fill(position_T < 0, -1)
    _, inverse_T, count_Y = sub_T.unique_consecutive(return_inverse=True, return_counts=True)
    begin_Y = count_Y.cumsum(0) - count_Y
    real_Y = position_T[begin_Y] >= 0
    if geo.whole_T is not None:
        real_Y &= ~geo.whole_T[chunk.q0 : chunk.q1][begin_Y]
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
    piece_TH = base + (block_TH * ratio + head_H % ratio) * keys + within_T[:, None]
    sub_Y = sub_T[begin_Y] - chunk.unit0 * parts
    return Segments(begin_Y + chunk.q0, count_Y, position_Y - first_Y, start_Y, length_Y, sub_Y), piece_TH
