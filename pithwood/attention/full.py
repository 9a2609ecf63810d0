"""Full causal attention: every query sees every key of its document up to its own position.

Legend: T packed tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pithwood.attention.base import Cost, LayerContext, MixerOut, MixerShape
from pithwood.attention.projections import HeadsConfig, HeadsMixer
from pithwood.ops.dense_attention import dense_attention
from pithwood.ops.packing import Packing
from pithwood.parallel.context import attend_in_context


@dataclass(frozen=True)
class FullAttentionConfig(HeadsConfig):
    """Full causal softmax attention with grouped KV heads."""

    def build(self, shape: MixerShape) -> FullAttention:
        return FullAttention(self, shape)


class FullAttention(HeadsMixer):
    """Vaswani et al. 2017, arXiv 1706.03762, section 3.2, causal; grouped KV heads: Ainslie et al. 2023, 2305.13245."""

    context_parallel = True

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> MixerOut:
        q_THK, k_TGK, v_TGK = self.project(x_TD, ctx)
        k_TGK, v_TGK, start_N = self.extend_for_decoding(q_THK, k_TGK, v_TGK, ctx)
        if self.decodes(ctx):
            return self.output(self.decode(q_THK, k_TGK, v_TGK, start_N, ctx))
        if ctx.cp is not None:
            scale = self.shape.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
            return self.output(attend_in_context(ctx.cp, q_THK, k_TGK, v_TGK, self.attend, plain_scale=scale))
        return self.output(self.attend(q_THK, k_TGK, v_TGK, ctx.packing))

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing) -> Tensor:
        return dense_attention(q_THK, k_TGK, v_TGV, packing, scale=self.softmax_scale)[0]

    def cost(self, packing: Packing) -> Cost:
        return self.dense_cost(packing)
