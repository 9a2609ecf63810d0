"""How coherent a layer's block selection is: what decides which schedule of a sparse attention kernel pays.

A kernel may visit, per tile of consecutive queries, the union of the blocks that they chose (cheap if neighbours
agree), or per block the queries that chose it (cheap if no block is chosen by far more queries than others).

Legend: T packed tokens, S selections per token, k ids per selection, N documents, U units (blocks) of all documents,
R tiles of consecutive queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pithwood.observe.metrics import tile_unions
from pithwood.ops.packing import Packing, doc_of_rows


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of one layer's selection; NaN where nothing could be measured."""

    own_share: float
    """Entries that name the block holding the query / all valid entries; 1 / k where every row is full."""
    union_64: float
    """Distinct past blocks chosen by 64 consecutive queries of a document in one set / (k - 1), mean over the tiles
    whose queries all chose k - 1 past blocks. 1: the tile agrees."""
    union_128: float
    """The same for 128 consecutive queries."""
    random_union_64: float
    """What `union_64` would be on the same tiles if every query chose its past blocks at random."""
    random_union_128: float
    """What `union_128` would be if every query chose at random."""
    jaccard: float
    """Past blocks that two neighbouring queries of a document share / those that either chose, mean over the pairs
    that both had more candidates than choices. 1: always the same."""
    top_1_percent_share: float
    """Share of past hits on the 1 % most chosen columns, a column being one block in one set that some query may
    choose; at least one column. 0.01 if all columns were chosen alike."""
    first_block_share: float
    """Share of past hits on block 0 of the documents (attention sinks)."""
    hits_max: float
    """Queries that chose the most chosen column."""
    hits_max_over_mean: float
    """Hits of the most chosen block of a document in one set / mean over the document's blocks that can be chosen;
    mean over (document, set), weighted by hits. Random routing is above 1: early blocks are visible to more queries."""
    distance_share: tuple[float, ...]
    """Share of past hits by distance in blocks from the query's own: 1, 2-3, 4-7, 8-15, ... up to the farthest."""


def routing_stats(ids_TSk: Tensor, packing: Packing, block_size: int) -> RoutingStats:
    """The statistics of block ids as `select` returns them.

    ids_TSk     [T, S, k] int32   block ids local to the document, -1 for none, own block included, no id twice in a row
    packing                       causal self-attention over the T queries
    block_size                    keys per block
    raises      ValueError on wrong shapes, block_size < 1, or a packing that is not causal self-attention

    Memory O(T S k); the only host reads are those of the results.
    """
    if ids_TSk.ndim != 3 or ids_TSk.shape[0] != packing.num_queries:
        raise ValueError(f"ids have shape {list(ids_TSk.shape)}; expected [T, S, k] with T = {packing.num_queries}")
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    if not (packing.causal and packing.self_attention):
        raise ValueError("routing statistics need causal self-attention; got another packing")
    k = ids_TSk.shape[2]
    own_T = packing.position_T.to(ids_TSk.device) // block_size
    valid_TSk = ids_TSk >= 0
    is_own_TSk = valid_TSk & (ids_TSk == own_T[:, None, None])
    past_TSk = valid_TSk & ~is_own_TSk
    full_TS = past_TSk.sum(-1) == k - 1
    unions = [_union(ids_TSk, past_TSk, packing, block_size, rows) for rows in (64, 128)]
    distance_TSk = own_T[:, None, None] - ids_TSk
    scalars = torch.stack(
        [
            _share(is_own_TSk.sum(), valid_TSk.sum()),
            *(x.double() for pair in unions for x in pair),
            _jaccard(ids_TSk, past_TSk, full_TS & (own_T > k - 1)[:, None], packing),
            *_columns(ids_TSk, past_TSk, packing, block_size),
            _share((past_TSk & (ids_TSk == 0)).sum(), past_TSk.sum()),
        ]
    ).tolist()
    own, union_64, random_64, union_128, random_128, jaccard, top, hits_max, over_mean, first = scalars
    return RoutingStats(
        own, union_64, union_128, random_64, random_128, jaccard, top, first, hits_max, over_mean,
        _distances(distance_TSk, past_TSk),
    )  # fmt: skip


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.double()


