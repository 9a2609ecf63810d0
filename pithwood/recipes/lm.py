"""Language models for one GPU."""

from __future__ import annotations

from pithwood.attention.moba import MoBAConfig
from pithwood.data.prepare import CorpusConfig
from pithwood.data.sources import StdlibSource
from pithwood.models.qwen3_moe import Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.optim.config import MuonConfig
from pithwood.optim.schedule import WarmupStableDecay
from pithwood.run import Run


def lm_100m() -> Run:
    """About 100M active parameters with MoBA (128, 8) over 8K tokens, bf16, meant for one GPU.

    Point `data.source` at your own text: the default corpus holds a few million tokens only.
    """
    return Run(
        name="lm_100m",
        model=Qwen3MoEConfig(
            vocab_size=16_384,
            model_dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            attention=MoBAConfig(block_size=128, top_k=8),
            moe=MoEConfig(num_experts=16, top_k=2, expert_dim=1024, balance="global_batch", balance_coef=0.01),
            rope_theta=500_000.0,
        ),
        data=CorpusConfig(source=StdlibSource(), vocab_size=16_384, validation_fraction=0.02),
        optim=MuonConfig(
            lr=0.01, weight_decay=0.1, schedule=WarmupStableDecay(warmup_fraction=0.05, decay_fraction=0.2)
        ),
        steps=2000,
        seq_len=8192,
        samples_per_step=32,
        samples_per_micro_batch=4,
        precision="bf16",
        validate_every=250,
        checkpoint_every=250,
    )
