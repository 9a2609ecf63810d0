"""What the attention mixers share: projections into heads and back, the key convolution, per-head norms, RoPE, the
token cache, their cost.

All of them own the same parameters under the same names (`q_proj`, `k_proj`, `v_proj`, `o_proj`, with QK-norm `q_norm`
and `k_norm`, with a key convolution `key_conv`), so a run can exchange one mixer for another at any step and keep
weights and optimizer state; give both configurations the same `key_conv`.

The order on the key side is projection, key convolution, norm, RoPE. The convolution stands before RoPE, so that scores
depend on relative positions only, and before the norm, so that the norm still bounds the logits; the cache keeps the
raw keys that it needs.

Legend: T packed tokens (T_k with the cached ones), D model width, H query heads, G KV heads, K head dim, C = G * K,
N documents, W width of the key convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from pithwood.attention.base import CacheField, Cost, LayerContext, Mixer, MixerConfig, MixerOut, MixerShape
from pithwood.attention.key_conv import ConvWidth, KeyConv
from pithwood.ops.decode import decode_attend, decodes_by_kernel
from pithwood.ops.linear import linear, linears
from pithwood.ops.norm_rope import norm_rope
from pithwood.ops.packing import Packing, Selection
from pithwood.parallel.context import halo

TILE = 128
"""Queries and keys that a dense kernel visits together: what it executes is counted in such tiles."""


@dataclass(frozen=True)
class HeadsConfig(MixerConfig):
    """What every attention mixer's configuration holds."""

    rope: bool = True
    """Rotate queries and keys by position; False makes the layer position-free (NoPE)."""
    softmax_scale: float | None = None
    """Factor on the logits before the softmax, > 0; None is 1 / sqrt(head_dim)."""
    key_conv: ConvWidth = 0
    """Width of the causal convolution over keys; 0 for none. Its weights start at zero, where it is the identity."""

    def __post_init__(self) -> None:
        if self.softmax_scale is not None and not self.softmax_scale > 0:
            raise ValueError(f"softmax_scale={self.softmax_scale} must be > 0; None gives 1/sqrt(head_dim)")
        if self.key_conv not in get_args(ConvWidth):
            raise ValueError(f"key_conv={self.key_conv!r} is not known; choose one of {list(get_args(ConvWidth))}")

    def init_std(self, name: str, default: float) -> float | None:
        if name in ("q_norm.weight", "k_norm.weight"):
            return None
        return 0.0 if name == "key_conv.weight" or name.endswith(".bias") else default


