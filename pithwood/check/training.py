"""A run of seconds on made-up text, and the proof that a resumed run repeats it to the last digit."""

from __future__ import annotations

import math
import random
from pathlib import Path

from pithwood.attention.base import MixerConfig
from pithwood.check.gates import GateError, require
from pithwood.checkpoint.load import list_checkpoints
from pithwood.data.prepare import CorpusConfig
from pithwood.data.sources import TextFolder
from pithwood.models.qwen3_moe import Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.observe.events import read_events
from pithwood.observe.summary import SUMMARY_FILE
from pithwood.optim.config import MuonConfig
from pithwood.optim.schedule import WarmupStableDecay
from pithwood.run import Run
from pithwood.train import train

STEPS, SAVED_AT = 12, 6


def tiny_run(folder: Path, attention: MixerConfig) -> Run:
    """Two layers of width 32 on forty documents of made-up words, which are written to `folder`; saves at mid-run."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    for number in range(40):
        rng = random.Random(number)
        words = [syllables[int(60 * rng.random() ** 2)] + syllables[int(60 * rng.random() ** 3)] for _ in range(120)]
        (text / f"document{number:02}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return Run(
        name="check",
        model=Qwen3MoEConfig(
            vocab_size=300, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, attention=attention,
            moe=MoEConfig(num_experts=4, top_k=2, expert_dim=32, balance="micro_batch", balance_coef=0.01),
            rope_theta=10_000.0, init_std=0.05,
        ),
        data=CorpusConfig(source=TextFolder(str(text), "*.txt"), vocab_size=300, dedup_threshold=None),
        optim=MuonConfig(lr=0.02, schedule=WarmupStableDecay(warmup_fraction=0.1, decay_fraction=0.2)),
        steps=STEPS, seq_len=48, samples_per_step=4, samples_per_micro_batch=2, device="cpu", log_every=1,
        validate_every=STEPS, validation_samples=4, checkpoint_every=SAVED_AT, sample_prompts=(),
    )  # fmt: skip


def train_and_resume(run: Run, runs_dir: Path) -> str:
    """Train, throw away what came after the checkpoint at mid-run, train again: the losses must be the same digits."""
    summary = train(run, runs_dir=runs_dir, console=False)
    folder = Path(summary["run_dir"])
    unbroken = _losses(folder)
    steps = sorted(unbroken)
    require(steps == list(range(1, STEPS + 1)), f"the log holds the steps {steps}, not 1 to {STEPS}")
    bad = [step for step in steps if not math.isfinite(unbroken[step])]
    require(not bad, f"the training loss is not finite at step {bad[0] if bad else 0}")
    first, last = unbroken[1], sum(unbroken[step] for step in steps[-3:]) / 3
    require(last < first, f"the loss does not fall: {first:.3f} at step 1, {last:.3f} at the end")
    (folder / SUMMARY_FILE).unlink()
    for step, path in list_checkpoints(folder):
        if step > SAVED_AT:
            path.rename(folder / f"set-aside-{step}")
    train(run, runs_dir=runs_dir, console=False)
    resumed = _losses(folder)
    for step in steps:
        if resumed.get(step) != unbroken[step]:
            raise GateError(
                f"resumed after step {SAVED_AT}, step {step} has the loss {resumed.get(step)}, not {unbroken[step]}: "
                "what a step computes depends on something that no checkpoint holds"
            )
    return f"loss {first:.3f} -> {last:.3f} in {STEPS} steps; resumed at {SAVED_AT}, the same digits"


def _losses(folder: Path) -> dict[int, float]:
    return {int(e["step"]): float(e["loss"]) for e in read_events(folder) if e["kind"] == "train"}
