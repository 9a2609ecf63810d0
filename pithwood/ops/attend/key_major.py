"""Attention to selected units, key-major: gather each unit's queries, attend in tiles, merge per query.

Every tile is a [TILE_ROWS, K] x [K, C] product and its transpose partners, so all work is batched matrix products of
one shape; results are merged per query by a gather and a weighted sum. Nothing is scattered with accumulation: each sum
has a fixed order, so results repeat bit for bit and do not depend on what a document is packed with.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim, C keys per sub-unit, R rows
of a tile, b tiles of one batch, X selected sub-units, Y diagonal segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithwood.ops.attend.tiles import TILE_ROWS, Geometry, Tiles, build_tiles
from pithwood.ops.checks import compute_dtype
from pithwood.ops.packing import Packing, Selection

LIVE_SCORES = 1 << 18
"""Scores of one batch of tiles: 1 MiB in fp32, so that the passes over them stay in a core's cache."""


class Batch:
    """Tiles that are worked on together: rows and keys to gather, the mask, and where results go."""

    __slots__ = ("hidden", "key_rows", "padding", "result", "rows", "shape", "tiles", "units")

    def __init__(
        self,
        rows: Tensor,
        key_rows: Tensor,
        shape: tuple[int, int, int],
        hidden: Tensor | None,
        padding: Tensor,
        result: slice,
        tiles: slice | None,
        units: slice,
    ):
        self.rows = rows
        """Flat query rows `t * H + h`."""
        self.key_rows = key_rows
        """Flat key rows `t * G + g`."""
        self.shape = shape
        """(b, R, C)."""
        self.hidden = hidden
        """Bool, broadcastable over the [b, R, C] scores: keys that a row does not see; None if it sees all."""
        self.padding = padding
        """[b, R] bool: rows that repeat another."""
        self.result = result
        """Result rows of this batch."""
        self.tiles = tiles
        """Tiles of this batch in the list; None on the diagonal, where every tile has its own keys."""
        self.units = units
        """Gradient blocks of these tiles' keys."""


