"""Attention to selected units, key-major: gather each unit's queries, attend in tiles, merge per query.

Every tile is a [TILE_ROWS, K] x [K, C] product and its transpose partners, so all work is batched matrix products of
one shape; results are merged per query by a gather and a weighted sum. Nothing is scattered with accumulation: each sum
has a fixed order, so results repeat bit for bit and do not depend on what a document is packed with.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim, C keys per sub-unit, R rows
of a tile, b tiles of one batch, s pieces per query, X lists (per KV head and sub-unit), Y diagonal segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithwood.ops.attend.tiles import TILE_ROWS, Chunk, Geometry, Tiles, build_tiles
from pithwood.ops.autocast import without_autocast
from pithwood.ops.checks import compute_dtype, work_budget
from pithwood.ops.dense_attention.banded import add_chunk_grads, attend_chunk
from pithwood.ops.dense_attention.banded import chunks as dense_chunks
from pithwood.ops.packing import Packing, Selection, guarded
from pithwood.ops.softmax import LN_2, LOG2_E, finite_or_zero, weights_

LIVE_SCORES = 1 << 18
"""Scores of one batch of tiles: 1 MiB in fp32, so that the passes over them stay in a core's cache."""
KEPT_SLOTS = 16
"""Work lists of up to this many pieces per query are kept for the backward pass (8 bytes a piece); longer ones, which
would outweigh the activations, are built again."""


@dataclass(frozen=True)
class Batch:
    """Tiles that are worked on together: rows and keys to gather, the mask, and where results go."""

    rows: Tensor
    """Flat query rows `t * H + h`."""
    key_rows: Tensor
    """Flat key rows `t * G + g`."""
    shape: tuple[int, int, int]
    """(b, R, C)."""
    bias: Tensor | None
    """0 or -inf, [b, R, C] or [.., C, C] for each head of a segment: keys a row does not see; None if it sees all."""
    padding: Tensor
    """[b, R] bool: rows that repeat another."""
    result: slice
    """Result rows of this batch."""
    lists: Tensor | None
    """[b] the list of each tile, ascending; None on the diagonal, where every tile has its own keys."""
    blocks: slice
    """Gradient blocks of these tiles' keys."""


