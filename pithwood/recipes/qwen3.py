"""The layers of Qwen3-30B-A3B, for measuring: `qwen3_30b_8l` is the training workload of docs/throughput.md."""

from __future__ import annotations

from pithwood.attention.full import FullAttentionConfig
from pithwood.data.prepare import CorpusConfig
from pithwood.data.sources import StdlibSource
from pithwood.models.qwen3_moe import Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.optim.config import MuonConfig
from pithwood.optim.schedule import WarmupStableDecay
from pithwood.run import Run


def qwen3_30b_8l() -> Run:
    """Eight layers of Qwen3-30B-A3B, 16 sequences of 4096 a step, full attention, Muon, bf16; needs an H200.

    Longer: seq_len=32768 samples_per_step=4 samples_per_micro_batch=1; sparser: model.attention=MoBAConfig, which is
    (128, 8). The default corpus is small: point `data.source` at your own text to train more than a few hundred steps.
    """
    return Run(
        name="qwen3_30b_8l",
        model=Qwen3MoEConfig(
            num_layers=8,
            attention=FullAttentionConfig(),
            moe=MoEConfig(num_experts=128, top_k=8, expert_dim=768, balance="global_batch", balance_coef=0.001),
        ),
        data=CorpusConfig(source=StdlibSource(), vocab_size=16_384, validation_fraction=0.02),
        optim=MuonConfig(lr=2e-3, schedule=WarmupStableDecay(warmup_fraction=0.05, decay_fraction=0.2)),
        steps=300,
        seq_len=4096,
        samples_per_step=16,
        samples_per_micro_batch=4,
        precision="bf16",
        validate_every=150,
        checkpoint_every=300,
        keep_checkpoints=1,
    )
