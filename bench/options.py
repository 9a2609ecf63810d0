"""The same run with the settings that save memory or time off and on: their loss curves on real text, side by side.

It says nothing about speed (`pithwood bench train` does), so other work may share the machine.

    PYTHONPATH=. python bench/options.py [--recipe lm_100m] [--deterministic] [--compile] [path=value ...]

Rows: `off` (nothing recomputed, no copies of the weights), `off again` (what two equal runs differ by, since atomic
additions take any order on a GPU), `on` (blocks recomputed, their inputs and the optimizer's state on the host where
there is a GPU, copies kept if they fit), `on, chunks` (experts in chunks besides), `on, bf16 state` (momentum and
moments in bf16 besides), with --compile `on, compiled` (compiled stages in the place of kernels). With --deterministic
sums have one order, so that rows which compute the same agree to the last digit: `on` is `off`, and there is no `off
again`. Each row has the loss of every tenth step and its distance from `off`. Writes
bench/results/<device>/options.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from bench.results import write_results
from pithwood.config import apply_overrides
from pithwood.observe.events import read_events
from pithwood.recipes import load_recipe
from pithwood.run import Run
from pithwood.train import train

OFF = ("recompute=none", "keep_weight_copies=never")
ON = ("recompute=block", "keep_weight_copies=auto")
ON_GPU = ("offload_activations=true", "optim.offload_state=true")
CHUNKS = "model.moe.chunk_tokens=4096"
LOW = ("optim.momentum_dtype=bf16", "optim.adam_state_dtype=bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lm_100m")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--deterministic", action="store_true", help="add up in one order; slower")
    parser.add_argument("--compile", action="store_true", help="add a row with the stages of blocks compiled")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="for all rows")
    args = parser.parse_args()
    base = apply_overrides(load_recipe(args.recipe), args.overrides)
    base = dataclasses.replace(base, log_every=10, validate_every=base.steps, checkpoint_every=base.steps)
    on = ON + (ON_GPU if torch.cuda.is_available() else ())
    cases = {"off": OFF, "off again": OFF, "on": on, "on, chunks": (*on, CHUNKS), "on, bf16 state": on + LOW}
    if args.compile:
        cases["on, compiled"] = (*on, "compile=true")
    if args.deterministic:
        # cuBLAS asks for a workspace of its own; what fills fresh memory is of no use here and takes time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        del cases["off again"]
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    rows: list[dict[str, Any]] = []
    for name, settings in cases.items():
        rows.append(_row(name, apply_overrides(base, list(settings)), settings, args.runs_dir))
        first = rows[0]["losses"]
        apart = [abs(loss - other) for loss, other in zip(rows[-1]["losses"], first, strict=True)]
        rows[-1]["most_from_off"], rows[-1]["mean_from_off"] = max(apart), sum(apart) / len(apart)
        print(
            f"{name:<14} last loss {rows[-1]['losses'][-1]:.4f}, validation {rows[-1]['validation_loss']:.4f}; "
            f"{rows[-1]['mean_from_off']:.5f} from off in the mean, {max(apart):.5f} at most; "
            f"{rows[-1]['peak_memory_gb']:.1f} GB",
            flush=True,
        )
        path = write_results("options", rows)
    print(path)


def _row(name: str, run: Run, settings: tuple[str, ...], runs_dir: Path) -> dict[str, Any]:
    """Train (or read, if it is finished) and take the curve from the event log."""
    # memory settings do not change a run folder's name, so each case has a folder of runs, and all share the corpora
    own = runs_dir / f"options-{name.replace(',', '').replace(' ', '-')}"
    own.mkdir(parents=True, exist_ok=True)
    (runs_dir / "corpora").mkdir(exist_ok=True)
    if not (own / "corpora").exists():
        (own / "corpora").symlink_to((runs_dir / "corpora").resolve())
    summary = train(run, runs_dir=own, command=f"python bench/options.py {run.name} ({name})")
    if "interrupted" in summary:
        raise SystemExit(f"stopped in {name!r}; run the same command again to go on")
    # one event per step; those of logging steps carry the statistics
    events = [event for event in read_events(Path(summary["run_dir"])) if event["kind"] == "train"]
    logged = [event for event in events if event["step"] % run.log_every == 0]
    return {
        "case": name,
        "recipe": run.name,
        "settings": list(settings),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "steps": run.steps,
        "tokens_per_step": run.samples_per_step * run.seq_len,
        "losses": [event["loss"] for event in logged],
        "validation_loss": summary["validation_loss"],
        "peak_memory_gb": max(event.get("peak_memory_gb", 0.0) for event in events),
    }


if __name__ == "__main__":
    main()
