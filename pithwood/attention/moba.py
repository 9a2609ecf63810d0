"""Mixture of block attention (MoBA): a query attends to its own block and to the past blocks that it scores best.

Block means are taken over the keys exactly as attention sees them: convolved, normed and rotated.

Legend: T packed tokens (T_k with the cached ones), D model width, H query heads, G KV heads, K head dim, N documents,
U units (blocks) of all documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pithwood.attention.base import CacheField, Cost, LayerCache, LayerContext, MixerOut, MixerShape
from pithwood.attention.projections import HeadsConfig, HeadsMixer
from pithwood.ops.attend import attend
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.select import select
from pithwood.ops.summarise import summarise
from pithwood.parallel.context import ContextGroup, all_sets, gather_block_means, gather_tokens, sets_of

Tie = Literal["later", "earlier"]
MeanDtype = Literal["input", "fp32", "centered"]
RoutePer = Literal["q_head", "kv_group"]
DecodeAttention = Literal["moba", "full"]

GATE_WORKSPACE_BYTES = 64 * 2**20
"""Most bytes of gate scores, and of gathered pairs, that the ops hold at a time."""


@dataclass(frozen=True)
class MoBAConfig(HeadsConfig):
    """Mixture of block attention: at most `block_size * top_k` keys are seen, all of a document up to that length."""

    block_size: int = 128
    """Keys per block, >= 1; blocks start anew at every document."""
    top_k: int = 8
    """Blocks that a query attends to, >= 1. The own block counts; 1 is block-local attention."""
    topk_includes_current: bool = True
    """False does not count the own block: top_k past blocks and the own one."""
    tie: Tie = "later"
    """Which of two equally scored blocks wins."""
    mean_dtype: MeanDtype = "centered"
    """Precision of the block means in the gate: the keys' dtype (as other implementations), fp32, or centred on the
    document's first block before rounding to the keys' dtype, which changes no ranking and loses fewer bits."""
    route_per: RoutePer = "q_head"
    """Who selects: every query head, or the query heads of one KV head together (another model)."""
    decode: DecodeAttention = "moba"
    """Attention of decode steps: as trained, or full attention over the same cache (the published way to generate)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {list(allowed)}")

    @property
    def num_blocks(self) -> int:
        """Blocks that a query attends to, the own one counted."""
        return self.top_k + (0 if self.topk_includes_current else 1)

    def build(self, shape: MixerShape) -> MoBA:
        return MoBA(self, shape)


_CHOICES = {
    "tie": get_args(Tie),
    "mean_dtype": get_args(MeanDtype),
    "route_per": get_args(RoutePer),
    "decode": get_args(DecodeAttention),
}