def batches(tiles: Tiles, geo: Geometry) -> Iterator[Batch]:
    """All work of a chunk: unmasked tiles, masked tiles, then the diagonal."""
    keys, groups, heads = geo.keys, geo.num_kv_heads, geo.num_heads
    ratio = heads // groups
    device = tiles.rows_WR.device
    key_C, row_R = torch.arange(keys, device=device), torch.arange(TILE_ROWS, device=device)
    num_tiles = tiles.rows_WR.shape[0]
    step = max(1, LIVE_SCORES // (TILE_ROWS * keys))
    key_rows_XC = torch.minimum(key_C, tiles.length_X[:, None] - 1).add_(tiles.start_X[:, None])
    key_rows_XC = key_rows_XC.mul_(groups).add_(tiles.head_X[:, None])
    bounds = [(i, min(i + step, tiles.num_clean)) for i in range(0, tiles.num_clean, step)]
    bounds += [(i, min(i + step, num_tiles)) for i in range(tiles.num_clean, num_tiles, step)]
    unit_W = tiles.unit_W.tolist()
    for i, j in bounds:
        hidden = None if i < tiles.num_clean else key_C >= tiles.visible_WR[i:j, :, None]
        yield Batch(
            tiles.rows_WR[i:j].view(-1),
            key_rows_XC[tiles.unit_W[i:j]].view(-1),
            (j - i, TILE_ROWS, keys),
            hidden,
            row_R >= tiles.fill_W[i:j, None],
            slice(i * TILE_ROWS, j * TILE_ROWS),
            slice(i, j),
            slice(unit_W[i], unit_W[j - 1] + 1),
        )
    num_segments, base, num_units = tiles.segments.query_Y.shape[0], num_tiles * TILE_ROWS, tiles.start_X.shape[0]
    step = max(1, LIVE_SCORES // (groups * keys * ratio * keys))
    head_GR = torch.arange(heads, device=device).view(groups, 1, ratio)
    for i in range(0, num_segments, step):
        j = min(i + step, num_segments)
        count = tiles.segments.count_Y[i:j, None]
        query_YC = tiles.segments.query_Y[i:j, None] + torch.minimum(key_C, count - 1)
        rows = query_YC[:, None, :, None] * heads + head_GR
        key_YC = tiles.segments.start_Y[i:j, None] + torch.minimum(key_C, tiles.segments.length_Y[i:j, None] - 1)
        key_rows = key_YC[:, None] * groups + torch.arange(groups, device=device)[:, None]
        hidden_YCC = key_C > (key_C + tiles.segments.shift_Y[i:j, None])[..., None]
        shape = ((j - i) * groups, keys * ratio, keys)
        per_row = (j - i, groups, keys, ratio)
        yield Batch(
            rows.reshape(-1),
            key_rows.reshape(-1),
            shape,
            hidden_YCC[:, None, :, None].expand(*per_row, keys).reshape(shape),
            (key_C >= count)[:, None, :, None].expand(per_row).reshape(shape[:2]),
            slice(base + i * groups * keys * ratio, base + j * groups * keys * ratio),
            None,
            slice(num_units + i * groups, num_units + j * groups),
        )


class KeyMajorAttention(torch.autograd.Function):
    """(o like q, lse fp32) of q, k, v under a selection; saves q, k, v, o, lse and the ids, recomputes the rest."""

    @staticmethod
    def forward(ctx, q, k, v, packing: Packing, selection: Selection, scale: float):  # type: ignore[override]
        geo = Geometry.of(packing, selection, q.shape[1], k.shape[1], k.shape[0])
        q_rows, k_rows, v_rows = (_flat(x) for x in (q, k, v))
        o_rows = torch.empty(q_rows.shape[0], v_rows.shape[1], dtype=q_rows.dtype, device=q.device)
        lse_rows = torch.empty(q_rows.shape[0], dtype=q_rows.dtype, device=q.device)
        for q0, q1, _, _ in geo.chunks():
            chunk = slice(q0 * geo.num_heads, q1 * geo.num_heads)
            o_rows[chunk], lse_rows[chunk] = _forward_chunk(
                build_tiles(geo, q0, q1), geo, q_rows, k_rows, v_rows, scale
            )
        o = o_rows.view(*q.shape[:2], v.shape[2]).to(q.dtype)
        lse = lse_rows.view(q.shape[:2])
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.geo, ctx.scale = geo, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_lse):  # type: ignore[override]
        q, k, v, o, lse = ctx.saved_tensors
        geo: Geometry = ctx.geo
        groups = geo.num_kv_heads
        q_rows, k_rows, v_rows, do_rows, o_rows = (_flat(x) for x in (q, k, v, grad_o, o))
        # Row sums of dP * P: those of the whole softmax, since o and lse are the merged ones.
        delta_rows = (do_rows * o_rows).sum(-1) - grad_lse.reshape(-1)
        dq_rows, dk_rows, dv_rows = torch.empty_like(q_rows), torch.zeros_like(k_rows), torch.zeros_like(v_rows)
        for q0, q1, k0, k1 in geo.chunks():
            tiles = build_tiles(geo, q0, q1)
            sources = (q_rows, k_rows, v_rows, do_rows, lse.view(-1), delta_rows)
            dq, dk_blocks, dv_blocks = _backward_chunk(tiles, geo, sources, ctx.scale)
            dq_rows[q0 * geo.num_heads : q1 * geo.num_heads] = dq
            block = blocks_of_keys(tiles, geo, k0, k1)
            dk_rows[k0 * groups : k1 * groups] += F.embedding_bag(block, dk_blocks, mode="sum")
            dv_rows[k0 * groups : k1 * groups] += F.embedding_bag(block, dv_blocks, mode="sum")
        dq, dk, dv = (d.view_as(x).to(x.dtype) for d, x in ((dq_rows, q), (dk_rows, k), (dv_rows, v)))
        return dq, dk, dv, None, None, None


def _flat(x_THK: Tensor) -> Tensor:
    """[T * H, K] contiguous in the dtype of computation: one row per (token, head), so every gather is a row gather."""
    return x_THK.to(compute_dtype(x_THK.dtype)).reshape(-1, x_THK.shape[2])


def scores(batch: Batch, q_rows: Tensor, k_rows: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores [b, R, C] of one batch, with the queries [b, R, K] and keys [b, C, K] it gathered."""
    b, r, c = batch.shape
    q = q_rows.index_select(0, batch.rows).view(b, r, -1)
    k = k_rows.index_select(0, batch.key_rows).view(b, c, -1)
    s = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    if batch.hidden is not None:
        s.masked_fill_(batch.hidden, float("-inf"))
    return s, q, k


def _forward_chunk(
    tiles: Tiles, geo: Geometry, q_rows: Tensor, k_rows: Tensor, v_rows: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [tokens * H, V], lse [tokens * H]) of one chunk's queries."""
    o_piece = torch.empty(tiles.num_results, v_rows.shape[1], dtype=q_rows.dtype, device=q_rows.device)
    max_piece = torch.empty(tiles.num_results, dtype=q_rows.dtype, device=q_rows.device)
    sum_piece = torch.empty_like(max_piece)
    o_piece[-1], max_piece[-1], sum_piece[-1] = 0.0, float("-inf"), 1.0
    for batch in batches(tiles, geo):
        b, r, c = batch.shape
        s, _, _ = scores(batch, q_rows, k_rows, scale)
        peak = s.amax(-1, keepdim=True)
        s.sub_(peak).exp_()
        v = v_rows.index_select(0, batch.key_rows).view(b, c, -1)
        # Not divided by the sum: the merge weights do that once per query.
        torch.bmm(s, v, out=o_piece[batch.result].view(b, r, -1))
        max_piece[batch.result] = peak.view(-1)
        sum_piece[batch.result] = s.sum(-1).view(-1)
    max_rp = max_piece[tiles.piece]
    lse_r = (max_rp + sum_piece.log_()[tiles.piece]).logsumexp(-1)
    # -inf - -inf is NaN: a row without pieces has zero weights.
    weight_rp = torch.exp(max_rp - lse_r.masked_fill(lse_r == float("-inf"), 0.0)[:, None])
    return F.embedding_bag(tiles.piece, o_piece, per_sample_weights=weight_rp, mode="sum"), lse_r


def _backward_chunk(
    tiles: Tiles, geo: Geometry, sources: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [tokens * H, K] of a chunk, and dk, dv in blocks of C rows per sub-unit and segment, a zero row last."""
    q_rows, k_rows, v_rows, do_rows, lse_rows, delta_rows = sources
    num_blocks = tiles.start_X.shape[0] + tiles.segments.query_Y.shape[0] * geo.num_kv_heads
    dq_piece = torch.empty(tiles.num_results, q_rows.shape[1], dtype=q_rows.dtype, device=q_rows.device)
    dq_piece[-1] = 0.0
    dk_blocks, dv_blocks = (
        torch.zeros(num_blocks * geo.keys + 1, x.shape[1], dtype=x.dtype, device=x.device) for x in (k_rows, v_rows)
    )
    for batch in batches(tiles, geo):
        b, r, c = batch.shape
        s, q, k = scores(batch, q_rows, k_rows, scale)
        # Padded rows get weight exp(s - inf) = 0, so they add nothing to any gradient.
        lse = lse_rows.index_select(0, batch.rows).view(b, r).masked_fill_(batch.padding, float("inf"))
        p = s.sub_(lse[..., None]).exp_()
        do = do_rows.index_select(0, batch.rows).view(b, r, -1)
        v = v_rows.index_select(0, batch.key_rows).view(b, c, -1)
        dp = torch.bmm(do, v.transpose(1, 2))
        ds = dp.sub_(delta_rows.index_select(0, batch.rows).view(b, r, 1)).mul_(p).mul_(scale)
        torch.bmm(ds, k, out=dq_piece[batch.result].view(b, r, -1))
        _add_blocks(dk_blocks, torch.bmm(ds.transpose(1, 2), q), batch, tiles)
        _add_blocks(dv_blocks, torch.bmm(p.transpose(1, 2), do), batch, tiles)
    return F.embedding_bag(tiles.piece, dq_piece, mode="sum"), dk_blocks, dv_blocks


def _add_blocks(blocks: Tensor, tile_bCK: Tensor, batch: Batch, tiles: Tiles) -> None:
    """Add each tile's [C, K] gradient to the block of its keys; tiles of one block are neighbours."""
    size, dim = tile_bCK.shape[1:]
    target = blocks[batch.units.start * size : batch.units.stop * size].view(-1, size * dim)
    if batch.tiles is None:
        target.copy_(tile_bCK.view(-1, size * dim))
        return
    unit_b = tiles.unit_W[batch.tiles]
    begin = torch.searchsorted(unit_b, torch.arange(batch.units.start, batch.units.stop, device=unit_b.device))
    every_tile = torch.arange(tile_bCK.shape[0], device=unit_b.device)
    target += F.embedding_bag(every_tile, tile_bCK.view(-1, size * dim), begin, mode="sum")


def blocks_of_keys(tiles: Tiles, geo: Geometry, k0: int, k1: int) -> Tensor:
    """[(k1 - k0) * G, 3] int64: rows of the gradient blocks that belong to each key: unmasked, masked, diagonal."""
    device, size, groups = tiles.rows_WR.device, geo.keys, geo.num_kv_heads
    num_units, num_segments = tiles.start_X.shape[0], tiles.segments.query_Y.shape[0]
    zero_row = (num_units + num_segments * groups) * size
    rows = torch.full(((k1 - k0) * groups, 3), zero_row, device=device)
    head_G = torch.arange(groups, device=device)
    start = torch.cat([tiles.start_X, tiles.segments.start_Y.repeat_interleave(groups)])
    length = torch.cat([tiles.length_X, tiles.segments.length_Y.repeat_interleave(groups)])
    head = torch.cat([tiles.head_X, head_G.repeat(num_segments)])
    key_C = torch.arange(size, device=device)
    target = (start[:, None] + key_C - k0) * groups + head[:, None]
    source = torch.arange(zero_row, device=device).view(-1, size)
    bounds = (0, tiles.num_clean_units, num_units, num_units + num_segments * groups)
    for column, (i, j) in enumerate(pairwise(bounds)):
        real = key_C < length[i:j, None]
        rows[target[i:j][real], column] = source[i:j][real]
    return rows
