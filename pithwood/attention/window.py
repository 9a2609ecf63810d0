"""Sliding-window attention: every query sees its own key and the `window - 1` before it, within its document.

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
class SlidingWindowConfig(HeadsConfig):
    """Causal softmax attention over the most recent keys."""

    window: int = 256
    """Keys that a query sees, its own included; >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window={self.window} must be >= 1 (it counts the query's own key)")

    def build(self, shape: MixerShape) -> SlidingWindow:
        return SlidingWindow(self, shape)


class SlidingWindow(HeadsMixer):
    """Beltagy et al. 2020, "Longformer", arXiv 2004.05150, section 3.1, causal form.

    The cache keeps all tokens, so that a sequence can be truncated, forked, or read by full attention later.
    """

    context_parallel = True

    def __init__(self, config: SlidingWindowConfig, shape: MixerShape) -> None:
        super().__init__(config, shape)
        self.window = config.window

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> MixerOut:
        q_THK, k_TGK, v_TGK = self.project(x_TD, ctx)
        k_TGK, v_TGK = self.extend(k_TGK, v_TGK, ctx)
        if ctx.cp is not None:
            return self.output(attend_in_context(ctx.cp, q_THK, k_TGK, v_TGK, self.attend, window=self.window))
        return self.output(self.attend(q_THK, k_TGK, v_TGK, ctx.packing))

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, packing: Packing) -> Tensor:
        return dense_attention(q_THK, k_TGK, v_TGV, packing, scale=self.softmax_scale, window=self.window)[0]

    def cost(self, packing: Packing) -> Cost:
        return self.dense_cost(packing, self.window)
