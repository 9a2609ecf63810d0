"""What a model consists of and what it costs: parameters and FLOPs by part, bytes of cache per token.

Legend: T packed tokens.
"""

from __future__ import annotations

import copy
from typing import Any

from pithwood.attention.base import Cost, Mixer
from pithwood.attention.projections import HeadsMixer
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.moe.layer import MoELayer
from pithwood.ops.packing import Packing


def parameters_by_part(model: Qwen3MoE) -> list[dict[str, Any]]:
    """Rows {part, total, active} in the order of the forward pass; their sums are those of `num_params`.

    active  parameters that one token meets: top_k of num_experts routed experts, everything else whole
    """
    parts: dict[str, list[int]] = {}
    for name, param in model.named_parameters():
        active = param.numel()
        if ".mlp.experts." in name:
            # experts are stacked [E, ...], so this is exact
            active = active * model.cfg.moe.top_k // model.cfg.moe.num_experts
        row = parts.setdefault(_part_of(name), [0, 0])
        row[0] += param.numel()
        row[1] += active
    return [{"part": part, "total": parts[part][0], "active": parts[part][1]} for part in _ORDER if part in parts]


def cost_per_token(model: Qwen3MoE, length: int, element_size: int = 4) -> dict[str, Any]:
    """Forward FLOPs and cache bytes of one token, averaged over a document of `length` tokens.

    element_size  bytes per activation and cached number: 4 for fp32, 2 for bf16
    returns       length, forward_flops and executed_flops (as `Cost` defines them; training takes three times the
                  first), cache_bytes, and parts: rows {part, forward_flops, executed_flops, share} whose FLOPs add up
                  to the totals
    """
    packing = Packing.from_lengths([length])
    total = model.cost(packing, element_size)
    parts: dict[str, Cost] = {}

    def add(part: str, cost: Cost) -> None:
        parts[part] = parts.get(part, Cost()) + cost

    for block in model.blocks:
        assert isinstance(block.self_attn, Mixer)
        mixer = copy.copy(block.self_attn)
        mixer.activation_bytes = element_size
        mixing = mixer.cost(packing)
        if isinstance(mixer, HeadsMixer):
            projections = mixer.projection_cost(packing)
            add("attention projections", projections)
            add("attention over keys", _difference(mixing, projections))
        else:
            add("token mixer", mixing)
        if isinstance(block.mlp, MoELayer):
            add("router and experts", block.mlp.cost(length, element_size))
        else:
            flops = 6.0 * length * model.cfg.model_dim * model.cfg.dense_dim
            add("dense feed-forward", Cost(flops, flops))
    counted = Cost()
    for cost in parts.values():
        counted = counted + cost
    add("head", _difference(total, counted))
    return {
        "length": length,
        "forward_flops": total.model_flops / length,
        "executed_flops": total.executed_flops / length,
        "cache_bytes": total.cache_bytes / length,
        "parts": [
            {
                "part": part,
                "forward_flops": cost.model_flops / length,
                "executed_flops": cost.executed_flops / length,
                "share": cost.model_flops / total.model_flops,
            }
            for part, cost in parts.items()
        ],
    }


_ORDER = ("embedding", "attention", "router", "routed experts", "shared experts", "dense feed-forward", "norms", "head")


def _part_of(name: str) -> str:
    """The part that a parameter belongs to, by its canonical name."""
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if ".self_attn." in name:
        return "attention"
    for mark, part in (
        (".mlp.gate.", "router"),
        (".mlp.experts.", "routed experts"),
        (".shared_experts.", "shared experts"),
    ):
        if mark in name:
            return part
    return "dense feed-forward" if ".mlp." in name else "norms"


def _difference(whole: Cost, part: Cost) -> Cost:
    return Cost(whole.model_flops - part.model_flops, whole.executed_flops - part.executed_flops)
