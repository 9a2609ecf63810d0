"""`pithwood train`: train a recipe, resume it, or show what it would cost."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, add_common, json_text, program_name
from pithwood.errors import promising

HELP = """examples:
  pithwood train debug --json steps=20
  pithwood train demo model.attention.top_k=2 optim.lr=0.01
  pithwood train my_recipes.py:small --dry-run
  pithwood train demo --from demo-1a2b3c4d@200 steps=600

Overrides are path=value, read by the type of the field: steps=1e3, optim.ema_decay=0.999, data.max_bytes=none,
model.attention.0.block_size=64 (* for every entry), model.attention=FullAttentionConfig, or JSON for anything larger.
The same command typed again resumes the run, or prints the summary of a finished one."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "train", "train a recipe, or resume it where it stopped", HELP)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a name that `pithwood recipes` lists, or path/to/file.py:function"
    )
    parser.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of the recipe")
    parser.add_argument("--new", action="store_true", help="start over; an existing run folder is moved aside")
    parser.add_argument("--from", dest="branch_from", metavar="RUN@STEP", help="start from another run's checkpoint")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that training would refuse; print settings and cost as JSON, write nothing",
    )
    add_common(parser, "the summary")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """Train, or print the plan; the summary in words or as JSON."""
    from pithwood.config import apply_overrides, to_dict
    from pithwood.recipes import load_recipe

    run = apply_overrides(load_recipe(args.recipe), args.overrides)
    if args.dry_run:
        from pithwood.commands.run_arguments import tell
        from pithwood.preflight import dry_run

        figures = dry_run(run, args.runs_dir, new=args.new, branch_from=args.branch_from, tell=tell)
        return 0, json_text({"config": to_dict(run), "plan": figures}, indent=None if args.json else 2)

    from pithwood.observe.summary import closing_lines
    from pithwood.parallel.mesh import world_from_environment
    from pithwood.train import train

    with promising("checkpoints are intact, and the same command goes on from the last one"):
        summary = train(
            run,
            runs_dir=args.runs_dir,
            new=args.new,
            branch_from=args.branch_from,
            console=True,
            command=args.command_line,
        )
    if world_from_environment()[0] != 0:
        # the first process speaks for all
        return 128 + int(summary["interrupted"]) if summary.get("interrupted") else 0, ""
    code = 128 + int(summary["interrupted"]) if summary.get("interrupted") else 0
    if args.json:
        return code, json_text(summary)
    program, overrides = program_name(), args.overrides
    if not summary.get("interrupted"):
        overrides = [word for word in overrides if not word.startswith("steps=")]
    folder = [] if args.runs_dir == Path("runs") else ["--runs-dir", str(args.runs_dir)]
    size = run.mesh.size
    started = program if size == 1 else f"torchrun --nproc-per-node {size} -m pithwood"
    same = f"{started} {shlex.join(['train', args.recipe, *folder, *overrides])}"
    return code, "\n".join(closing_lines({**summary, "recipe": args.recipe, "command": same, "program": program}))