def batches(tiles: Tiles, geo: Geometry, dtype: torch.dtype) -> Iterator[Batch]:
    """All work of a chunk: unmasked tiles, masked tiles, then the diagonal."""
    keys, groups = geo.keys, geo.num_kv_heads
    device = tiles.rows_WR.device
    key_C = torch.arange(keys, device=device)
    num_tiles = tiles.rows_WR.shape[0]
    step = max(1, work_budget(LIVE_SCORES, device) // (TILE_ROWS * keys))
    # Keys past the end of a sub-unit repeat its last one: nothing of another document is ever read.
    key_rows_XC = torch.minimum(key_C, tiles.length_X[:, None] - 1).add_(tiles.start_X[:, None])
    key_rows_XC = key_rows_XC.mul_(groups).add_(tiles.head_X[:, None]).to(tiles.rows_WR.dtype)
    padding_WR = torch.arange(TILE_ROWS, device=device) >= tiles.fill_W[:, None]
    bounds = [(i, min(i + step, tiles.num_clean)) for i in range(0, tiles.num_clean, step)]
    bounds += [(i, min(i + step, num_tiles)) for i in range(tiles.num_clean, num_tiles, step)]
    for i, j in bounds:
        bias = None
        if i >= tiles.num_clean:
            assert tiles.visible_WR is not None
            bias = _bias(key_C >= tiles.visible_WR[i - tiles.num_clean : j - tiles.num_clean, :, None], dtype)
        yield Batch(
            tiles.rows_WR[i:j].view(-1),
            key_rows_XC.index_select(0, tiles.list_W[i:j]).view(-1),
            (j - i, TILE_ROWS, keys),
            bias,
            padding_WR[i:j],
            slice(i * TILE_ROWS, j * TILE_ROWS),
            tiles.list_W[i:j],
            slice(tiles.list_of_tile[i], tiles.list_of_tile[j - 1] + 1),
        )
    yield from _diagonal_batches(tiles, geo, dtype)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _diagonal_batches(tiles: Tiles, geo: Geometry, dtype: torch.dtype) -> Iterator[Batch]:
    """One tile per (segment, KV head): the segment's queries of all the KV head's query heads, with its keys."""
    keys, groups, heads = geo.keys, geo.num_kv_heads, geo.num_heads
    ratio, device, segments = heads // groups, tiles.rows_WR.device, tiles.segments
    key_C = torch.arange(keys, device=device)
    base, first_block, size = tiles.rows_WR.numel(), tiles.start_X.shape[0], groups * keys * ratio
    head_GR1, group_G = torch.arange(heads, device=device).view(groups, ratio, 1), torch.arange(groups, device=device)
    num_segments = segments.query_Y.shape[0]
    aligned = num_segments > 0 and not bool(segments.shift_Y.any())
    # Every segment begins at its first key unless keys are longer than queries: one triangle serves all.
    bias = torch.full((keys, keys), float("-inf"), dtype=dtype, device=device).triu_(1) if aligned else None
    step = max(1, work_budget(LIVE_SCORES, device) // (size * keys))
    for i in range(0, num_segments, step):
        j = min(i + step, num_segments)
        count = segments.count_Y[i:j, None]
        query_yC = segments.query_Y[i:j, None] + torch.minimum(key_C, count - 1)
        key_yC = segments.start_Y[i:j, None] + torch.minimum(key_C, segments.length_Y[i:j, None] - 1)
        if not aligned:
            hidden_yCC = key_C > (key_C + segments.shift_Y[i:j, None])[..., None]
            bias = _bias(hidden_yCC[:, None], dtype)
        shape = ((j - i) * groups, ratio * keys, keys)
        yield Batch(
            (query_yC[:, None, None] * heads + head_GR1).view(-1),
            (key_yC[:, None] * groups + group_G[:, None]).view(-1),
            shape,
            bias,
            (key_C >= count)[:, None].expand(-1, heads, -1).reshape(shape[:2]),
            slice(base + i * size, base + j * size),
            None,
            slice(first_block + i * groups, first_block + j * groups),
        )


class KeyMajorAttention(torch.autograd.Function):
    """(o like q, lse fp32) of q, k, v under a selection; saves q, k, v, o, lse and the ids, recomputes the rest."""

    @staticmethod
    def forward(ctx, q, k, v, packing: Packing, selection: Selection, scale: float):  # type: ignore[override]
        geo = Geometry.of(packing, selection, q.shape[1], k.shape[1], k.shape[0])
        q_rows, k_rows, v_rows = (_flat(x) for x in (q, k, v))
        o = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=q_rows.dtype, device=q.device)
        work: list[tuple[Chunk, Tiles | None]] = []
        keep = geo.slots <= KEPT_SLOTS and any(ctx.needs_input_grad)
        for chunk in geo.chunks():
            tiles = build_tiles(geo, chunk)
            work.append((chunk, tiles if keep else None))
            o_rows, lse_rows = _forward_chunk(tiles, geo, q_rows, k_rows, v_rows, scale)
            queries = slice(chunk.q0, chunk.q1)
            o[queries], lse[queries] = o_rows.view(-1, *o.shape[1:]), lse_rows.view(-1, lse.shape[1])
        by_head = [x.view(*y.shape).transpose(0, 1) for x, y in ((k_rows, k), (v_rows, v))]
        for whole in dense_chunks(packing, geo.num_heads, None, geo.whole_docs):
            attend_chunk(whole, (q, by_head[0], by_head[1]), (o, lse), True, None, scale)
        ctx.save_for_backward(q, k, v, o, lse, *guarded(selection))
        ctx.geo, ctx.scale, ctx.work = geo, scale, work
        return o, lse

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, grad_o, grad_lse):  # type: ignore[override]
        q, k, v, o, lse, *_ = ctx.saved_tensors
        geo: Geometry = ctx.geo
        heads, groups = geo.num_heads, geo.num_kv_heads
        q_rows, k_rows, v_rows, do_rows = (_flat(x) for x in (q, k, v, grad_o))
        # Row sums of dP * P: those of the whole softmax, since o and lse are the merged ones.
        delta_rows = (do_rows * _flat(o)).sum(-1) - grad_lse.reshape(-1)
        sources = (q_rows, k_rows, v_rows, do_rows, lse.view(-1), delta_rows)
        dq_rows, dk_rows, dv_rows = torch.empty_like(q_rows), torch.zeros_like(k_rows), torch.zeros_like(v_rows)
        for chunk, kept in ctx.work:
            tiles = build_tiles(geo, chunk) if kept is None else kept
            dq, dk_blocks, dv_blocks = _backward_chunk(tiles, geo, sources, ctx.scale)
            dq_rows[chunk.q0 * heads : chunk.q1 * heads] = dq
            block = _blocks_of_keys(tiles, geo, chunk)
            keys = slice(chunk.k0 * groups, chunk.k1 * groups)
            dk_rows[keys] += F.embedding_bag(block, dk_blocks, mode="sum")
            dv_rows[keys] += F.embedding_bag(block, dv_blocks, mode="sum")
        k_GTK, v_GTV, dk_GTK, dv_GTV = (
            x.view(*y.shape).transpose(0, 1) for x, y in ((k_rows, k), (v_rows, v), (dk_rows, k), (dv_rows, v))
        )
        for whole in dense_chunks(geo.packing, heads, None, geo.whole_docs):
            rows = (q, k_GTK, v_GTV, grad_o, lse, delta_rows.view_as(lse))
            add_chunk_grads(whole, rows, (dq_rows.view(q.shape), dk_GTK, dv_GTV), True, None, ctx.scale)
        dq, dk, dv = (d.view_as(x).to(x.dtype) for d, x in ((dq_rows, q), (dk_rows, k), (dv_rows, v)))
        return dq, dk, dv, None, None, None


