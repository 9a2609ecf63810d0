"""`pithwood bench`: measure a part of the system and write its results file; a file of its own for each subject."""

from __future__ import annotations

import argparse
from typing import Any

from pithwood.commands import bench_attention, bench_train
from pithwood.commands.common import Parser, add_command

HELP = """examples:
  pithwood bench attention --rows issue --dry-run
  pithwood bench train debug --steps 6
  pithwood bench train qwen3_30b_8l --routing balanced --breakdown --json

`pithwood bench attention --help` and `pithwood bench train --help` tell more. PITHWOOD_COMMIT, where it
is set, names the commit of code that was copied."""

SUBJECTS = {"attention": bench_attention, "train": bench_train}


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "bench", "measure attention or training and write a results file", HELP)
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True, parser_class=Parser)
    for subject in SUBJECTS.values():
        subject.add(subjects)


def run(args: argparse.Namespace) -> tuple[int, str]:
    """What the subject's own `run` returns."""
    return SUBJECTS[args.subject].run(args)
