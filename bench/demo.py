"""`demo` against `demo_dense`: validation loss of sparse and full attention at equal tokens, from full training runs.

    python -m bench.demo [--runs-dir runs] [--seeds 0 1]

Finished runs of the same settings are read, not trained again. Writes bench/results/<device>/demo.json.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from bench.results import write_results
from pithwood.config import to_dict
from pithwood.recipes import load_recipe
from pithwood.train import train

KEPT = (
    "steps",
    "tokens",
    "parameters",
    "active_parameters",
    "validation_loss",
    "validation_bits_per_byte",
    "gzip_bits_per_byte",
    "below_gzip",
    "tokens_per_s",
    "seconds",
    "threads",
)
"""Fields of a run's summary that a row takes over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for recipe in ("demo", "demo_dense"):
            run = dataclasses.replace(load_recipe(recipe), seed=seed)
            summary = train(run, runs_dir=args.runs_dir, command=f"pithwood train {recipe} seed={seed}")
            if "interrupted" in summary:
                raise SystemExit(f"stopped in {recipe}; run the same command again to go on")
            attention = to_dict(run)["model"]["attention"]
            taken = {key: summary[key] for key in KEPT}
            rows.append({"recipe": recipe, "seed": seed, "attention": attention, **taken})
    for sparse, dense in zip(rows[::2], rows[1::2], strict=True):
        sparse["loss_over_dense"] = sparse["validation_loss"] / dense["validation_loss"] - 1
        print(
            f"seed {sparse['seed']}: demo {sparse['validation_loss']:.4f}, demo_dense {dense['validation_loss']:.4f}, "
            f"difference {sparse['loss_over_dense']:+.2%}; gzip -9 {sparse['gzip_bits_per_byte']:.3f} bits per byte, "
            f"demo {sparse['validation_bits_per_byte']:.3f}"
        )
    print(write_results("demo", rows))


if __name__ == "__main__":
    main()