def _flat(x_THK: Tensor) -> Tensor:
    """[T * H, K] contiguous in the dtype of computation: one row per (token, head), so every gather is a row gather."""
    return x_THK.to(compute_dtype(x_THK.dtype)).reshape(-1, x_THK.shape[2])


def _scores(batch: Batch, q_rows: Tensor, k_rows: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores [b, R, C] of one batch times log2(e), with the queries [b, R, K] and keys [b, C, K] it gathered."""
    b, r, c = batch.shape
    q = q_rows.index_select(0, batch.rows).view(b, r, -1)
    k = k_rows.index_select(0, batch.key_rows).view(b, c, -1)
    s = torch.bmm(q, k.transpose(1, 2)).mul_(scale * LOG2_E)
    if batch.bias is not None and batch.bias.dim() == 3:
        s.add_(batch.bias)
    elif batch.bias is not None:
        # [segments, heads, C, C]: one triangle per segment, or one for all
        segments = b if batch.bias.dim() == 2 else batch.bias.shape[0]
        s.view(segments, -1, c, c).add_(batch.bias)
    return s, q, k


def _forward_chunk(
    tiles: Tiles, geo: Geometry, q_rows: Tensor, k_rows: Tensor, v_rows: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [tokens * H, V], lse [tokens * H]) of one chunk's queries."""
    o_piece = torch.empty(tiles.num_results, v_rows.shape[1], dtype=q_rows.dtype, device=q_rows.device)
    max_piece = torch.empty(tiles.num_results, dtype=q_rows.dtype, device=q_rows.device)
    sum_piece = torch.empty_like(max_piece)
    o_piece[-1], max_piece[-1], sum_piece[-1] = 0.0, float("-inf"), 1.0
    for batch in batches(tiles, geo, q_rows.dtype):
        b, r, c = batch.shape
        s, _, _ = _scores(batch, q_rows, k_rows, scale)
        peak = s.amax(-1, keepdim=True)
        weights_(s, peak)
        v = v_rows.index_select(0, batch.key_rows).view(b, c, -1)
        # Not divided by the sum: the merge weights do that once per query.
        torch.bmm(s, v, out=o_piece[batch.result].view(b, r, -1))
        max_piece[batch.result] = peak.view(-1)
        torch.sum(s, -1, out=sum_piece[batch.result].view(b, r))
    piece = tiles.piece.view(-1)
    max_rs = max_piece.index_select(0, piece).view(tiles.piece.shape)
    total_rs = sum_piece.log2_().index_select(0, piece).view(tiles.piece.shape).add_(max_rs)
    peak_r1 = finite_or_zero(total_rs.amax(-1, keepdim=True))
    log2_total_r = weights_(total_rs, peak_r1).sum(-1).log2_().add_(peak_r1[:, 0])
    weight_rs = weights_(max_rs, finite_or_zero(log2_total_r)[:, None])
    o = F.embedding_bag(tiles.piece, o_piece, per_sample_weights=weight_rs, mode="sum")
    return o, log2_total_r.mul_(LN_2)


def _backward_chunk(
    tiles: Tiles, geo: Geometry, sources: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [tokens * H, K] of a chunk, and dk, dv in blocks of C rows: per list, then per segment and KV head."""
    q_rows, k_rows, v_rows, do_rows, lse_rows, delta_rows = sources
    num_blocks = tiles.start_X.shape[0] + tiles.segments.query_Y.shape[0] * geo.num_kv_heads
    dq_piece = torch.empty(tiles.num_results, q_rows.shape[1], dtype=q_rows.dtype, device=q_rows.device)
    dq_piece[-1] = 0.0
    dk_blocks, dv_blocks = (
        torch.zeros(num_blocks * geo.keys + 1, x.shape[1], dtype=x.dtype, device=x.device) for x in (k_rows, v_rows)
    )
    log2_rows = lse_rows * LOG2_E
    for batch in batches(tiles, geo, q_rows.dtype):
        b, r, c = batch.shape
        s, q, k = _scores(batch, q_rows, k_rows, scale)
        # Padded rows get weight exp2(s - inf) = 0, so they add nothing to any gradient.
        log2_total = log2_rows.index_select(0, batch.rows).view(b, r).masked_fill_(batch.padding, float("inf"))
        p = weights_(s, log2_total[..., None])
        do = do_rows.index_select(0, batch.rows).view(b, r, -1)
        v = v_rows.index_select(0, batch.key_rows).view(b, c, -1)
        dp = torch.bmm(do, v.transpose(1, 2))
        ds = dp.sub_(delta_rows.index_select(0, batch.rows).view(b, r, 1)).mul_(p).mul_(scale)
        torch.bmm(ds, k, out=dq_piece[batch.result].view(b, r, -1))
        _add_blocks(dk_blocks, ds, q, batch)
        _add_blocks(dv_blocks, p, do, batch)
    return F.embedding_bag(tiles.piece, dq_piece, mode="sum"), dk_blocks, dv_blocks


def _add_blocks(blocks: Tensor, left_bRC: Tensor, right_bRK: Tensor, batch: Batch) -> None:
    """Add each tile's left^T right [C, K] to the block of its keys; tiles of one block are neighbours."""
    _, _, c = batch.shape
    target = blocks[batch.blocks.start * c : batch.blocks.stop * c].view(-1, c, blocks.shape[1])
    if batch.lists is None:
        torch.bmm(left_bRC.transpose(1, 2), right_bRK, out=target)
        return
    tile = torch.bmm(left_bRC.transpose(1, 2), right_bRK).flatten(1)
    blocks_here = torch.arange(batch.blocks.start, batch.blocks.stop, device=tile.device)
    every_tile = torch.arange(tile.shape[0], device=tile.device)
    target += F.embedding_bag(every_tile, tile, torch.searchsorted(batch.lists, blocks_here), mode="sum").view_as(
        target
    )


def _blocks_of_keys(tiles: Tiles, geo: Geometry, chunk: Chunk) -> Tensor:
    """[keys * G, 1 to 3] rows of the gradient blocks that belong to each key: of its lists and of its segment."""
    groups, size, parts, unit = geo.num_kv_heads, geo.keys, geo.parts, geo.selection.unit
    device, lists = tiles.rows_WR.device, tiles.start_X.shape[0]
    key_T = torch.arange(chunk.k0, chunk.k1, device=device)
    doc_T = geo.packing.key_doc(chunk.k1)[chunk.k0 :]
    local_T = key_T - geo.packing.cu_k.long()[doc_T]
    sub_T = (geo.unit_offsets_N[doc_T] + local_T // unit - chunk.unit0) * parts + local_T % unit // size
    within_T = local_T % unit % size
    head_G = torch.arange(groups, device=device)
    list_TG = sub_T[:, None] + head_G * tiles.num_subs
    blocks = [list_TG]
    if not geo.unmasked:
        blocks.append(list_TG + groups * tiles.num_subs)
    num_segments = tiles.segments.query_Y.shape[0]
    absent = lists + num_segments * groups
    if num_segments:
        # Keys that no query of the chunk stands at belong to no segment; the zero row follows the last block.
        segment_U = torch.full((tiles.num_subs,), -1, device=device)
        segment_U[tiles.segments.sub_Y] = torch.arange(num_segments, device=device)
        segment_T1 = segment_U[sub_T][:, None]
        blocks.append(torch.where(segment_T1 >= 0, lists + segment_T1 * groups + head_G, absent))
    rows = torch.stack(blocks, dim=-1) * size + within_T[:, None, None]
    return rows.clamp_(max=absent * size).view(-1, len(blocks))
