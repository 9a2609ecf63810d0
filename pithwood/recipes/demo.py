"""The laptop family: `debug` in seconds, `demo` in minutes, `demo_dense` to compare it with."""

from __future__ import annotations

from dataclasses import replace

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.data.prepare import CorpusConfig
from pithwood.data.sources import StdlibSource
from pithwood.models.qwen3_moe import Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.optim.config import MuonConfig
from pithwood.optim.schedule import WarmupStableDecay
from pithwood.run import Run


def demo() -> Run:
    """Sparse experts and MoBA attention on the Python standard library's source; under ten minutes on two cores."""
    return Run(
        name="demo",
        model=Qwen3MoEConfig(
            vocab_size=4096,
            model_dim=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            attention=MoBAConfig(block_size=64, top_k=4),
            moe=MoEConfig(num_experts=8, top_k=2, expert_dim=256, balance="micro_batch", balance_coef=0.01),
            rope_theta=10_000.0,
        ),
        data=CorpusConfig(source=StdlibSource(), vocab_size=4096, validation_fraction=0.03),
        optim=MuonConfig(
            lr=0.0025, adamw_lr=0.015, schedule=WarmupStableDecay(warmup_fraction=0.05, decay_fraction=0.5)
        ),
        steps=360,
        seq_len=1024,
        samples_per_step=4,
        samples_per_micro_batch=4,
        validate_every=90,
        checkpoint_every=60,
        validation_samples=0,
    )


def demo_dense() -> Run:
    """The same model and tokens as `demo`, with full attention."""
    run = demo()
    return replace(run, name="demo_dense", model=replace(run.model, attention=FullAttentionConfig()))


def debug() -> Run:
    """Two layers, four experts, a small part of the corpus: every part of the system in under a minute on a CPU."""
    return Run(
        name="debug",
        model=Qwen3MoEConfig(
            vocab_size=512,
            model_dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            attention=MoBAConfig(block_size=16, top_k=3),
            moe=MoEConfig(num_experts=4, top_k=2, expert_dim=64, balance="micro_batch", balance_coef=0.01),
            rope_theta=10_000.0,
        ),
        data=CorpusConfig(source=StdlibSource(), vocab_size=512, max_bytes=600_000, validation_fraction=0.05),
        optim=MuonConfig(lr=0.005, adamw_lr=0.02, schedule=WarmupStableDecay(warmup_fraction=0.1, decay_fraction=0.3)),
        steps=60,
        seq_len=256,
        samples_per_step=8,
        samples_per_micro_batch=4,
        log_every=5,
        validate_every=30,
        checkpoint_every=20,
        validation_samples=0,
        sample_tokens=60,
    )
