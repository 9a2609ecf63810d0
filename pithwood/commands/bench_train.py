"""`pithwood bench train`: measure speed and memory of the real trainer and write train.json."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, json_text
from pithwood.commands.train_arguments import add_train_arguments, overrides_of, run_of, tell

HELP = """examples:
  pithwood bench train debug --steps 6
  pithwood bench train qwen3_30b_8l --routing balanced --json
  pithwood bench train qwen3_30b_8l --tokens real --routing learned --breakdown
  pithwood bench train qwen3_30b_8l seq_len=131072 samples_per_step=1 samples_per_micro_batch=1 --steps 6 --drop 2

A fresh model of the recipe does --steps optimizer steps; the device is idle at both ends of every step's clock, and the
first --drop steps are not counted. The row replaces an equal one in bench/results/<device>/train.json and is compared
with the last committed one of the same workload. --breakdown adds where the step's time goes, and the floor of each
part. Where the code is no checkout, PITHWOOD_COMMIT names its commit."""


def add(subjects: Any) -> None:
    """Add the subject to `pithwood bench`."""
    parser = add_command(subjects, "train", "measure the training of a recipe and write train.json", HELP)
    add_train_arguments(parser, steps=12)
    parser.add_argument("--drop", metavar="N", type=int, default=3, help="first steps not counted (default: 3)")
    parser.add_argument("--breakdown", action="store_true", help="also profile where the step's time goes")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of train.json (default: bench/results/<device>)"
    )
    parser.add_argument("--json", action="store_true", help="print the row as one JSON object on stdout")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs and corpora live (default: runs)"
    )


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The measured row, in words or as JSON; exit code 1 if it has no speed."""
    check_steps(args.steps, args.drop)

    from pithwood.bench import train
    from pithwood.bench.results import device_name, merge_rows, read_results, write_results
    from pithwood.bench.train_rows import committed_rows, comparison, measured, row_key, workload

    settings = run_of(args)
    folder = args.out or Path("bench") / "results" / device_name()
    kept = read_results(folder / "train.json")
    committed, where = committed_rows()
    columns = workload(settings, args.recipe, overrides_of(args), args.tokens)
    row, started = train.measure(
        settings,
        columns,
        steps=args.steps,
        drop=args.drop,
        tokens=args.tokens,
        runs_dir=args.runs_dir,
        command=args.command_line,
        begun=args.started,
        tell=tell,
    )
    old = committed if kept is None else kept["rows"]

    def save() -> Path:
        rows = merge_rows(old, [row], row_key, measured)
        return write_results("train", rows, folder, args.command_line)

    path = save()
    if args.breakdown and started is not None:
        from pithwood.bench.train_profile import breakdown

        row["breakdown"] = breakdown(started, args.steps, row["step_ms"], tell)
        save()
    against = comparison(row, committed, where)
    code = 0 if measured(row) else 1
    if args.json:
        return code, json_text({"file": path, "row": row, "committed": against})
    from pithwood.bench.train_text import row_lines

    return code, "\n".join([*row_lines(row, against, where), str(path)])


def check_steps(steps: int, drop: int) -> None:
    """Raise ValueError unless something is left to time."""
    if drop < 1:
        raise ValueError(f"--drop {drop} must be at least 1: the first step compiles and allocates")
    if steps <= drop:
        raise ValueError(f"--steps {steps} leaves none to time after --drop {drop}; give at least --steps {drop + 1}")