class HeadsMixer(Mixer):
    """Base of the attention mixers: x_TD -> q, k, v per head, and heads -> y_TD."""

    decode_impl: str | None = None
    """The `impl` of the ops in decode steps; None lets each choose."""

    def __init__(self, config: HeadsConfig, shape: MixerShape) -> None:
        super().__init__()
        _check_shape(config, shape)
        self.shape, self.rope, self.softmax_scale = shape, config.rope, config.softmax_scale
        q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = Projection(shape.model_dim, q_width, shape.bias)
        self.k_proj = Projection(shape.model_dim, kv_width, shape.bias)
        self.v_proj = Projection(shape.model_dim, kv_width, shape.bias)
        self.o_proj = Projection(q_width, shape.model_dim, shape.bias)
        self.q_norm = HeadNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = HeadNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None
        self.key_conv = KeyConv(config.key_conv, kv_width) if config.key_conv else None

    def project(self, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        """q_THK, k_TGK, v_TGK of this call's tokens, in x's dtype: projected, keys convolved, normed, rotated.

        Raises ValueError for what these mixers do not do: attention in both directions, RoPE without angles, keys from
        before this call without a cache that holds them, and context parallelism with a cache or in a mixer that does
        not read `ctx.cp`.
        """
        self._check_context(ctx)
        tokens, heads, kv_heads, dim = x_TD.shape[0], self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        parts = self.q_proj, self.k_proj, self.v_proj
        q_TC, k_TC, v_TC = linears(x_TD, [part.weight for part in parts], [part.bias for part in parts])
        k_TC = self.mix_raw_keys(k_TC, ctx)
        q_weight, k_weight, eps = None, None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            q_weight, k_weight, eps = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        q_THK, k_TGK = norm_rope(
            q_TC.view(tokens, heads, dim),
            k_TC.view(tokens, kv_heads, dim),
            q_weight,
            k_weight,
            eps,
            ctx.rope if self.rope else None,
        )
        return q_THK, k_TGK, v_TC.view(tokens, kv_heads, dim)

    def mix_raw_keys(self, k_TC: Tensor, ctx: LayerContext) -> Tensor:
        """What happens to the key projection's output [T, G*K] before norm and RoPE: the key convolution, if any."""
        if self.key_conv is None:
            return k_TC
        if ctx.cp is not None and ctx.cp.crosses:
            before_WC = halo(ctx.cp, k_TC, self.key_conv.width - 1)
            return self.key_conv.between(k_TC, before_WC, ctx.packing)
        if ctx.cache is None:
            return self.key_conv(k_TC, ctx.packing)
        tail_NWC = ctx.cache.read("key_tail").to(k_TC.dtype)
        ctx.cache.write("key_tail", self.key_conv.next_tail(k_TC, tail_NWC, ctx.packing))
        return self.key_conv(k_TC, ctx.packing, tail_NWC)

    def extend(self, k_TGK: Tensor, v_TGK: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens that the queries may see: with a cache, this call's are appended to it."""
        if ctx.cache is None:
            return k_TGK, v_TGK
        return ctx.cache.append("k", k_TGK), ctx.cache.append("v", v_TGK)

    def extend_for_decoding(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, ctx: LayerContext, unit: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `extend`, and where each document's keys begin (None: packed). They stay in the cache where the decode
        kernel will read them: packing them anew costs as much as full attention.

        unit  keys per unit of the selection that the step attends by; None: it attends to all keys
        """
        if ctx.cache is None or ctx.packing.self_attention or not self.decodes(ctx):
            return *self.extend(k_TGK, v_TGV, ctx), None
        if self.decode_impl != "triton" and not decodes_by_kernel(q_THK, k_TGK, v_TGV, ctx.packing, unit):
            return *self.extend(k_TGK, v_TGV, ctx), None
        k_rows, start_N = ctx.cache.append_in_place("k", k_TGK)
        return k_rows, ctx.cache.append_in_place("v", v_TGV)[0], start_N

    def decodes(self, ctx: LayerContext) -> bool:
        """Whether this call is a decode step over cached keys."""
        return ctx.mode == "decode" and ctx.cache is not None

    def decode(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGV: Tensor,
        start_N: Tensor | None,
        ctx: LayerContext,
        selection: Selection | None = None,
    ) -> Tensor:
        """o [T, H, K] of a decode step over what `extend_for_decoding` returned; selection None: all keys."""
        o_THK, _ = decode_attend(
            q_THK,
            k_TGK,
            v_TGV,
            ctx.packing,
            selection,
            self.softmax_scale,
            key_start_N=start_N,
            need_lse=False,
            impl=self.decode_impl,
        )
        return o_THK

    def output(self, o_THK: Tensor) -> MixerOut:
        """Heads back into the model width."""
        return MixerOut(self.o_proj(o_THK.flatten(1)))

    def cache_fields(self) -> tuple[CacheField, ...]:
        """k and v per token, and the last raw keys where keys are convolved."""
        row, dtype = (self.shape.num_kv_heads, self.shape.head_dim), self.k_proj.weight.dtype
        fields = CacheField("k", row, dtype, "token"), CacheField("v", row, dtype, "token")
        if self.key_conv is None:
            return fields
        return (*fields, CacheField("key_tail", (self.key_conv.width - 1, row[0] * row[1]), dtype, "tail"))

    def optimizer_shapes(self) -> dict[str, tuple[int, int, int] | None]:
        # W taps per channel are no matrix between two spaces: nothing for Muon to orthogonalise
        return {} if self.key_conv is None else {"key_conv.weight": None}

    def projection_cost(self, packing: Packing) -> Cost:
        """Cost of everything but the attention itself: four projections, the key convolution, and what is kept for
        their backward pass, at `activation_bytes` per activation.

        Saved: x (once, for three projections), q, k, v as attention sees them, q and k before their norms, o with its
        fp32 log-sum-exp, and for the convolution its W shifted keys and their sum. The cache holds k and v of every
        key, and W - 1 raw keys of every document. The convolution's FLOPs are executed ones only, as are a norm's.
        """
        s, tokens, keys = self.shape, packing.num_queries, int(packing.cu_k[-1])
        q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        flops = 2.0 * tokens * s.model_dim * (2 * q_width + 2 * kv_width)
        before_norm = q_width + kv_width if s.qk_norm else 0
        width = 0 if self.key_conv is None else self.key_conv.width
        convolution = (width + 1) * kv_width if width else 0
        saved = tokens * (s.model_dim + 2 * q_width + 2 * kv_width + before_norm + convolution) * self.activation_bytes
        saved += tokens * s.num_heads * 4
        workspace = 2.0 * tokens * (q_width + kv_width) * self.activation_bytes
        cached = kv_width * (2.0 * keys + max(width - 1, 0) * packing.num_docs)
        executed = flops + 2.0 * width * kv_width * tokens
        return Cost(flops, executed, saved, workspace, cached * self.activation_bytes)

    def dense_cost(self, packing: Packing, window: int | None = None) -> Cost:
        """Cost of a dense causal mixer; model FLOPs count the visible (query, key) pairs only."""
        per_pair = 4.0 * self.shape.num_heads * self.shape.head_dim
        attention = Cost(
            per_pair * visible_pairs(packing, window),
            per_pair * visible_pairs(packing, window, tile=TILE),
        )
        return self.projection_cost(packing) + attention

    def _check_context(self, ctx: LayerContext) -> None:
        wrong = None
        if not ctx.packing.causal:
            wrong = "is causal; got a packing with causal=False: use a bidirectional mixer"
        elif ctx.cp is not None and not self.context_parallel:
            wrong = "does not run under context parallelism: set mesh.cp=1"
        elif ctx.cp is not None and ctx.cache is not None:
            wrong = "has no cache under context parallelism: generate with mesh.cp=1"
        elif self.rope and ctx.rope is None:
            wrong = "has rope=True but the model gives no rotary angles: set rope=False"
        elif ctx.cache is None and not ctx.packing.self_attention:
            wrong = "got keys longer than its queries but no cache that holds them"
        if wrong is not None:
            # the layer's number is read here alone: a compiled stage that reads it is compiled for every layer
            raise ValueError(f"{type(self).__name__} in layer {self.shape.layer} {wrong}")


class Projection(nn.Module):
    """Linear map with an uninitialised master weight [out, in], used in the input's dtype."""

    def __init__(self, in_width: int, out_width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.bias = nn.Parameter(torch.empty(out_width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class HeadNorm(nn.Module):
    """Weight [K] and epsilon of the RMS norm of each head's vector, the same for all heads; starts at ones."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim))


def visible_pairs(packing: Packing, window: int | None = None, tile: int = 1) -> float:
    """(query, key) pairs of one head that a causal mask, and a window if given, leaves visible; offsets on the CPU.

    With tile > 1 every tile x tile square that holds a visible pair counts whole: what a tiled kernel executes.
    """
    lengths_N = (packing.cu_k[1:] - packing.cu_k[:-1]).long()
    first = packing.query_key_position()
    if tile == 1:
        seen = (first + 1).clamp(min=0)
        return float((seen if window is None else seen.clamp(max=window)).sum())
    doc_T = packing.query_doc()
    local_T = torch.arange(packing.num_queries) - packing.cu_q.long()[doc_T]
    starts = local_T % tile == 0
    last_T = torch.minimum(first + tile, lengths_N[doc_T]) if packing.num_docs else first
    low_T = torch.zeros_like(first) if window is None else (first - window + 1).clamp(min=0)
    tiles_T = ((last_T + tile - 1) // tile - low_T // tile).clamp(min=0)
    return float(tiles_T[starts].sum()) * tile * tile


def _check_shape(config: HeadsConfig, shape: MixerShape) -> None:
    if shape.num_kv_heads < 1 or shape.num_heads % shape.num_kv_heads:
        raise ValueError(
            f"num_kv_heads={shape.num_kv_heads} must divide num_heads={shape.num_heads}: "
            f"try {[g for g in range(1, shape.num_heads + 1) if shape.num_heads % g == 0]}"
        )
    if config.rope and shape.head_dim % 2:
        raise ValueError(f"head_dim={shape.head_dim} must be even with rope=True: try {shape.head_dim + 1}")