def _union(ids_TSk: Tensor, past_TSk: Tensor, packing: Packing, block_size: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mean union of full tiles over k - 1, as chosen and as random choices would give on the same tiles."""
    sets, k = ids_TSk.shape[1:]
    if k < 2:
        nan = torch.full((), math.nan, device=ids_TSk.device)
        return nan, nan
    union_RS, measured_RS = tile_unions(ids_TSk, past_TSk, packing, block_size, rows)
    # A block that all c candidates of a query share equally is missed with probability 1 - (k - 1) / c.
    tile_T = packing.row_of_query(rows)
    candidates_T = (packing.position_T // block_size).double()
    log_miss_T = torch.log1p(-(k - 1) / candidates_T.clamp(min=k - 1))
    log_miss_R = log_miss_T.new_zeros(union_RS.shape[0]).index_add_(0, tile_T, log_miss_T)
    last_R = torch.zeros_like(log_miss_R).scatter_reduce_(0, tile_T, candidates_T, "amax")
    random_R = last_R * -torch.expm1(log_miss_R)
    total = (k - 1) * measured_RS.sum()
    random_RS = random_R[:, None].expand(-1, sets).where(measured_RS, 0.0)
    return _share(union_RS.where(measured_RS, 0).sum(), total), _share(random_RS.sum(), total)


def _jaccard(ids_TSk: Tensor, past_TSk: Tensor, chose_TS: Tensor, packing: Packing) -> Tensor:
    if ids_TSk.shape[0] < 2:
        return torch.full((), math.nan, dtype=torch.float64, device=ids_TSk.device)
    doc_T = packing.query_doc()
    pair_TS = chose_TS[1:] & chose_TS[:-1] & (doc_T[1:] == doc_T[:-1])[:, None]
    before_TSk = ids_TSk[:-1].where(past_TSk[:-1], -1)
    after_TSk = ids_TSk[1:].where(past_TSk[1:], -2)
    # One slot at a time: all pairs of slots at once would be k times the selection.
    shared_TS = sum((after_TSk == before_TSk[..., slot, None]).sum(-1) for slot in range(ids_TSk.shape[2]))
    assert isinstance(shared_TS, Tensor)
    either_TS = past_TSk[:-1].sum(-1) + past_TSk[1:].sum(-1) - shared_TS
    ratio_TS = (shared_TS.double() / either_TS.clamp(min=1)).where(pair_TS & (either_TS > 0), 0.0)
    return _share(ratio_TS.sum(), (pair_TS & (either_TS > 0)).sum())


def _columns(ids_TSk: Tensor, past_TSk: Tensor, packing: Packing, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Share of hits on the top 1 % of columns, hits of the most chosen one, and the mean of max over mean."""
    tokens, sets, _ = ids_TSk.shape
    num_units = packing.num_units_bound(tokens, block_size)
    offsets_N = packing.unit_offsets(block_size)
    set_S = torch.arange(sets, device=ids_TSk.device)
    column_TSk = (offsets_N[packing.query_doc()][:, None, None] + ids_TSk) * sets + set_S[:, None]
    # One column more than there are takes what is not counted.
    column_TSk = column_TSk.where(past_TSk, num_units * sets)
    hits = column_TSk.new_zeros(num_units * sets + 1).scatter_add_(0, column_TSk.flatten(), past_TSk.flatten().long())
    hits_US = hits[:-1].view(num_units, sets).double()
    hits_in_order = hits_US.flatten().sort(descending=True).values
    choosable_N = (offsets_N.diff() - 1).clamp(min=0)
    top = (choosable_N.sum() * sets / 100).ceil()
    in_top = torch.arange(num_units * sets, device=ids_TSk.device) < top
    top_share = _share(hits_in_order.where(in_top, 0.0).sum(), hits_in_order.sum())

    doc_U = doc_of_rows(offsets_N, num_units)
    zeros_NS = hits_US.new_zeros(packing.num_docs, sets)
    total_NS = zeros_NS.index_add(0, doc_U, hits_US)
    most_NS = zeros_NS.scatter_reduce(0, doc_U[:, None].expand_as(hits_US), hits_US, "amax")
    # max / mean, weighted by the total: the totals cancel
    over_mean = (most_NS * choosable_N[:, None]).sum() / total_NS.sum()
    return top_share, hits_US.max() if num_units * sets else hits_US.sum(), over_mean


def _distances(distance_TSk: Tensor, past_TSk: Tensor) -> tuple[float, ...]:
    """Share of hits with distance in [2^i, 2^(i+1)), for i from 0 to the last that holds any."""
    # frexp is exact where log2 rounds: distance = mantissa * 2^exponent with a mantissa in [0.5, 1)
    bucket_TSk = torch.frexp(distance_TSk.clamp(min=1).double()).exponent - 1
    counts = torch.bincount(bucket_TSk[past_TSk].flatten().long()).double()
    return tuple((counts / counts.sum()).tolist())
