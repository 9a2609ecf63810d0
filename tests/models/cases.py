"""Tiny models, uninitialised, on which a model file is compared with transformers: a generator each, named as the file.

`pithwood check model NAME` and tests/check/test_model.py run them.
"""

from __future__ import annotations

from collections.abc import Iterator

from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.moe.config import MoEConfig


def qwen3_moe() -> Iterator[Qwen3MoE]:
    """A dense layer among sparse ones, tied and untied embeddings, weights renormalised or not, biases."""
    for tied, renormalize, bias in ((False, True, False), (True, False, True)):
        yield Qwen3MoE(
            Qwen3MoEConfig(
                vocab_size=97, model_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
                moe=MoEConfig(num_experts=8, top_k=2, expert_dim=24, renormalize=renormalize),
                dense_layers=(1,), dense_dim=40, rope_theta=10_000.0, init_std=0.08, tie_embeddings=tied,
                attention_bias=bias,
            )
        )  # fmt: skip
