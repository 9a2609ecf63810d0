"""Record what a run computes first: losses of a few steps and the raw gradients of step one, in one safetensors file.

    python -m pithwood.check.record RECIPE [path=value ...] --out FILE [--steps N] [--runs-dir DIR]

A program of its own, so that it can be started in a checkout of another commit. Gradients are taken before clipping and
before the optimizer, which hides errors of scale.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pithwood.config import apply_overrides
from pithwood.data.batches import Batch
from pithwood.data.mixture import open_data
from pithwood.data.usage import training_batches
from pithwood.losses import LossLedger
from pithwood.passes import forward_backward
from pithwood.plan import check_phases
from pithwood.recipes import load_recipe
from pithwood.run import Run, pick_device
from pithwood.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    args = parser.parse_args(argv)
    run = apply_overrides(load_recipe(args.recipe), args.overrides)
    record(run, args.out, args.steps, args.runs_dir)


def record(run: Run, out: Path, steps: int, runs_dir: Path) -> None:
    """Write the record of a run's first `steps` steps; trains nothing that is kept.

    out      safetensors: `grad.<name>` raw gradients of step one; `loss.<term>` [1] means of step one's loss terms;
             `losses` [steps] fp64; `decision.<key>` ids that step one's last micro-batch chose. Metadata: data
    raises   ValueError for settings that cannot work
    """
    run.validate()
    check_phases(run)
    if run.threads:
        torch.set_num_threads(run.threads)
    tell = partial(print, file=sys.stderr, flush=True)
    corpus = open_data(run.data, runs_dir / "corpora", tell)
    source = training_batches(corpus, run.stages(), seed=run.seed, steps=run.steps)
    trainer = Trainer(run, pick_device(run), corpus)

    tensors = _first_step(trainer, source.step(0))
    losses = []
    for step in range(steps):
        trainer.enter_phase(step)
        values, _ = trainer.train_step(step, source.step(step))
        losses.append(float(values["loss"]))
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    metadata = {
        "corpus": corpus.fingerprint,
        "tokens_per_step": str(run.samples_per_step * run.seq_len),
        "versions": json.dumps({"torch": str(torch.__version__)}),
    }
    save_file(tensors, out, metadata)


def _first_step(trainer: Trainer, batches: list[Batch]) -> dict[str, Tensor]:
    """Raw gradients, loss terms and decisions of the first optimizer step, which is then forgotten."""
    objective = trainer.run.phase(0).objective
    batches = [batch.to(trainer.device) for batch in batches]
    ledger = LossLedger({"tokens": float(sum(b.num_tokens for b in batches)), **objective.totals(batches)})
    for layer in trainer.moe_layers():
        layer.reset_step()
    decisions: dict[str, Any] = {}
    for batch in batches:
        forward_backward(trainer.model, objective, batch, ledger, trainer.dtype, probe=decisions)
    found = {
        f"grad.{name}": (torch.zeros_like(p) if p.grad is None else p.grad).detach().cpu().clone()
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    found |= {f"loss.{name}": mean.detach().double().cpu().reshape(1) for name, mean in ledger.means().items()}
    for key, value in decisions.items():
        ids = value if isinstance(value, Tensor) else getattr(value, "ids", None)
        if isinstance(ids, Tensor):
            found[f"decision.{key}"] = ids.detach().cpu().contiguous()
    trainer.optimizer.zero_grad()
    return found


if __name__ == "__main__":
    main()
