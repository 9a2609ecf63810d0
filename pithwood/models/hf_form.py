"""A model's configuration in the words of transformers' Qwen3-MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pithwood.attention.base import MixerConfig
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.projections import HeadsConfig

if TYPE_CHECKING:
    from pithwood.models.qwen3_moe import Qwen3MoEConfig


def hf_config(cfg: Qwen3MoEConfig) -> dict[str, Any]:
    """config.json of the Hugging Face form; raises ValueError if Qwen3-MoE cannot express this model.

    MoBA's parameters are those of full attention, and the form knows no other: a model with MoBA is exported to be
    read as full attention, which is the same function up to documents of block_size * top_k tokens.
    """
    moe = cfg.moe
    foreign = [
        reason
        for present, reason in (
            (moe.score != "softmax", f"moe.score={moe.score!r}"),
            (moe.num_shared_experts > 0, f"moe.num_shared_experts={moe.num_shared_experts}"),
            (moe.num_groups > 1, f"moe.num_groups={moe.num_groups}"),
            (moe.scale != 1.0, f"moe.scale={moe.scale}"),
            (moe.bias_update_rate is not None, f"moe.bias_update_rate={moe.bias_update_rate}"),
            (not cfg.qk_norm, "qk_norm=false"),
        )
        if present
    ]
    foreign += dict.fromkeys(reason for mixer in cfg.mixers() for reason in _not_full_attention(mixer))
    if foreign:
        raise ValueError(
            f"Qwen3-MoE's Hugging Face form has no place for {', '.join(foreign)}; export a model without them"
        )
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.model_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.attention_bias,
        "hidden_act": "silu",
        "intermediate_size": cfg.dense_dim,
        "moe_intermediate_size": moe.expert_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalize,
        "mlp_only_layers": list(cfg.dense_layers),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": moe.balance_coef,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def _not_full_attention(mixer: MixerConfig) -> list[str]:
    """What in a mixer's configuration the attention of transformers' Qwen3-MoE cannot do with the same weights."""
    # exact types: what a mixer derived from these computes is not known here
    if type(mixer) not in (FullAttentionConfig, MoBAConfig):
        return [f"attention={type(mixer).__name__}"]
    assert isinstance(mixer, HeadsConfig)
    plain = HeadsConfig()
    names = ("rope", "softmax_scale", "key_conv")
    return [
        f"attention.{name}={getattr(mixer, name)}" for name in names if getattr(mixer, name) != getattr(plain, name)
    ]