class MoBA(HeadsMixer):
    """Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, section 2.

    Parameters are those of full attention, so either can take over from the other.
    """

    context_parallel = True

    def __init__(self, config: MoBAConfig, shape: MixerShape) -> None:
        super().__init__(config, shape)
        self.config = config

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> MixerOut:
        q_THK, k_TGK, v_TGK = self.project(x_TD, ctx)
        if ctx.cp is not None:
            return self.output(self._attend_in_context(q_THK, k_TGK, v_TGK, ctx, ctx.cp))
        full = self._decodes_full(ctx)
        unit = None if full else self.config.block_size
        k_TGK, v_TGK, start_N = self.extend_for_decoding(q_THK, k_TGK, v_TGK, ctx, unit)
        if ctx.cache is not None:
            self._keep_block_means(k_TGK, start_N, ctx.packing, ctx.cache)
        if full:
            return self.output(self.decode(q_THK, k_TGK, v_TGK, start_N, ctx))
        blocks = ctx.decide("blocks", lambda: self.route(q_THK, k_TGK, ctx, start_N is not None))
        if self.decodes(ctx):
            return self.output(self.decode(q_THK, k_TGK, v_TGK, start_N, ctx, blocks))
        o_THK, _ = attend(q_THK, k_TGK, v_TGK, ctx.packing, blocks, scale=self.softmax_scale)
        return self.output(o_THK)

    def route(self, q_THK: Tensor, k_TGK: Tensor, ctx: LayerContext, in_place: bool = False) -> Selection:
        """The blocks of every query: its own, and the past ones whose mean key it scores highest.

        in_place  read cached means where they lie instead of packing them
        """
        unit_start_N = None
        if ctx.cache is not None and in_place:
            mean_UGK, unit_start_N = ctx.cache.blocks_in_place("block_mean")
        elif ctx.cache is None:
            mean_UGK = summarise(k_TGK, ctx.packing, self.config.block_size)
        else:
            mean_UGK = _cached_means(ctx.packing, ctx.cache, self.config.block_size)
        impl = self.decode_impl if self.decodes(ctx) else None
        return self._select(q_THK, mean_UGK, ctx.packing, unit_start_N, impl)

    def _select(
        self,
        q_THK: Tensor,
        mean_UGK: Tensor,
        packing: Packing,
        unit_start_N: Tensor | None = None,
        impl: str | None = None,
    ) -> Selection:
        c = self.config
        return select(
            q_THK,
            mean_UGK,
            packing,
            c.num_blocks,
            block_size=c.block_size,
            tie=c.tie,
            route_per=c.route_per,
            mean_dtype=c.mean_dtype,
            unit_start_N=unit_start_N,
            impl=impl,
        )

    def _attend_in_context(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, ctx: LayerContext, cp: ContextGroup
    ) -> Tensor:
        """o [T, H, K] of this process's tokens; `packing` is what its choices refer to."""
        size, exchange, packing = self.config.block_size, cp.exchange(k_TGK.shape[1]), cp.selections(k_TGK.shape[1])

        def attend_blocks(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, blocks: Selection) -> Tensor:
            return attend(q_THK, k_TGK, v_TGV, packing, blocks, scale=self.softmax_scale)[0]

        if exchange == "none":
            blocks = ctx.decide("blocks", lambda: self._select(q_THK, summarise(k_TGK, packing, size), packing))
            return attend_blocks(q_THK, k_TGK, v_TGV, blocks)
        if exchange == "gather":
            blocks = ctx.decide("blocks", lambda: self._select(q_THK, gather_block_means(cp, k_TGK, size), packing))
            k_TGK, v_TGV = gather_tokens(cp.group, k_TGK, v_TGV)
            stop = cp.first + cp.num_tokens
            return attend_blocks(q_THK, k_TGK[:stop], v_TGV[:stop], blocks)
        heads = cp.exchange_heads(q_THK, k_TGK, v_TGV, chooses=True)

        def choose() -> Selection:
            return all_sets(
                [self._select(q, summarise(k, packing, size), packing) for q, k in heads.queries_and_keys()]
            )

        blocks = ctx.decide("blocks", choose)
        return heads.attend(lambda group, q, k, v: attend_blocks(q, k, v, sets_of(blocks, group, heads.chunks)))

    def cache_fields(self) -> tuple[CacheField, ...]:
        """What every attention mixer keeps, and fp32 means of finished blocks."""
        row = (self.shape.num_kv_heads, self.shape.head_dim)
        return (*super().cache_fields(), CacheField("block_mean", row, torch.float32, "block", self.config.block_size))

    def cost(self, packing: Packing) -> Cost:
        """Model FLOPs count the own block's causal half and the selected past blocks, exactly, from the lengths.

        Executed FLOPs add the own block's masked half, and the gate against all blocks of the document.
        """
        c, s = self.config, self.shape
        position_T = packing.query_key_position()
        position_T = position_T[position_T >= 0]
        own = float((position_T % c.block_size + 1).sum())
        past = float((position_T // c.block_size).clamp(max=c.num_blocks - 1).sum()) * c.block_size
        units_N = packing.unit_offsets(c.block_size).diff()
        lengths_N = (packing.cu_q[1:] - packing.cu_q[:-1]).long()
        gate = float((lengths_N * units_N).sum())
        per_pair = 4.0 * s.num_heads * s.head_dim
        channels = s.num_kv_heads * s.head_dim
        finished = int(((packing.cu_k[1:] - packing.cu_k[:-1]) // c.block_size).sum())
        attention = Cost(
            model_flops=per_pair * (own + past),
            executed_flops=per_pair * (len(position_T) * c.block_size + past) + 2.0 * s.num_heads * s.head_dim * gate,
            # the selection, and the list of queries of each block that kernels make from it
            saved_bytes=self.decision_bytes(packing) + packing.num_queries * s.num_heads * c.num_blocks * 4.0,
            workspace_bytes=min(2.0 * GATE_WORKSPACE_BYTES, 4.0 * s.num_heads * (gate + past * s.head_dim)),
            cache_bytes=finished * channels * 4.0,
        )
        return self.projection_cost(packing) + attention

    def decision_bytes(self, packing: Packing) -> float:
        sets = self.shape.num_heads if self.config.route_per == "q_head" else self.shape.num_kv_heads
        return 4.0 * packing.num_queries * sets * (self.config.num_blocks + 1)

    def _decodes_full(self, ctx: LayerContext) -> bool:
        if not self.decodes(ctx) or ctx.cache is None:
            return False
        return (ctx.cache.decode_attention or self.config.decode) == "full"

    def _keep_block_means(self, k_TGK: Tensor, start_N: Tensor | None, packing: Packing, cache: LayerCache) -> None:
        """Add the means of the blocks that this call's tokens finish; their keys all lie in the cache by then."""
        size = self.config.block_size
        before_N = [held // size for held in cache.lengths_N]
        after_N = [(held + new) // size for held, new in zip(cache.lengths_N, cache.added_N, strict=True)]
        counts_N = [after - before for before, after in zip(before_N, after_N, strict=True)]
        if not any(counts_N):
            return
        starts = packing.cu_k[:-1].long() if start_N is None else start_N
        starts = starts + torch.tensor(before_N, device=k_TGK.device) * size
        finished = Packing.from_lengths([count * size for count in counts_N], device=k_TGK.device)
        rows = starts[finished.query_doc()] + finished.position_T
        mean_UGK = summarise(k_TGK[rows], finished, size)
        cache.append_blocks("block_mean", mean_UGK[: sum(counts_N)], counts_N)


def _cached_means(packing: Packing, cache: LayerCache, block_size: int) -> Tensor:
    """Cached means laid out as by `summarise`; an open block's row is zero, as only its own queries may see it."""
    rows_UGK, counts_N = cache.blocks("block_mean")
    num_keys = sum(cache.lengths_N) + sum(cache.added_N)
    mean_UGK = rows_UGK.new_zeros(packing.num_units_bound(num_keys, block_size), *rows_UGK.shape[1:])
    held = Packing.from_lengths(counts_N, device=rows_UGK.device)
    unit = packing.unit_offsets(block_size)[held.query_doc()] + held.position_T
    return mean_UGK.index_copy_(0, unit, rows_UGK)
