"""Small mixers with random weights, contexts to run them in, and plain attention to compare them with.

Legend: T packed tokens, D model width, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pithwood.attention.base import LayerContext, Mixer, MixerConfig, MixerShape
from pithwood.attention.projections import HeadsMixer
from pithwood.ops.packing import Packing
from pithwood.ops.rope import Rope

SHAPE = MixerShape(
    model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, layer=0, num_layers=2, norm_eps=1e-6, qk_norm=True
)


def make_mixer(
    config: MixerConfig, seed: int = 0, shape: MixerShape = SHAPE, dtype: torch.dtype = torch.float32
) -> Any:
    """A mixer whose every parameter is random, norms and key convolution included, so that no term hides as 0 or 1."""
    mixer = config.build(shape).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
    return mixer


def context(packing: Packing, head_dim: int = 8, **fields: Any) -> LayerContext:
    return LayerContext(packing, Rope.from_positions(packing.position_T, head_dim, 100.0), **fields)


def hidden(tokens: int, seed: int = 1, width: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run_with_grads(mixer: Mixer, x_TD: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of x and of every parameter for one fixed random upstream gradient."""
    x_TD = x_TD.detach().requires_grad_()
    mixer.zero_grad()
    y_TD = mixer(x_TD, ctx).y_TD
    y_TD.backward(hidden(y_TD.shape[0], seed=99, width=y_TD.shape[1], dtype=y_TD.dtype))
    grads = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    assert x_TD.grad is not None
    return y_TD.detach(), {"x": x_TD.grad, **grads}


def masked_attention(mixer: HeadsMixer, x_TD: Tensor, lengths: Sequence[int], visible: Any) -> Tensor:
    """The mixer's function written out with T x T masks: visible(q_THK, k_THK) -> [H, T, T] bool, per document."""
    shape = mixer.shape
    outputs = []
    start = 0
    for length in lengths:
        x = x_TD[start : start + length]
        start += length
        q = (x @ mixer.q_proj.weight.T).view(length, shape.num_heads, shape.head_dim)
        k = (x @ mixer.k_proj.weight.T).view(length, shape.num_kv_heads, shape.head_dim)
        v = (x @ mixer.v_proj.weight.T).view(length, shape.num_kv_heads, shape.head_dim)
        if mixer.q_norm is not None and mixer.k_norm is not None:
            q = q / (q.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt() * mixer.q_norm.weight
            k = k / (k.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt() * mixer.k_norm.weight
        if mixer.rope:
            rope = Rope.from_positions(torch.arange(length), shape.head_dim, 100.0)
            q, k = rope.apply(q), rope.apply(k)
        group = shape.num_heads // shape.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scale = shape.head_dim**-0.5 if mixer.softmax_scale is None else mixer.softmax_scale
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        probability = logits.masked_fill(~visible(q, k), float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", probability, v).flatten(1) @ mixer.o_proj.weight.T)
    return torch.cat(outputs)


def causal_mask(q_THK: Tensor, k_THK: Tensor) -> Tensor:
    length, heads = q_THK.shape[:2]
    return torch.ones(length, length, dtype=torch.bool).tril().expand(heads, length, length)


def window_mask(window: int) -> Any:
    def visible(q_THK: Tensor, k_THK: Tensor) -> Tensor:
        causal = causal_mask(q_THK, k_THK)
        return causal & ~causal.tril(-window)

    return visible


def moba_mask(block_size: int, top_k: int) -> Any:
    """Block membership by the definition, query by query: own block, and the best-scored complete past ones."""

    @torch.no_grad()
    def visible(q_THK: Tensor, k_THK: Tensor) -> Tensor:
        length, heads = q_THK.shape[:2]
        mask = torch.zeros(heads, length, length, dtype=torch.bool)
        for h in range(heads):
            for t in range(length):
                own = t // block_size
                means = [k_THK[j * block_size : (j + 1) * block_size, h].mean(0) for j in range(own)]
                order = sorted(range(own), key=lambda j: (float(q_THK[t, h] @ means[j]), j), reverse=True)
                for j in [own, *order[: top_k - 1]]:
                    mask[h, t, j * block_size : (j + 1) * block_size] = True
        return mask & causal_mask(q_THK, k_THK)

    return visible
